"""
One experiment as a job of SLURM: ``olmo-optim submit``.
"""

import hashlib
import io
import shlex
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import typer
from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from omegaconf import OmegaConf

from mixture_pretraining_stages.drafts import write_whole
from mixture_pretraining_stages.extras import require
from mixture_pretraining_stages.sources import read_documents
from mixture_pretraining_stages.tokenizers import load_tokenizer
from mixture_pretraining_stages.training import JolmoModel

from .app import CONFIG_HELP, app, console, load_with_flags
from .flags import Flags, takes_flags

LINGER = 900
"""
Seconds that a job of SLURM waits for its end after a SIGTERM. What cancels or preempts it kills it
sooner, if the partition's GraceTime is not longer.
"""


class Executor(StrEnum):
    slurm = "slurm"
    local = "local"


@app.command()
@takes_flags
def submit(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=CONFIG_HELP
    ),
    nodes: int = typer.Option(1, min=1, help="Machines."),
    gpus_per_node: int = typer.Option(1, min=1, help="GPUs, and ranks, of each machine."),
    time: int = typer.Option(1440, min=1, help="Minutes until the job is requeued."),
    partition: Optional[str] = typer.Option(None, help="Of SLURM; its default if left out."),
    account: Optional[str] = typer.Option(None, help="Who pays."),
    qos: Optional[str] = typer.Option(None, help="Quality of service."),
    cpus_per_task: Optional[int] = typer.Option(None, min=1, help="CPUs of each machine."),
    mem: Optional[str] = typer.Option(None, help="Memory of each machine, such as 512G; 0 is all."),
    slurm: Optional[List[str]] = typer.Option(
        None,
        metavar="KEY=VALUE",
        help="Any other option of sbatch, or of submitit: setup, srun_args, signal_delay_s.",
    ),
    executor: Executor = typer.Option(
        Executor.slurm, help="local runs the job on this machine, to try it."
    ),
    folder: Optional[Path] = typer.Option(None, help="For logs; OUTPUT/slurm if left out."),
    *,
    flags: Flags,
) -> None:
    """
    Hand `olmo-optim pretrain` to SLURM, with the config as it is now. The job saves itself before
    its time is over or when it is preempted, and continues after it is requeued. Needs
    olmo-optim-ext[slurm].

    [bold]Examples:[/bold]

    olmo-optim submit configs/olmo2_7B.yaml --nodes 8 --gpus-per-node 8 --partition gpu

    olmo-optim submit my.yaml --mem 0 --slurm constraint=h100 --slurm setup="module load cuda"

    olmo-optim submit --executor local --steps 20
    """
    spec, notes = load_with_flags(arguments, flags)
    given = {
        "partition": partition,
        "account": account,
        "qos": qos,
        "cpus_per_task": cpus_per_task,
        "mem": mem,
    }
    options = {key: value for key, value in given.items() if value is not None}
    _check_executor(executor, nodes, [*options, *(["slurm"] if slurm else [])])
    options = {**options, **_parse(slurm or [])}
    _check(spec, nodes * gpus_per_node)
    folder = Path(spec.output) / "slurm" if folder is None else folder
    job = _send(spec, nodes, gpus_per_node, time, options, executor, folder)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    cancel = "kill" if executor == Executor.local else "scancel"
    for line in (
        f"{spec.name}: job {job.job_id}, {nodes} x {gpus_per_node} rank(s), {time} minutes a time",
        f"Logs: {job.paths.stdout} and {job.paths.stderr.name}",
        f"Cancel with: {cancel} {job.job_id}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_executor(executor: Executor, nodes: int, options: Sequence[str]) -> None:
    require("slurm", "submitit")
    if executor == Executor.local:
        if nodes > 1:
            raise OLMoConfigurationError(f"--nodes: {nodes} is not allowed, allowed is 1 if local")
        if options:
            flag = f"--{options[0].replace('_', '-')}"
            raise OLMoConfigurationError(f"{flag}: it is for SLURM, allowed is --executor slurm")
        return
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise OLMoConfigurationError(
                f"submit: there is no {program} on the PATH, allowed is a machine that submits to "
                "SLURM, or --executor local"
            )


def _check(spec: JolmoModel, world_size: int) -> None:
    """All that would fail a job before its first step and needs no time."""
    spec.check(world_size)
    vocab_size = load_tokenizer(spec.tokenizer).config.vocab_size
    for stage in spec.stages:
        spec.build_on_meta(vocab_size, stage)
    for name, source in spec.sources.items():
        try:
            read_documents(source)
        except OLMoConfigurationError as error:
            raise OLMoConfigurationError(f"sources.{name}.{error}") from None


OWN = {
    **{key: f"--{key.replace('_', '-')}" for key in ("nodes", "gpus_per_node", "time")},
    **{key: f"--{key.replace('_', '-')}" for key in ("partition", "account", "qos", "mem")},
    "cpus_per_task": "--cpus-per-task",
    "job_name": "name=NAME",
    "signal": "--slurm signal_delay_s=SECONDS",
    **{key: "--folder" for key in ("output", "error", "open_mode")},
    **{key: "one task a node" for key in ("ntasks", "ntasks_per_node", "array", "use_srun")},
    "requeue": "what it is, yes",
    "no_requeue": "none, as jobs are requeued",
}
"""Options of sbatch that are set otherwise, and how."""

LISTS = ("setup", "teardown", "srun_args")


def _parse(pairs: Sequence[str]) -> Dict[str, Any]:
    """Parameters of submitit's from ``KEY=VALUE``."""
    out: Dict[str, Any] = {}
    further: Dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if not separator or not key:
            raise OLMoConfigurationError(f"--slurm: {pair!r} is not allowed, allowed is key=value")
        if key in OWN:
            raise OLMoConfigurationError(f"--slurm {key}: it is not allowed, allowed is {OWN[key]}")
        if key in LISTS:
            parts = shlex.split(value) if key == "srun_args" else [value]
            out[key] = [*out.get(key, []), *parts]
        elif key == "signal_delay_s":
            if not value.isdecimal() or not 0 < int(value) <= 65535:
                raise OLMoConfigurationError(
                    f"--slurm signal_delay_s: {value!r} is not allowed, allowed is an integer from "
                    "1 to 65535"
                )
            out[key] = int(value)
        else:
            further[key] = True if value == "true" else value
    return {**out, "additional_parameters": further}


def _send(
    spec: JolmoModel,
    nodes: int,
    ranks: int,
    minutes: int,
    options: Dict[str, Any],
    executor: Executor,
    folder: Path,
) -> Any:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from mixture_pretraining_stages.submission import MARGIN, REQUEUES, Job, signal_delay

    delay = options.get("signal_delay_s", signal_delay(minutes))
    if delay >= 60 * minutes:
        raise OLMoConfigurationError(
            f"--slurm signal_delay_s: {delay} is not allowed, allowed is less than --time"
        )
    local = executor == Executor.local
    job = Job(
        arguments=["pretrain", str(_freeze(spec, folder))],
        nodes=nodes,
        ranks=ranks,
        grace=max(delay - MARGIN, delay / 2),
        linger=0 if local else LINGER,
    )
    if local:
        here = submitit.LocalExecutor(folder, max_num_timeout=REQUEUES)
        here.update_parameters(timeout_min=minutes, signal_delay_s=delay, gpus_per_node=ranks)
        return here.submit(job)
    cluster = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
    cluster.update_parameters(**_parameters(spec.name, nodes, ranks, minutes, delay, options))
    try:
        # The variables of a job in which this is typed would be those of the new one. submitit
        # prints what sbatch says, which is told below.
        with submitit.helpers.clean_env(), redirect_stderr(io.StringIO()):
            return cluster.submit(job)
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise OLMoConfigurationError(f"submit: sbatch refused the job: {reason}") from None


def _parameters(
    name: str, nodes: int, gpus: int, minutes: int, delay: int, options: Dict[str, Any]
) -> Dict[str, Any]:
    srun = options.get("srun_args", [])
    if (cpus := options.get("cpus_per_task")) is not None:
        srun = [f"--cpus-per-task={cpus}", *srun]  # since SLURM 22.05 srun does not inherit it
    return {
        **options,
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": gpus,
        "time": minutes,
        "signal_delay_s": delay,
        "srun_args": srun,
        "additional_parameters": {"requeue": True, **options["additional_parameters"]},
    }


def _freeze(spec: JolmoModel, folder: Path) -> Path:
    """The spec in a file of its own: the config may change while the job waits."""
    text = OmegaConf.to_yaml(OmegaConf.create(spec.as_plain()))
    path = folder / f"spec-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise OLMoConfigurationError(
            f"submit: {folder} cannot be written ({error.strerror}), allowed is a folder that can: "
            "--folder FOLDER"
        ) from None
    return path
