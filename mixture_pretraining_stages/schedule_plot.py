"""
What the schedules of an experiment do, without running it: the values of each step, a table and a
picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from olmo_core.exceptions import OLMoConfigurationError
from rich.table import Table

from olmo_optim_ext.engine.base import ALGORITHM
from olmo_optim_ext.schedulers import cycles_momentum, momentum_of
from olmo_optim_ext.training import HyperparameterSchedule, ScheduledField

from .pictures import mark_stages, new_figure, save_figure
from .plans import StagePlan, over_run, plan_stages
from .schedule import Clock
from .training import JolmoModel

__all__ = ["Curve", "check_picture", "draw_schedule", "schedule_table", "scheduled_values"]

LEARNING_RATE = "learning rate"

EVALUATED = 10_000
"""Of a run with more steps only about so many are evaluated."""

Groups = List[Dict[str, Any]]


@dataclass
class Curve:
    """The values of one quantity in the parameter groups of an optimizer that agree in it."""

    quantity: str
    groups: List[str]
    steps: List[int]
    """Those that were evaluated."""
    tokens: List[int]
    """Of the run, after each of these steps."""
    values: List[float]
    """With which the optimizer makes these steps."""


def scheduled_values(spec: JolmoModel, vocab_size: int) -> List[Curve]:
    """
    The values that a run would step with, from the schedulers that it would have.

    :param vocab_size: Of the tokenizer.

    :returns: Learning rates, and weight decay and momentum where they are scheduled, of all steps;
        in long runs of the last of each stage and of every so-many-th.
    """
    plans = plan_stages(spec)
    several = any(plan.optimizer != plans[0].optimizer for plan in plans)
    built: List[Tuple[Any, Groups]] = []
    points: Dict[Tuple[str, int, str], List[Tuple[int, int, float]]] = {}
    for plan in plans:
        config = spec.optimizer_config(plan.spec)
        number = next((n for n, (other, _) in enumerate(built) if other == config), len(built))
        if number == len(built):
            optim = spec.build_on_meta(vocab_size, plan.spec)[1]
            built.append((config, optim.param_groups))
        optimizer = f"{plan.optimizer['name']} " if several else ""
        # Each stage begins with the values of the config.
        groups = [_on_the_host(group) for group in built[number][1]]
        for step, quantity, values in _stage_values(spec, plans, plan, groups):
            for index, value in enumerate(values):
                name = _name(optimizer, index, groups[index])
                line = points.setdefault((quantity, number, name), [])
                line.append((step, plan.tokens_at(step), value))
    curves: Dict[Any, Curve] = {}
    for (quantity, number, name), line in points.items():
        steps, tokens, numbers = (list(column) for column in zip(*line))
        new = Curve(quantity, [], steps, tokens, numbers)
        # One curve for groups that agree.
        curves.setdefault((quantity, number, *line), new).groups.append(name)
    order = list(dict.fromkeys(curve.quantity for curve in curves.values()))
    return sorted(curves.values(), key=lambda curve: order.index(curve.quantity))


def _on_the_host(group: Dict[str, Any]) -> Dict[str, Any]:
    lr = float(group.get("initial_lr", group["lr"]))
    return {**group, "lr": lr, "initial_lr": lr}


def _name(optimizer: str, index: int, group: Dict[str, Any]) -> str:
    rule = group.get(ALGORITHM)
    return f"{optimizer}{index}" if rule is None else f"{optimizer}{index} ({rule})"


def _stage_values(
    spec: JolmoModel, plans: Sequence[StagePlan], plan: StagePlan, groups: Groups
) -> List[Tuple[int, str, List[float]]]:
    """Steps of a stage with the values of each quantity in all groups, which they are left with."""
    run, scheduler = plans[-1], plan.scheduler(spec, plans)
    schedules = [
        HyperparameterSchedule(name, over_run(inner, plans), groups, f"{name}_schedule")
        for name, inner in spec.hyperparameter_schedulers().items()
    ]
    cycles = cycles_momentum(spec.scheduler_config(plan.spec))
    stride = max(1, run.last_step // EVALUATED)
    out: List[Tuple[int, str, List[float]]] = []
    for step in sorted({*range(plan.first_step + 1, plan.last_step, stride), plan.last_step}):
        clock = Clock(step, run.last_step, plan.tokens_at(step), run.last_token)
        scheduled = [(step, each.what, each.apply(groups, clock)) for each in schedules]
        rates = [scheduler.set_lr(group, clock) for group in groups]
        out += [(step, LEARNING_RATE, [float(rate) for rate in rates]), *scheduled]
        if cycles:
            momenta = [momentum_of(group, "the momentum is drawn") for group in groups]
            out.append((step, str(ScheduledField.momentum), momenta))
    return out


def schedule_table(curves: Sequence[Curve]) -> Table:
    """First, lowest, highest and last value of each curve."""
    caption = "one row for parameter groups that agree"
    if any(after - before > 1 for c in curves for before, after in zip(c.steps, c.steps[1:])):
        caption += ", and not of every step, as there are so many"
    table = Table(caption=caption, box=None)
    table.add_column("what")
    table.add_column("parameter groups")
    for title in ("first", "lowest", "highest", "at step", "last"):
        table.add_column(title, justify="right", min_width=8)
    for curve in curves:
        peak = max(range(len(curve.values)), key=curve.values.__getitem__)
        shown = (curve.values[0], min(curve.values), curve.values[peak])
        table.add_row(
            curve.quantity,
            ", ".join(curve.groups),
            *(f"{value:.3g}" for value in shown),
            f"{curve.steps[peak]:,}",
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


def draw_schedule(
    curves: Sequence[Curve], plans: Sequence[StagePlan], title: str, path: Path
) -> None:
    """
    Curves against tokens, with steps above, and the ends of stages.

    :raises OLMoConfigurationError: If the file cannot be written.
    """
    quantities = list(dict.fromkeys(curve.quantity for curve in curves))
    figure = new_figure(9, 1.5 + 2.5 * len(quantities))
    panels = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    colors: Dict[str, str] = {}
    for axes, quantity in zip(panels, quantities):
        lines = [curve for curve in curves if curve.quantity == quantity]
        for curve in lines:
            noun = "group" if len(curve.groups) == 1 else "groups"
            # A stage of one step is a point.
            marker = "." if len(curve.values) == 1 else ""
            label = f"{noun} {', '.join(curve.groups)}"
            color = colors.setdefault(label, f"C{len(colors)}")
            axes.plot(curve.tokens, curve.values, color, marker=marker, label=label)
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    panels[0].set_ymargin(0.15)  # for the names of stages
    panels[-1].set_xlim(0, plans[-1].last_token)
    panels[-1].set_xlabel("tokens")
    _name_steps(panels[0].twiny(), plans)
    panels[0].set_title(title)
    mark_stages(list(panels), [(plan.spec.name, plan.last_token) for plan in plans])
    try:
        save_figure(figure, path)
    except OSError as error:
        raise OLMoConfigurationError(
            f"--output: {path} cannot be written ({error.strerror}), allowed is a file that can"
        ) from None


def _name_steps(above: Any, plans: Sequence[StagePlan]) -> None:
    """Ticks for whole steps: stages may have batches of different sizes."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    ends = [(0, 0), *((plan.last_step, plan.last_token) for plan in plans)]
    steps, tokens = zip(*ends)
    ticks = MaxNLocator(8, integer=True).tick_values(0, steps[-1])
    ticks = [tick for tick in ticks if 0 <= tick <= steps[-1]]
    above.set_xlim(0, tokens[-1])
    above.set_xticks(np.interp(ticks, steps, tokens), [f"{tick:,.0f}" for tick in ticks])
    above.set_xlabel("steps")
