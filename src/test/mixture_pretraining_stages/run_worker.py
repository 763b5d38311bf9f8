"""
Runs an experiment again and again in forks of this process, which are killed at given moments; as
a script, so that what is expensive to import is imported once and no thread has been started.

Usage: ``run_worker.py SPEC MOMENT...``, where a moment is a number of seconds, or a call after
which the process dies: ``Class.method:N`` of :data:`CLASSES` and ``post_train`` for its N-th.
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

CLASSES = {cls.__name__: cls for cls in (Checkpointer, StageCheckpointer, Trainer)}


def die_after(moment: str) -> None:
    place, _, count = moment.partition(":")
    owner, _, name = place.partition(".")
    original = getattr(CLASSES[owner], name)
    calls = 0

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        nonlocal calls
        result = original(*args, **kwargs)
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(CLASSES[owner], name, wrapper)


def run_once(path: Path, moment: str) -> int:
    child = os.fork()
    if child == 0:
        if "." in moment and ":" in moment:
            die_after(moment)
        with open(os.devnull, "w") as nothing:
            code = launch.run(load_spec(path), Console(file=nothing), "olmo-optim")
        os._exit(code)
    if moment and ":" not in moment:
        time.sleep(float(moment))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in [*sys.argv[2:], ""]:
        print(run_once(Path(sys.argv[1]), each), flush=True)
