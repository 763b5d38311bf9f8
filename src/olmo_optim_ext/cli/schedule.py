"""
What schedules there are and what they do: ``olmo-optim schedule list`` and ``plot``.
"""

import dataclasses
from pathlib import Path
from typing import List, Optional

import typer
from olmo_core.optim import Scheduler
from rich.table import Table

from mixture_pretraining_stages.plans import plan_stages
from mixture_pretraining_stages.schedule_plot import (
    check_picture,
    draw_schedule,
    schedule_table,
    scheduled_values,
)
from mixture_pretraining_stages.tokenizers import load_tokenizer

from .app import CONFIG_HELP, app, console, load

schedule = typer.Typer(
    no_args_is_help=True, help="Schedules of the learning rate, of weight decay and of momentum."
)
app.add_typer(schedule, name="schedule")

EVERYWHERE = frozenset(f.name for f in dataclasses.fields(Scheduler)) - {"units"}


@schedule.command("list")
def list_() -> None:
    """
    List the schedules and their fields: OLMo-core's and those of this package.

    [bold]Example:[/bold] olmo-optim schedule list
    """
    table = Table("type", "from", "fields with their defaults", show_lines=True)
    for name in Scheduler.get_registered_names():
        cls = Scheduler.get_registered_class(name)
        package = cls.__module__.partition(".")[0]
        fields = [
            f.name + ("" if f.default is dataclasses.MISSING else f": {_yaml(f.default)}")
            for f in dataclasses.fields(cls)
            if f.init and f.name not in EVERYWHERE and not f.name.startswith("_")
            # Old names of OLMo-core's for fields that are there, too.
            if not f.name.endswith("_steps")
        ]
        table.add_row(name, package, ", ".join(fields))
    console.print(table)


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@schedule.command()
def plot(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=CONFIG_HELP
    ),
    output: Path = typer.Option(Path("schedule.png"), "--output", help="The picture, a .png."),
) -> None:
    """
    Draw what a run would do in each step, without running it: the learning rate with the stages'
    scales, and weight decay and momentum if they are scheduled.

    [bold]Examples:[/bold]

    olmo-optim schedule plot configs/quickstart.yaml

    olmo-optim schedule plot 'scheduler={type: cyclic, up_fraction: 0.1}' --output cyclic.png
    """
    check_picture(output)
    spec = load(arguments)
    spec.check()
    curves = scheduled_values(spec, load_tokenizer(spec.tokenizer).config.vocab_size)
    plans = plan_stages(spec)
    names = dict.fromkeys(str(plan.optimizer["name"]) for plan in plans)
    draw_schedule(curves, plans, f"{spec.name} ({', then '.join(names)})", output)
    console.print(schedule_table(curves))
    console.print(f"Drawn: {output}", highlight=False, soft_wrap=True)
