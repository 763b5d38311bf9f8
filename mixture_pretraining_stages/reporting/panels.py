"""
The figures of a report.
"""

import math
from statistics import fmean
from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

from olmo_optim_ext.engine.roles import Role
from olmo_optim_ext.matrix.reports import FAILED
from olmo_optim_ext.training import matrix_metric

from ..callbacks import LOSS
from .bar_panels import bar_panels, mixture_panel
from .curves import Point, mean_curve
from .drawn import Drawn
from .figures import Panel, Series
from .results import RunResult
from .sensitivity import sensitivity_panel

__all__ = ["CURVES", "panels"]

BINS = 150
"""Of the steps of a training curve, each drawn as its mean."""

SKIPPED = 0.1
"""Part of a run that the axis of losses is not made for."""

MEASURES = (
    *("relative effective rank", "relative stable rank", "orthogonality error", "update RMS"),
    *("noise scale", "noise fired", FAILED),
)


def panels(drawn: Sequence[Drawn]) -> List[Panel]:
    """The figures for which there is something to show."""
    found = [
        *_validation(drawn),
        *_training(drawn),
        sensitivity_panel(drawn),
        *_sources(drawn),
        *bar_panels(drawn),
        *_measures(drawn),
        mixture_panel(drawn),
    ]
    return [panel for panel in found if panel is not None and (panel.series or panel.bars)]


# Curves


def _curve(
    each: Drawn, points: Sequence[Point], x: Callable[[Point], Optional[float]], marks: bool = True
) -> List[Series]:
    known = [(x(point), point) for point in points if x(point) is not None]
    if not known:
        return []
    several = len(each.runs) > 1
    return [
        Series(
            each.arm.name,
            [float(place) for place, _ in known if place is not None],
            [point.mean for _, point in known],
            each.style,
            [point.low for _, point in known] if several else None,
            [point.high for _, point in known] if several else None,
            points=marks,
            size=5,
            prominent=each.prominent,
        )
    ]


def _tokens(point: Point) -> Optional[float]:
    return point.tokens


def _seconds(point: Point) -> Optional[float]:
    return point.seconds


AXES = (("tokens", "tokens", _tokens), ("time", "training time (s)", _seconds))

CURVES = (
    "Curves are means over seeds at each arm's best rate, or the longest run of an arm without a "
    "result; bands reach from the lowest seed to the highest. Axes of losses are made for what "
    "comes after the first tenth of a run."
)


def _validation(drawn: Sequence[Drawn]) -> List[Panel]:
    curves = [(each, mean_curve(each.runs)) for each in drawn]
    return _against_both("validation", curves, "The mean over sources.", marks=True)


def _training(drawn: Sequence[Drawn]) -> List[Panel]:
    curves = [(each, _smoothed(each.runs)) for each in drawn]
    caption = f"At most {BINS} points, each the mean over the steps since the one before."
    return _against_both("training", curves, caption, marks=False)


def _against_both(
    kind: str, curves: Sequence[Tuple[Drawn, List[Point]]], caption: str, marks: bool
) -> List[Panel]:
    return [
        _losses(
            f"{kind}_{key}",
            f"{kind.capitalize()} loss against {key}",
            label,
            [series for each, curve in curves for series in _curve(each, curve, x, marks=marks)],
            caption,
        )
        for key, label, x in AXES
    ]


def _sources(drawn: Sequence[Drawn]) -> List[Panel]:
    names = _each_once(
        source
        for each in drawn
        for run in each.runs
        for e in run.evaluations
        for source in e.losses
    )
    if len(names) < 2:
        return []
    out = []
    for index, name in enumerate(names):
        series = []
        for each in drawn:
            curve = mean_curve(each.runs, lambda evaluation: evaluation.losses.get(name))  # noqa: B023
            series += _curve(each, curve, _tokens)
        title = f"Validation loss of {name}"
        out.append(_losses(f"source_{index}", title, "tokens", series))
    return out


def _losses(key: str, title: str, x_label: str, series: List[Series], caption: str = "") -> Panel:
    loss = "loss (nats per token)"
    return Panel(key, title, x_label, loss, series, y_range=_range(series), caption=caption)


def _range(series: Sequence[Series], skipped: float = SKIPPED) -> Optional[Tuple[float, float]]:
    shown = [each for each in series if each.prominent and each.x]
    if not shown:
        return None
    begin = skipped * max(each.x[-1] for each in shown)
    late = [
        value
        for each in shown
        for values in (each.y, each.low or each.y, each.high or each.y)
        for x, value in zip(each.x, values)
        if x >= begin
    ]
    low, high = min(late), max(late)
    pad = max(0.04 * (high - low), 0.01 * abs(high)) or 0.1
    return low - pad, high + pad


def _smoothed(runs: Sequence[RunResult]) -> List[Point]:
    """Training loss: means over runs and over neighbouring steps."""
    by_step = [
        {row["step"]: row for row in run.rows if math.isfinite(row.get(LOSS, math.nan))}
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    size = max(1, math.ceil(len(steps) / BINS))
    points = []
    for begin in range(0, len(steps), size):
        inside = steps[begin : begin + size]
        means = [fmean(rows[step][LOSS] for step in inside) for rows in by_step]
        seconds = [run.seconds[inside[-1]] for run in runs if run.seconds is not None]
        points.append(
            Point(
                inside[-1],
                fmean(rows[inside[-1]]["tokens"] for rows in by_step),
                fmean(seconds) if len(seconds) == len(runs) else None,
                *(fmean(means), min(means), max(means)),
            )
        )
    return points


def _measures(drawn: Sequence[Drawn]) -> List[Panel]:
    out = []
    for measure in MEASURES:
        for role in Role:
            series = [
                curve
                for each in drawn
                for curve in _curve(
                    each, _recorded(each.runs, matrix_metric(measure, str(role))), _tokens
                )
            ]
            key = f"{measure}_{role}".replace(" ", "_")
            title = f"{measure[0].upper()}{measure[1:]} ({role})"
            if series:
                y_range = _range(series, skipped=0.0)
                out.append(Panel(key, title, "tokens", measure, series, y_range=y_range))
    return out


def _recorded(runs: Sequence[RunResult], key: str) -> List[Point]:
    by_step = [{row["step"]: row for row in run.rows if key in row} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    points = []
    for step in steps:
        values = [rows[step][key] for rows in by_step]
        if all(map(math.isfinite, values)):
            tokens = fmean(rows[step]["tokens"] for rows in by_step)
            points.append(Point(step, tokens, None, fmean(values), min(values), max(values)))
    return points


def _each_once(values: Iterable[Any]) -> List[Any]:
    return list(dict.fromkeys(values))
