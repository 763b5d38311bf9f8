"""
Many experiments: ``olmo-optim compare``.
"""

import os
from typing import TYPE_CHECKING, List, Optional

import torch
import typer

from mixture_pretraining_stages.comparing.comparison import Comparison, check_arms, plan_comparison
from mixture_pretraining_stages.comparing.folder import claim_folder, results
from mixture_pretraining_stages.extras import require
from mixture_pretraining_stages.reporting.report import write_report
from mixture_pretraining_stages.stages import Run

from .app import CONFIG_HELP, app, console, errors, load
from .compare_view import ENDED, View
from .report import show

if TYPE_CHECKING:
    from mixture_pretraining_stages.comparing.workers import Crew


@app.command()
def compare(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=CONFIG_HELP
    ),
    optimizers: Optional[str] = typer.Option(
        None,
        metavar="NAME,...",
        help="Names of `olmo-optim list`, or arms of the config's comparison; all its arms if "
        "left out. AdamW is added if there is no baseline.",
    ),
    lrs: Optional[int] = typer.Option(
        None, min=1, help="Learning rates of each: its own, times and over powers of 2. Default 5."
    ),
    seeds: Optional[int] = typer.Option(None, min=1, help="Seeds of each rate. Default 3."),
    tune: bool = typer.Option(
        False,
        "--tune",
        help="As many runs, but Optuna samples the rates (TPE, and runs above the median end "
        "early), and the best gets the other seeds.",
    ),
    storage: Optional[str] = typer.Option(
        None,
        metavar="URL",
        help="A database that machines share, as Optuna takes it; SQLite in the output folder if "
        "left out.",
    ),
    jobs: Optional[int] = typer.Option(
        None, min=1, help="Runs at a time; as many as there are cores, or GPUs, if left out."
    ),
    nproc: int = typer.Option(1, "--nproc", "--ngpus", min=1, help="Ranks of each run."),
    retry_failed: bool = typer.Option(False, "--retry-failed", help="Make failed runs again."),
) -> None:
    """
    Compare optimizers, each with as many runs of the same length. The same command again continues,
    and several of them, also on machines that share the output folder, divide the work.

    [bold]Examples:[/bold]

    olmo-optim compare configs/quickstart.yaml --optimizers adamw,muon,soap --lrs 5 --seeds 3

    olmo-optim compare my.yaml --storage postgresql://user@host/name --jobs 4
    """
    require("compare", "optuna", "plotly", "scipy")
    names = None if optimizers is None else [name.strip() for name in optimizers.split(",")]
    comparison = plan_comparison(load(arguments), optimizers=names, lrs=lrs, seeds=seeds, tune=tune)
    check_arms(comparison, nproc)
    Run(comparison.specs[comparison.baseline], console).prepare_data()
    crew = _crew(comparison, storage, jobs, nproc, retry_failed)
    console.print(
        f"{comparison.name}: {len(comparison.arms)} arms with {comparison.budget} runs each, "
        f"{len(crew.places)} at a time, in {comparison.folder}",
        highlight=False,
        soft_wrap=True,
    )
    from mixture_pretraining_stages.comparing.study import storage_failure

    try:
        with View(comparison, crew, console) as view:
            crew.work(view.show)
    except Exception as error:
        if (said := storage_failure(error)) is None:
            raise
        _say(f"The storage failed: {said}. Runs were saved; the same command continues.")
        raise typer.Exit(1) from None
    finally:
        crew.queue.worker.close()
    raise typer.Exit(_conclude(comparison, crew))


def _crew(
    comparison: Comparison,
    storage: Optional[str],
    jobs: Optional[int],
    nproc: int,
    retry_failed: bool,
) -> "Crew":
    from mixture_pretraining_stages.comparing.alive import Worker
    from mixture_pretraining_stages.comparing.study import Queue, open_storage
    from mixture_pretraining_stages.comparing.workers import Crew, places

    identifier = claim_folder(comparison)
    database = open_storage(storage, comparison.folder)
    queue = Queue(comparison, identifier, database, Worker(comparison.folder), retry_failed)
    runs = comparison.budget * len(comparison.arms)
    return Crew(queue, places(jobs, nproc, _cores(), _gpus(), runs), nproc)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _gpus() -> List[str]:
    """Those that this process may use."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


def _conclude(comparison: Comparison, crew: "Crew") -> int:
    states = [state.value for arm in crew.queue.slots.values() for state in arm.values()]
    if not crew.queue.finished:
        ended = sum(state in ENDED for state in states)
        _say(f"Interrupted; {ended} of {len(states)} runs are done. The same command continues.")
        return 1
    show(write_report([comparison.folder]))
    for each in results(comparison):
        if each.state == "failed":
            _say(f"{each.run.label}: {each.error}")
    if failed := states.count("failed"):
        _say(f"Failed runs: {failed}. --retry-failed makes them again.")
    return 1 if failed else 0


def _say(text: str) -> None:
    errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
