"""
The figures of a report that are bars: time, memory, and the mixture.
"""

import math
import re
from statistics import fmean
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .drawn import Drawn
from .figures import Bar, Panel
from .results import RunResult

__all__ = ["bar_panels", "mixture_panel"]

DRAWN = re.compile(r"data/(.+) tokens")
Place = Tuple[str, str]
"""Stage and source."""


def bar_panels(drawn: Sequence[Drawn]) -> List[Panel]:
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


def mixture_panel(drawn: Sequence[Drawn]) -> Optional[Panel]:
    runs = [run for each in drawn for run in each.runs if any(map(_drawn_tokens, run.rows))]
    if not runs:
        return None
    asked, shares = _asked(runs[0].facts), [_drawn(run) for run in runs]
    places = list(dict.fromkeys(place for each in (asked, *shares) for place in each))
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
