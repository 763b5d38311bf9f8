"""
Runs an experiment again and again in forks of this process, which are killed at given moments; as
a script, so that what is expensive to import is imported once and no thread has been started.

Usage: ``run_worker.py SPEC MOMENT...``, where a moment is

- ``LINES+SECONDS``: so long after ``metrics.jsonl`` has so many lines;
- ``Class.method:N``: right after the N-th call of a method of :data:`PLACES`, or of a function of
  a module;
- ``Class.method:N:SIGTERM``: the same, with this signal instead of SIGKILL.

A last run goes to the end. Prints one exit code a run: 0, 1, 2, or -9 for a killed one. With
``NPROC`` in the environment each run has so many ranks, and what is killed is all of them.
"""

import functools
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import List

import torch
from olmo_core.train import Trainer
from olmo_core.train.checkpoint import Checkpointer
from rich.console import Console

from mixture_pretraining_stages import handover, launch
from mixture_pretraining_stages.callbacks import StageCheckpointer
from mixture_pretraining_stages.reading import load_spec
from olmo_optim_ext import ScheduleFree

PLACES = {
    **{cls.__name__: cls for cls in (Checkpointer, ScheduleFree, StageCheckpointer, Trainer)},
    "handover": handover,
}
NPROC = int(os.environ.get("NPROC", "1"))


def die_after(moment: str) -> None:
    place, count, *rest = moment.split(":")
    number = getattr(signal, rest[0] if rest else "SIGKILL")
    owner, _, name = place.partition(".")
    original = getattr(PLACES[owner], name)
    calls = 0

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        nonlocal calls
        result = original(*args, **kwargs)
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), number)
        return result

    setattr(PLACES[owner], name, wrapper)


def run_once(path: Path, moment: str) -> int:
    spec = load_spec(path)
    port = free_port() if NPROC > 1 else 0
    children = []
    for rank in range(NPROC):
        children.append(os.fork())
        if children[-1] == 0:
            if NPROC > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(NPROC),
                    LOCAL_WORLD_SIZE=str(NPROC),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            if ":" in moment:
                die_after(moment)
            with open(os.devnull, "w") as nothing:
                code = launch.run(spec, Console(file=nothing), "olmo-optim")
            os._exit(code)
    if "+" in moment:
        return wait_or_kill(children, moment, Path(spec.output) / "metrics.jsonl")
    return min(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_or_kill(children: List[int], moment: str, metrics: Path) -> int:
    lines, seconds = moment.split("+")
    while True:
        ended, status = os.waitpid(children[0], os.WNOHANG)
        if ended:
            codes = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children[1:]]
            return min(os.waitstatus_to_exitcode(status), *codes, 0)
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= int(lines):
            time.sleep(float(seconds))
            for child in children:
                os.kill(child, signal.SIGKILL)
            return min(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
        time.sleep(0.002)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in [*sys.argv[2:], ""]:
        print(run_once(Path(sys.argv[1]), each), flush=True)
