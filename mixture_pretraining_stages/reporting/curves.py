"""
Curves that are means over seeds, and where they reach a loss.
"""

import math
from statistics import fmean
from typing import Callable, List, NamedTuple, Optional, Sequence

from .results import Evaluation, RunResult

__all__ = ["Point", "Reached", "mean_curve", "reach"]


class Point(NamedTuple):
    """A point of a curve that is a mean over seeds."""

    step: int
    tokens: float
    seconds: Optional[float]
    mean: float
    low: float
    high: float


class Reached(NamedTuple):
    """Where the mean curve of an arm is first as low as the baseline ends."""

    step: float
    tokens: float
    seconds: Optional[float]


def mean_curve(
    runs: Sequence[RunResult],
    value: Callable[[Evaluation], Optional[float]] = lambda evaluation: evaluation.loss,
) -> List[Point]:
    """
    The mean over runs at the steps at which all were evaluated.

    :param value: Of an evaluation.
    """
    by_step = [{each.step: each for each in run.evaluations} for run in runs]
    steps = set.intersection(*(set(each) for each in by_step)) if by_step else set()
    points = []
    for step in sorted(steps):
        there = [each[step] for each in by_step]
        values = [x for x in map(value, there) if x is not None and math.isfinite(x)]
        if len(values) == len(there):
            seconds = [each.seconds for each in there if each.seconds is not None]
            points.append(
                Point(
                    step,
                    fmean(each.tokens for each in there),
                    fmean(seconds) if len(seconds) == len(there) else None,
                    *(fmean(values), min(values), max(values)),
                )
            )
    return points


def reach(curve: Sequence[Point], target: float) -> Optional[Reached]:
    """
    Where a curve first is at or below a target, linearly between its points; its first point, if
    that is. ``None`` if it never is.
    """
    for before, after in zip([None, *curve], curve):
        if after.mean <= target:
            if before is None:
                return Reached(after.step, after.tokens, after.seconds)
            part = (before.mean - target) / (before.mean - after.mean)
            seconds = None
            if before.seconds is not None and after.seconds is not None:
                seconds = before.seconds + part * (after.seconds - before.seconds)
            return Reached(
                before.step + part * (after.step - before.step),
                before.tokens + part * (after.tokens - before.tokens),
                seconds,
            )
    return None
