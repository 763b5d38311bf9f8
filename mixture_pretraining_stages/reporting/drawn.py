"""
How the arms of a report are drawn, the same in every figure.
"""

from dataclasses import dataclass
from typing import List

from .figures import BASELINE_STYLE, Style, style_of
from .results import RunResult
from .statistics import Arm, Study

__all__ = ["Drawn", "draw"]

PROMINENT = 8
"""Of more than :data:`FEW` arms so many are shown at first, the best ones; and the baseline."""

FEW = 12


@dataclass(frozen=True)
class Drawn:
    """An arm, and how it is drawn."""

    arm: Arm
    style: Style
    prominent: bool

    @property
    def runs(self) -> List[RunResult]:
        """Those whose curves are shown: at the best rate, or the longest if none is finished."""
        if self.arm.best is not None:
            return self.arm.best.finished
        longest = max(self.arm.runs, key=lambda run: len(run.rows), default=None)
        return [longest] if longest is not None and longest.rows else []


def draw(study: Study) -> List[Drawn]:
    """All arms with their styles: the same in every figure."""
    baseline = study.baseline
    drawn, others = [], 0
    for index, arm in enumerate(study.arms):
        is_baseline = baseline is not None and arm.name == baseline.name
        style = BASELINE_STYLE if is_baseline else style_of(others)
        others += not is_baseline
        prominent = is_baseline or index < PROMINENT or len(study.arms) <= FEW
        drawn.append(Drawn(arm, style, prominent))
    return drawn
