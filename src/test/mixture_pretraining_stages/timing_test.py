"""
When the clock of a step begins and ends, on a trainer that only tells its callbacks the time.
"""

from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch

from mixture_pretraining_stages import timing
from mixture_pretraining_stages.timing import OPTIMIZER_SECONDS, STEP_SECONDS, StepTimer


@pytest.fixture
def timer(monkeypatch) -> StepTimer:
    """With a clock that says 0, 1, 2, ..."""
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    made = StepTimer()
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        device=torch.device("cpu"), global_step=0
    )
    return made


def steps(timer: StepTimer, count: int) -> None:
    for _ in range(count):
        timer.pre_load_batch()
        timer.trainer.global_step += 1
        timer.pre_optim_step()
        timer.post_train_batch()


def logged(timer: StepTimer, *numbers: int) -> List[Dict[str, float]]:
    out: List[Dict[str, float]] = [{} for _ in numbers]
    for step, metrics in zip(numbers, out):
        timer.pre_log_metrics(step, metrics)
    return out


def test_metrics_that_are_logged_later_have_the_times_of_their_own_step(timer):
    steps(timer, 2)
    timer.pre_load_batch()  # finds no batch: the stage is over
    expected = {STEP_SECONDS: 2.0, OPTIMIZER_SECONDS: 1.0}
    assert logged(timer, 1, 2, 2, 3) == [expected, expected, {}, {}]


def test_the_clock_comes_first_so_that_further_passes_count_and_reports_do_not():
    from olmo_optim_ext.training import (
        LastWeightsCallback,
        MatrixMetricsCallback,
        SAMCallback,
        SophiaCallback,
    )

    others: List[Any] = [LastWeightsCallback, MatrixMetricsCallback, SAMCallback, SophiaCallback]
    assert all(StepTimer.priority > other.priority for other in others)


def test_ranks_that_write_nothing_keep_nothing(timer, monkeypatch):
    monkeypatch.setattr(timing, "get_rank", lambda: 1)
    steps(timer, 3)
    assert logged(timer, 1, 2, 3) == [{}, {}, {}]
