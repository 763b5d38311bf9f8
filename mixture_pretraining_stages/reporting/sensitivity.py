"""
The figure of final losses against learning rates.
"""

from dataclasses import replace
from typing import List, Optional, Sequence, Tuple

from .drawn import Drawn
from .figures import Panel, Series
from .statistics import EDGE, Rate

__all__ = ["sensitivity_panel"]

CAPTION = (
    "Means over seeds; bars reach from the lowest seed to the highest. A star is the best rate, a "
    "ring around it says that it is at the edge of the grid. A cross at the upper edge is a rate "
    "at which a run failed or diverged, or ended above the axis, which ends at the loss of the "
    "first evaluation."
)


def sensitivity_panel(drawn: Sequence[Drawn]) -> Optional[Panel]:
    """
    Final loss against the rates of each arm; ``None`` unless one has several.
    """
    if not any(len(each.arm.rates) > 1 for each in drawn):
        return None
    limits = _limits(drawn)
    series = [each for it in drawn for each in _of_arm(it, limits)]
    return Panel(
        "learning_rates",
        "Final validation loss against the learning rate",
        "learning rate",
        "loss (nats per token)",
        series,
        log_x=True,
        y_range=limits,
        caption=CAPTION,
    )


def _limits(drawn: Sequence[Drawn]) -> Tuple[float, float]:
    shown = [each.arm for each in drawn if each.prominent]
    losses = [x for arm in shown for rate in arm.rates for x in rate.losses.values()]
    first = [run.evaluations[0].loss for arm in shown for run in arm.runs if run.evaluations]
    if not losses:
        return 0.0, 1.0
    low, high = min(losses), max(losses)
    if first and max(first) > low:  # else all have ended above where they began
        high = min(high, max(first))
    pad = 0.05 * (high - low) or 0.1
    return low - pad, high + pad


def _of_arm(drawn: Drawn, limits: Tuple[float, float]) -> List[Series]:
    arm, style, prominent = drawn.arm, drawn.style, drawn.prominent
    rates = [rate for rate in arm.rates if rate.lr]
    finished = [rate for rate in rates if rate.mean is not None]
    common = {"name": arm.name, "prominent": prominent, "line": False, "points": True}
    x = [rate.lr or 0.0 for rate in finished]
    y = [rate.mean or 0.0 for rate in finished]
    series = [
        Series(arm.name, x, y, style, prominent=prominent),
        Series(
            **common,  # type: ignore[arg-type]
            x=x,
            y=y,
            style=style,
            low=[min(rate.losses.values()) for rate in finished],
            high=[max(rate.losses.values()) for rate in finished],
            labelled=False,
        ),
    ]
    series = series if finished else []
    if arm.best is not None and arm.best.lr:
        marks = [("star", 13.0)] + ([("circle-open", 20.0)] if EDGE in arm.flags else [])
        for symbol, size in marks:
            mark = replace(style, symbol=symbol)
            place = {"x": [arm.best.lr], "y": [arm.best.mean], "style": mark, "size": size}
            series.append(Series(**common, **place, labelled=False))  # type: ignore[arg-type]
    crossed = [rate.lr or 0.0 for rate in rates if _off(rate, limits[1])]
    if crossed:
        top = limits[1] - 0.02 * (limits[1] - limits[0])
        mark = replace(style, symbol="x")
        place = {"x": crossed, "y": [top] * len(crossed), "style": mark, "size": 9.0}
        series.append(Series(**common, **place, labelled=False))  # type: ignore[arg-type]
    return series


def _off(rate: Rate, top: float) -> bool:
    return bool(rate.broken) or (rate.mean is not None and rate.mean > top)
