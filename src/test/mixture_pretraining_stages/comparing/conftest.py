import signal
from typing import Iterator

import pytest

LIMIT = 180
"""Seconds; the slowest test takes a tenth."""


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """A queue that is broken has no end, and would be looked at for ever."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"the test has not ended in {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
