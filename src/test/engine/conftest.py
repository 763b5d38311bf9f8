from pathlib import Path
from typing import Callable

import pytest

from ..ranks import run_on_ranks

WORKER = Path(__file__).parent / "engine_worker.py"


@pytest.fixture(scope="session")
def passed_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """
    Asserts that a case of the worker passed on all of its 4 ranks, which are started once for all
    cases; returns the folder with what the cases wrote.
    """
    folder = tmp_path_factory.mktemp("engine_worker")
    output = ""
    try:
        run_on_ranks(4, WORKER, folder)
    except AssertionError as error:
        output = str(error)

    def check(case: str) -> Path:
        assert (folder / f"{case}.passed").exists(), output or f"there is no case {case!r}"
        return folder

    return check
