"""
Runs an experiment again and again in forks of this process, which are killed at given moments; as
a script, so that what is expensive to import is imported once and no thread has been started.

Usage: ``run_worker.py SPEC MOMENT...``, where a moment is

- ``LINES+SECONDS``: so long after ``metrics.jsonl`` has so many lines;
- ``Class.method:N``: right after the N-th call of a method of :data:`CLASSES`;
- ``Class.method:N:SIGTERM``: the same, with this signal instead of SIGKILL.

A last run goes to the end. Prints one exit code a run: 0, 1, 2, or -9 for a killed one.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch
from olmo_core.train import Trainer
from olmo_core.train.checkpoint import Checkpointer
from rich.console import Console

from mixture_pretraining_stages import launch
from mixture_pretraining_stages.callbacks import StageCheckpointer
from mixture_pretraining_stages.training import load_spec
from olmo_optim_ext import ScheduleFree

CLASSES = {cls.__name__: cls for cls in (Checkpointer, ScheduleFree, StageCheckpointer, Trainer)}


def die_after(moment: str) -> None:
    place, count, *rest = moment.split(":")
    number = getattr(signal, rest[0] if rest else "SIGKILL")
    owner, _, name = place.partition(".")
    original = getattr(CLASSES[owner], name)
    calls = 0

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        nonlocal calls
        result = original(*args, **kwargs)
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), number)
        return result

    setattr(CLASSES[owner], name, wrapper)


def run_once(path: Path, moment: str) -> int:
    spec = load_spec(path)
    child = os.fork()
    if child == 0:
        if ":" in moment:
            die_after(moment)
        with open(os.devnull, "w") as nothing:
            code = launch.run(spec, Console(file=nothing), "olmo-optim")
        os._exit(code)
    if "+" in moment:
        return wait_or_kill(child, moment, Path(spec.output) / "metrics.jsonl")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_or_kill(child: int, moment: str, metrics: Path) -> int:
    lines, seconds = moment.split("+")
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= int(lines):
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in [*sys.argv[2:], ""]:
        print(run_once(Path(sys.argv[1]), each), flush=True)
