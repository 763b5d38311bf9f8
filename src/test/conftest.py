import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def little_garbage() -> None:
    # OLMo-core collects garbage when it loads checkpoints and trains, and modules are most of what
    # it looks at.
    gc.collect()
    gc.freeze()
