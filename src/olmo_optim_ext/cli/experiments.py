"""
One experiment: ``olmo-optim roles`` and ``pretrain``.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import List, Optional

import typer
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages import launch
from mixture_pretraining_stages.tokenizers import load_tokenizer

from ..catalog import closest
from ..role_table import role_table, to_json, to_text
from .app import CONFIG_HELP, app, console, load, load_with_flags
from .flags import Flags, takes_flags


@app.command()
def roles(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=CONFIG_HELP
    ),
    stage: Optional[str] = typer.Option(
        None, help="Whose optimizer; that of the first stage if left out."
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """
    Print which rule each parameter follows, without training. On one rank: how several ranks share
    the matrices stands in a run's roles.txt.

    [bold]Example:[/bold] olmo-optim roles configs/quickstart.yaml optimizer.muon_on_lm_head=true
    """
    spec = load(arguments)
    spec.check()
    of_stage = spec.stages[0]
    if stage is not None:
        names = [each.name for each in spec.stages]
        if stage not in names:
            raise OLMoConfigurationError(
                f"--stage: {stage!r} is not allowed, allowed are {closest(stage, names)}"
            )
        of_stage = spec.stages[names.index(stage)]
    vocab_size = load_tokenizer(spec.tokenizer).config.vocab_size
    model, optim = spec.build_on_meta(vocab_size, of_stage)
    rows = role_table(model, spec.optimizer_config(of_stage), optim)
    sys.stdout.write(to_json(rows) + "\n" if json else to_text(rows))


@app.command()
@takes_flags
def pretrain(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=CONFIG_HELP
    ),
    nproc: int = typer.Option(
        1, "--nproc", "--ngpus", min=1, help="Ranks to start on this machine."
    ),
    *,
    flags: Flags,
) -> None:
    """
    Run an experiment, or continue it: the same command again resumes from the last whole
    checkpoint.

    [bold]Examples:[/bold]

    olmo-optim pretrain

    olmo-optim pretrain configs/quickstart.yaml optimizer.name=adamw output=runs/adamw

    olmo-optim pretrain --orthonoise --alpha 1e-2 --anneal --steps 500 --seed 1 --name noise-1

    olmo-optim pretrain my.yaml --nproc 2

    torchrun --nproc-per-node 8 -m mixture_pretraining_stages pretrain my.yaml
    """
    spec, notes = load_with_flags(arguments, flags)
    command = ["pretrain", *(arguments or []), *flags.arguments()]
    if nproc > 1 and not launch.launched_by_torchrun():
        spec.check(nproc)  # before ranks start: one message instead of one a rank
        # torchrun would take --nproc for an abbreviation of an option of its own.
        ranks = [*command, "--ngpus", str(nproc)]
        raise typer.Exit(launch.start_ranks(nproc, ranks, Path(spec.output)))
    if nproc > 1:
        command += ["--nproc", str(nproc)]
    if int(os.environ.get("RANK", "0")) == 0:
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    start = "torchrun ..." if nproc == 1 and launch.launched_by_torchrun() else "olmo-optim"
    raise typer.Exit(launch.run(spec, console, f"{start} {shlex.join(command)}"))
