"""
Starting a run in this process, or in one process a rank.
"""

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterator, List, NoReturn, Optional, Sequence, TextIO

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import init_distributed, is_distributed
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.utils import filter_warnings
from rich.console import Console
from torch.distributed.checkpoint.api import CheckpointException

from .stages import Interrupted, Run
from .training import JolmoModel

__all__ = ["launched_by_torchrun", "leave", "patience", "run", "start_ranks", "supervise"]

log = logging.getLogger(__name__)

EXIT_CODES = "OLMO_OPTIM_EXIT_CODES"
"""Environment variable: a folder where each rank leaves its exit code."""


def launched_by_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_ranks(nproc: int, arguments: Sequence[str], output: Path) -> int:
    """
    Run this command on ``nproc`` ranks of this machine, under torchrun.

    What torchrun itself says goes to ``torchrun.log`` in the output folder.

    :returns: The exit code of :func:`run` on rank 0.
    """
    threads = max(1, (os.cpu_count() or 1) // nproc)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(nproc), *patience()),
        *("-m", "mixture_pretraining_stages", *arguments),
    ]
    with tempfile.TemporaryDirectory() as scratch, _open_log(output / "torchrun.log") as errors:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, EXIT_CODES: scratch}
        # A session of its own, so that Ctrl-C reaches the ranks once, and through torchrun.
        child = subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)
        before = {
            number: signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        codes = {path.name: int(path.read_text()) for path in Path(scratch).iterdir()}
    if code == 0 or "0" in codes:
        return codes.get("0", 0)
    print(f"The run failed on a rank. Details are in the logs in {output}.")
    return max(codes.values(), default=1)


def patience() -> List[str]:
    """Options that give ranks time to save when they are asked to stop; torch 2.10 has none."""
    from torch.distributed.run import get_args_parser

    option = "--shutdown-timeout"
    known = any(option in action.option_strings for action in get_args_parser()._actions)
    return [option, "1800"] if known else []


def _open_log(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise OLMoConfigurationError(
            f"output: {path.parent} cannot be written ({error.strerror}), allowed is a folder that "
            "can"
        ) from None


def leave(code: int) -> NoReturn:
    """End a rank. Its threads of gloo's may abort the interpreter's own shutdown."""
    if folder := os.environ.get(EXIT_CODES):
        (Path(folder) / os.environ["RANK"]).write_text(str(code))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(spec: JolmoModel, console: Console, command: str) -> int:
    """
    Run an experiment to its end.

    :param command: What the user typed, to tell how to resume.

    :returns: The exit code: 0, 1 if the run failed or was interrupted, 2 for bad input.
    """

    def work() -> None:
        Run(spec, console).execute()

    return supervise(spec, console, work, f"Resume with: {command}")


def supervise(
    spec: JolmoModel,
    console: Console,
    work: Callable[[], Optional[int]],
    again: str,
    log_name: str = "train",
) -> int:
    """
    Do some work on all ranks, with OLMo-core's log in the output folder, and turn what goes wrong
    into one paragraph and an exit code.

    :param work: Returns an exit code; ``None`` is 0.
    :param again: What to tell the user to type after a failure.
    :param log_name: Of the log file, without its suffix.

    :returns: The exit code: 0, 1 if the work failed or was interrupted, 2 for bad input.
    """
    # Until the trainer takes the signals over, there is nothing to save.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _log_to_file(Path(spec.output), log_name):
            _start_process_group()
            return work() or 0
    except OLMoConfigurationError as error:
        return _fail(console, str(error), 2)
    except Interrupted as interruption:
        return _fail(console, f"{interruption}. {again}", 1)
    except KeyboardInterrupt:
        return _fail(console, f"Interrupted; nothing was lost. {again}", 1)
    except (Exception, CheckpointException) as error:  # DCP's is not an Exception
        return _fail(console, f"{_explain(error, spec, log_name)} {again}", 1)
    finally:
        if is_distributed():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, handler)


def _start_process_group() -> None:
    if launched_by_torchrun():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        init_distributed(backend=backend, timeout=timedelta(minutes=30), shared_filesytem=True)


@contextmanager
def _log_to_file(output: Path, log_name: str) -> Iterator[None]:
    """The console is for the run; what OLMo-core logs is for when something went wrong."""
    rank = int(os.environ.get("RANK", "0"))
    name = f"{log_name}.log" if rank == 0 else f"{log_name}.rank{rank}.log"
    handler = logging.StreamHandler(_open_log(output / name))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level, raises = root.level, logging.raiseExceptions
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk is told once, by run()
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            filter_warnings()
            yield
    except BaseException:
        log.error(traceback.format_exc())
        raise
    finally:
        logging.captureWarnings(False)
        logging.raiseExceptions = raises
        root.setLevel(level)
        root.removeHandler(handler)
        handler.stream.close()


def _explain(error: BaseException, spec: JolmoModel, log_name: str) -> str:
    # OLMo-core and DCP wrap the error of a writer's thread as text.
    if os.strerror(errno.ENOSPC) in "".join(traceback.format_exception(error)):
        return (
            f"The run failed: no space left on the disk of {spec.output}. Whole checkpoints are "
            "intact. Free some space, or set checkpoint.keep=1."
        )
    reason = str(error).strip().splitlines()
    return (
        f"The run failed: {type(error).__name__}: {reason[0] if reason else 'no message'}. Details "
        f"are in {Path(spec.output) / f'{log_name}.log'}; whole checkpoints are intact."
    )


def _fail(console: Console, message: str, code: int) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        # Not wrapped, so that the command can be copied.
        console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    return code
