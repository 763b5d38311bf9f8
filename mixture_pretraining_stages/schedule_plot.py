"""
What the schedules of an experiment do, without running it: the values of each step, a table and a
picture.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Sequence

from olmo_core.exceptions import OLMoConfigurationError
from rich.table import Table

from olmo_optim_ext.engine.base import ALGORITHM
from olmo_optim_ext.schedulers import cycles_momentum, momentum_of
from olmo_optim_ext.training import HyperparameterSchedule, ScheduledField

from .stages import StagePlan, plan_stages, stage_scheduler
from .training import JolmoModel

__all__ = ["Curve", "ScheduledValues", "draw_schedule", "schedule_table", "scheduled_values"]

LEARNING_RATE = "learning rate"

DRAWN = 10_000
"""Of a run with more steps only about so many are evaluated."""


@dataclass(frozen=True)
class Clock:
    """Where a run stands, by the names that OLMo-core's trainer has for it."""

    global_step: int
    max_steps: int
    global_train_tokens_seen: int
    max_tokens: int


@dataclass
class Curve:
    """The values of one quantity in one or more parameter groups that agree in it."""

    quantity: str
    groups: List[str]
    values: List[float]


@dataclass
class ScheduledValues:
    """What a run would do, of each step that is evaluated."""

    plans: List[StagePlan]
    steps: List[int] = field(default_factory=list)
    tokens: List[int] = field(default_factory=list)
    curves: List[Curve] = field(default_factory=list)

    def quantities(self) -> List[str]:
        return list(dict.fromkeys(curve.quantity for curve in self.curves))


def scheduled_values(spec: JolmoModel, groups: Sequence[Dict[str, Any]]) -> ScheduledValues:
    """
    The values that the optimizer would step with, from the schedulers that a run would have.

    :param groups: The parameter groups of the spec's optimizer. They stay as they are.

    :returns: Learning rates, and weight decay and momentum where they are scheduled. Of the first
        and the last step of each stage, and of all others, in long runs of every so-many-th.
    """
    groups = [{**group, "lr": float(group["lr"])} for group in groups]
    for group in groups:
        group["initial_lr"] = float(group.get("initial_lr", group["lr"]))
    plans, batch = plan_stages(spec), spec.global_batch_size
    out, last_step = ScheduledValues(plans), plans[-1].last_step
    schedules = [
        HyperparameterSchedule(name, scheduler, groups, f"{name}_schedule")
        for name, scheduler in spec.hyperparameter_schedulers().items()
    ]
    quantities = [LEARNING_RATE, *(schedule.what for schedule in schedules)]
    if cycles_momentum(spec.scheduler_config()):
        quantities.append(str(ScheduledField.momentum))
    values: Dict[str, List[List[float]]] = {quantity: [] for quantity in quantities}
    for plan in plans:
        scheduler = stage_scheduler(spec, plan)
        for step in _steps(plan, max(1, last_step // DRAWN)):
            clock = Clock(step, last_step, step * batch, last_step * batch)
            for schedule in schedules:
                schedule.apply(groups, clock)
            for group in groups:
                scheduler.set_lr(group, clock)
            for quantity, rows in values.items():
                rows.append([_value(group, quantity) for group in groups])
            out.steps.append(step)
            out.tokens.append(step * batch)
    names = [_name(index, group) for index, group in enumerate(groups)]
    for quantity, rows in values.items():
        out.curves += _curves(quantity, names, [list(column) for column in zip(*rows)])
    return out


def _steps(plan: StagePlan, stride: int) -> List[int]:
    inside = range(plan.first_step + 1, plan.last_step + 1, stride)
    return sorted({*inside, plan.last_step})


def _value(group: Dict[str, Any], quantity: str) -> float:
    if quantity == LEARNING_RATE:
        return group["lr"]
    if quantity == ScheduledField.momentum:
        return momentum_of(group, "the momentum is drawn")
    return group["weight_decay"]


def _name(index: int, group: Dict[str, Any]) -> str:
    rule = group.get(ALGORITHM)
    return f"{index}" if rule is None else f"{index} ({rule})"


def _curves(quantity: str, names: List[str], columns: List[List[float]]) -> List[Curve]:
    found: List[Curve] = []
    for name, column in zip(names, columns):
        same = next((curve for curve in found if curve.values == column), None)
        if same is None:
            found.append(Curve(quantity, [name], column))
        else:
            same.groups.append(name)
    return found


def schedule_table(values: ScheduledValues) -> Table:
    """First, lowest, highest and last value of each curve."""
    caption = "one row for parameter groups that agree"
    if (last := values.steps[-1]) > len(values.steps):
        caption += f"; {len(values.steps):,} of {last:,} steps were evaluated"
    table = Table(caption=caption, box=None)
    table.add_column("what")
    table.add_column("parameter groups")
    for title in ("first", "lowest", "highest", "at step", "last"):
        table.add_column(title, justify="right", min_width=8)
    for curve in values.curves:
        peak = max(range(len(curve.values)), key=curve.values.__getitem__)
        shown = (curve.values[0], min(curve.values), curve.values[peak])
        table.add_row(
            curve.quantity,
            ", ".join(curve.groups),
            *(f"{value:.3g}" for value in shown),
            f"{values.steps[peak]:,}",
            f"{curve.values[-1]:.3g}",
        )
    return table


def check_picture(path: Path) -> None:
    """
    Check where a picture shall go.

    :raises OLMoConfigurationError: If it cannot.
    """
    if path.suffix != ".png":
        raise OLMoConfigurationError(
            f"--output: {str(path)!r} is not allowed, allowed is a file that ends in .png"
        )
    if not path.parent.is_dir() or path.is_dir():
        raise OLMoConfigurationError(
            f"--output: {str(path)!r} is not allowed, allowed is a file in a folder that exists"
        )


def _name_steps(above: Any, values: ScheduledValues) -> None:
    """Ticks for whole steps: stages may have batches of different sizes."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    last = values.steps[-1]
    ticks = [t for t in MaxNLocator(8, integer=True).tick_values(0, last) if 0 <= t <= last]
    places = np.interp(ticks, [0, *values.steps], [0, *values.tokens])
    above.set_xlim(0, values.tokens[-1])
    above.set_xticks(places, [f"{tick:,.0f}" for tick in ticks])
    above.set_xlabel("steps")


def draw_schedule(values: ScheduledValues, title: str, path: Path) -> None:
    """
    All curves against tokens, with steps above, and the ends of stages.

    :raises OLMoConfigurationError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = values.quantities()
    figure = Figure(figsize=(9, 1.5 + 2.5 * len(quantities)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    for axes, quantity in zip(panels, quantities):
        curves = [curve for curve in values.curves if curve.quantity == quantity]
        for curve in curves:
            noun = "group" if len(curve.groups) == 1 else "groups"
            axes.plot(values.tokens, curve.values, label=f"{noun} {', '.join(curve.groups)}")
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    panels[0].set_ymargin(0.15)  # for the names of stages
    panels[-1].set_xlim(0, values.tokens[-1])
    _name_steps(panels[0].twiny(), values)
    panels[0].set_title(title)
    panels[-1].set_xlabel("tokens")
    for plan in values.plans:
        last_token = values.tokens[values.steps.index(plan.last_step)]
        for axes in panels:
            axes.axvline(last_token, color="0.5", linestyle=":", linewidth=1)
        panels[0].annotate(
            plan.spec.name,
            (last_token, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
            color="0.4",
        )
    draft = path.with_suffix(".tmp.png")
    try:
        figure.savefig(draft, dpi=130)
        draft.replace(path)
    except OSError as error:
        raise OLMoConfigurationError(
            f"--output: {path} cannot be written ({error.strerror}), allowed is a file that can"
        ) from None
