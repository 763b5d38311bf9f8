"""
The figures of a report.
"""

import math
import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from olmo_optim_ext.engine.roles import Role
from olmo_optim_ext.matrix.reports import FAILED
from olmo_optim_ext.training import matrix_metric

from .callbacks import LOSS
from .figures import BASELINE_STYLE, Bar, Panel, Series, Style, style_of
from .results import RunResult
from .sensitivity import sensitivity_panel
from .statistics import Arm, Point, Study, mean_curve

__all__ = ["CURVES", "Drawn", "draw", "panels"]

PROMINENT = 8
"""Of more than :data:`FEW` arms so many are shown at first, the best ones; and the baseline."""

FEW = 12
BINS = 150
"""Of the steps of a training curve, each drawn as its mean."""

SKIPPED = 0.1
"""Part of a run that the axis of losses is not made for."""

MEASURES = (
    *("relative effective rank", "relative stable rank", "orthogonality error", "update RMS"),
    *("noise scale", "noise fired", FAILED),
)
DRAWN = re.compile(r"data/(.+) tokens")


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


def panels(drawn: Sequence[Drawn]) -> List[Panel]:
    """The figures for which there is something to show."""
    found = [
        *_validation(drawn),
        *_training(drawn),
        sensitivity_panel([(each.arm, each.style, each.prominent) for each in drawn]),
        *_sources(drawn),
        *_bars(drawn),
        *_measures(drawn),
        _mixture(drawn),
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
    return [
        _losses(
            f"validation_{key}",
            f"Validation loss against {key}",
            label,
            [series for each, curve in curves for series in _curve(each, curve, x)],
            "The mean over sources.",
        )
        for key, label, x in AXES
    ]


def _training(drawn: Sequence[Drawn]) -> List[Panel]:
    curves = [(each, _smoothed(each.runs)) for each in drawn]
    return [
        _losses(
            f"training_{key}",
            f"Training loss against {key}",
            label,
            [series for each, curve in curves for series in _curve(each, curve, x, marks=False)],
            f"Each point is the mean over about {1 / BINS:.1%} of the steps.",
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


# Bars


def _bars(drawn: Sequence[Drawn]) -> List[Panel]:
    timed = [each.arm for each in drawn if each.arm.cost.step_seconds is not None]
    optimizer = [1000 * (arm.cost.optimizer_seconds or 0.0) for arm in timed]
    rest = [1000 * (arm.cost.step_seconds or 0.0) - ms for arm, ms in zip(timed, optimizer)]
    return [
        Panel(
            "step_time",
            "Time of a step",
            "milliseconds",
            "",
            bars=[Bar("optimizer", optimizer, "#D55E00"), Bar("rest", rest, "#BBBBBB", hatch=True)]
            if timed
            else [],
            categories=[arm.name for arm in timed],
            caption="Means. The optimizer's part is clipping, the schedule, the step, and passes "
            "that it asks for. Without the first step of each stage and steps with a report.",
        ),
        _state(drawn),
    ]


def _state(drawn: Sequence[Drawn]) -> Panel:
    sized = [each.arm for each in drawn if each.arm.cost.state_bytes is not None]
    sizes = [arm.cost.state_bytes or 0.0 for arm in sized]
    thousands = min(3, int(math.log10(max([*sizes, 1.0])) / 3))
    unit = ("bytes", "kB", "MB", "GB")[thousands]
    values = [size / 1000**thousands for size in sizes]
    return Panel(
        "state_bytes",
        "State of the optimizer",
        f"{unit}, on all ranks together",
        "",
        bars=[Bar("state", values, "#0072B2")] if sized else [],
        categories=[arm.name for arm in sized],
    )


def _mixture(drawn: Sequence[Drawn]) -> Optional[Panel]:
    runs = [run for each in drawn for run in each.runs if any(map(_drawn_tokens, run.rows))]
    if not runs:
        return None
    asked, shares = _asked(runs[0].facts), [_drawn(run) for run in runs]
    places = _each_once(place for each in (asked, *shares) for place in each)
    drawn_shares: List[Optional[float]] = [
        fmean(each.get(place, 0.0) for each in shares) for place in places
    ]
    return Panel(
        "mixture",
        "Mixture asked for and drawn",
        "share of the tokens of a stage",
        "",
        bars=[
            Bar("asked", [asked.get(place) for place in places], "#BBBBBB", hatch=True),
            Bar("drawn", drawn_shares, "#0072B2"),
        ],
        categories=[f"{stage}: {source}" for stage, source in places],
        stacked=False,
        caption=f"The mean over {len(runs)} run(s) at the best rates.",
    )


Place = Tuple[str, str]


def _drawn_tokens(row: Mapping[str, Any]) -> Dict[str, float]:
    found = ((DRAWN.fullmatch(key), value) for key, value in row.items())
    return {match[1]: value for match, value in found if match}


def _drawn(run: RunResult) -> Dict[Place, float]:
    """By stage and source, the share of the tokens of the stage."""
    tokens: Dict[Place, float] = {}
    of_stage: Dict[str, float] = {}
    for row in run.rows:
        for source, count in _drawn_tokens(row).items():
            stage = row["stage"]
            tokens[stage, source] = tokens.get((stage, source), 0.0) + count
            of_stage[stage] = of_stage.get(stage, 0.0) + count
    return {place: count / of_stage[place[0]] for place, count in tokens.items() if count}


def _asked(facts: Mapping[str, Any]) -> Dict[Place, float]:
    return {
        (stage, source): share
        for stage, shares in (facts.get("asked") or {}).items()
        for source, share in shares.items()
    }


def _each_once(values: Iterable[Any]) -> List[Any]:
    return list(dict.fromkeys(values))
