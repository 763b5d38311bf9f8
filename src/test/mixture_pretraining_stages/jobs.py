"""
Jobs for tests: one with a script in place of a run, and a run on this machine that is preempted.
"""

import io
import os
import pickle
import signal
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from mixture_pretraining_stages.submission import Job

from .spec import write_spec


@dataclass
class ScriptJob(Job):
    """``arguments`` are a script and what it gets."""

    def command(self) -> List[str]:
        return [sys.executable, "-c", *self.arguments]


def run_preempted(spec: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """
    Submit a run to submitit's local executor and preempt it after some steps.

    :returns: What it has printed, when it has ended.
    """
    from olmo_optim_ext.cli import main  # a job does not need it

    output = Path(spec["output"])
    path = write_spec(output.with_suffix(".yaml"), spec)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["olmo-optim", "submit", str(path), "--executor", "local"])
    with redirect_stdout(io.StringIO()) as said:
        assert main() == 0
    path.write_text("name: another")  # what is submitted does not change
    controller = int(said.getvalue().split()[-1])
    metrics, logs = output / "metrics.jsonl", output / "slurm"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 4)
    task = Path(f"/proc/{controller}/task/{controller}/children").read_text()
    os.kill(int(task), signal.SIGUSR2)  # as the executor does shortly before the time is over
    result = logs / f"{controller}_0_result.pkl"
    wait_for(result.exists)
    log = (logs / f"{controller}_0_log.out").read_text()
    assert pickle.loads(result.read_bytes()) == ("success", None), log
    return log


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it has not come to pass in two minutes"
        time.sleep(0.02)
