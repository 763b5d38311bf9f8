"""
What an optimizer takes of time and memory.
"""

from statistics import fmean
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..timing import OPTIMIZER_SECONDS, STEP_SECONDS
from .results import RunResult

__all__ = ["Cost", "cost_of"]


class Cost(NamedTuple):
    """Of the runs of an arm at its best rate: means."""

    step_seconds: Optional[float]
    optimizer_seconds: Optional[float]
    state_bytes: Optional[float]
    parameters: Optional[float]

    @property
    def optimizer_share(self) -> Optional[float]:
        if not self.step_seconds or self.optimizer_seconds is None:
            return None
        return self.optimizer_seconds / self.step_seconds

    @property
    def bytes_per_parameter(self) -> Optional[float]:
        if self.state_bytes is None or not self.parameters:
            return None
        return self.state_bytes / self.parameters


def cost_of(runs: Sequence[RunResult]) -> Cost:
    """What some runs of one arm took."""
    times = [pair for run in runs for pair in _times(run)]
    states = [sum_ for run in runs if (sum_ := _state_bytes(run)) is not None]
    sizes = [run.facts["parameters"] for run in runs if run.facts.get("parameters")]
    return Cost(
        fmean(step for step, _ in times) if times else None,
        fmean(optimizer for _, optimizer in times) if times else None,
        fmean(states) if states else None,
        fmean(sizes) if sizes else None,
    )


def _times(run: RunResult) -> List[Tuple[float, float]]:
    """
    Seconds of a step and of the optimizer in it, but for the first step of each stage, in which
    kernels are compiled, and for those with a report on matrices, which takes time in the step.
    """
    out, stage = [], None
    for row in run.rows:
        if STEP_SECONDS not in row:
            continue
        reports = any(key.startswith("optim/update RMS/") for key in row)
        if row["stage"] == stage and not reports:
            out.append((row[STEP_SECONDS], row[OPTIMIZER_SECONDS]))
        stage = row["stage"]
    return out


def _state_bytes(run: RunResult) -> Optional[int]:
    """Of the stage that has most."""
    states = run.facts.get("state_bytes")
    return max(states.values(), default=None) if isinstance(states, dict) else None
