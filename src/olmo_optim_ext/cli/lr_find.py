"""
Which learning rate to begin with: ``olmo-optim lr-find``.
"""

import shlex
from pathlib import Path
from typing import List, Optional

import typer
from olmo_core.distributed.utils import get_rank
from rich.table import Table

from mixture_pretraining_stages import launch
from mixture_pretraining_stages.lr_find import LRFind
from mixture_pretraining_stages.lr_find_report import FoundRates

from .app import CONFIG_HELP, app, console, load


@app.command("lr-find")
def lr_find(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=CONFIG_HELP
    ),
    min_lr: Optional[float] = typer.Option(
        None, help="The first rate; a thousandth of optimizer.lr if left out."
    ),
    max_lr: Optional[float] = typer.Option(
        None, help="The last rate; a thousand times optimizer.lr if left out."
    ),
    steps: int = typer.Option(100, min=20, help="Steps from the first to the last rate."),
    nproc: int = typer.Option(
        1, "--nproc", "--ngpus", min=1, help="Ranks to start on this machine."
    ),
) -> None:
    """
    Train the experiment's model with its optimizer, on data of its first stage and from its first
    weights, at a rate that grows until the loss diverges, and suggest a rate. Groups with a rate of
    their own, as of adamw_lr, keep their proportion.

    It leaves lr_find.json and lr_find.png in the output folder, and a run that is there as it is.
    The exit code is 1 if there is nothing to suggest.

    [bold]Examples:[/bold]

    olmo-optim lr-find configs/quickstart.yaml optimizer.name=adamw

    olmo-optim lr-find my.yaml --min-lr 1e-5 --max-lr 1 --steps 300 --nproc 2
    """
    spec = load(arguments)
    command = ["lr-find", *(arguments or []), "--steps", str(steps)]
    for option, value in (("--min-lr", min_lr), ("--max-lr", max_lr)):
        command += [] if value is None else [option, repr(value)]
    if nproc > 1 and not launch.launched_by_torchrun():
        spec.check(nproc)  # before ranks start: one message instead of one a rank
        # torchrun would take --nproc for an abbreviation of an option of its own.
        ranks = [*command, "--ngpus", str(nproc)]
        raise typer.Exit(launch.start_ranks(nproc, ranks, Path(spec.output)))

    def work() -> int:
        found = LRFind(spec, console, min_lr, max_lr, steps).execute()
        if get_rank() == 0:
            _print(found, arguments or [], Path(spec.output))
        return 0 if found.suggestion.lr is not None else 1

    if nproc > 1:
        command += ["--nproc", str(nproc)]
    start = "torchrun ..." if nproc == 1 and launch.launched_by_torchrun() else "olmo-optim"
    again = f"Try again with: {start} {shlex.join(command)}"
    raise typer.Exit(launch.supervise(spec, console, work, again, log_name="lr_find"))


def _print(found: FoundRates, arguments: List[str], output: Path) -> None:
    suggestion, last = found.suggestion, found.rates[-1] if found.rates else None
    table = Table("", "learning rate", box=None)
    table.add_row("suggestion", _rate(suggestion.lr))
    table.add_row("loss falls fastest at", _rate(suggestion.steepest))
    table.add_row("loss is lowest at", _rate(suggestion.minimum))
    if suggestion.minimum is not None:
        table.add_row("a tenth of that", _rate(suggestion.minimum / 10))
    not_yet = "-" if last is None else f"not up to {last:.2g}"
    at = suggestion.diverged_at
    table.add_row("loss diverged at", not_yet if at is None else _rate(at))
    console.print(table, highlight=False)
    lines = [] if found.note is None else [f"Note: {found.note}"]
    if suggestion.lr is None:
        lines.append(
            f"No suggestion: {suggestion.reason}. --min-lr, --max-lr and --steps set the range."
        )
    else:
        lines.append("It is an order of magnitude: try rates around it.")
        lines.append(f"Next: olmo-optim pretrain {shlex.join(_next(arguments, found.overrides))}")
    lines.append(f"In {output}: lr_find.json and lr_find.png.")
    for line in lines:
        # Not wrapped, so that the command can be copied.
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rate(rate: Optional[float]) -> str:
    return "-" if rate is None else f"{rate:.2g}"


def _next(arguments: List[str], overrides: List[str]) -> List[str]:
    """The arguments with the overrides, which replace those with their keys."""
    keys = {override.partition("=")[0] for override in overrides}
    kept = [each for each in arguments if each.partition("=")[0] not in keys]
    return [*kept, *overrides]
