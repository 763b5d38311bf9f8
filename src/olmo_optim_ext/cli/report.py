"""
What runs have found: ``olmo-optim report``.
"""

from pathlib import Path
from typing import List, Optional

import typer
from rich.console import Console

from mixture_pretraining_stages.reporting.report import Report, write_report

from .app import app, console

__all__ = ["show"]


@app.command()
def report(
    runs: List[Path] = typer.Argument(
        metavar="RUNS...", help="Folders that `olmo-optim pretrain` or `compare` have written."
    ),
    output: Optional[Path] = typer.Option(
        None, help="A folder; `report` in RUNS if that is one, else here, if left out."
    ),
) -> None:
    """
    Compare runs: losses over seeds with intervals, what was claimed and what was not, time and
    memory, in one HTML page that opens offline, with a PNG of each figure beside it.

    [bold]Examples:[/bold]

    olmo-optim report runs/comparison

    olmo-optim report runs/muon runs/adamw --output runs/muon-and-adamw
    """
    with console.status("reading"):
        written = write_report(runs, output)
    show(written)


def show(written: Report) -> None:
    """Print what a report has found."""
    # A file has no width to which rows would have to be folded.
    wide = console if console.is_terminal else Console(width=200)
    wide.print(written.table(), highlight=False)
    for sentence in written.statement():
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(f"The report: {written.page}", highlight=False, markup=False, soft_wrap=True)
