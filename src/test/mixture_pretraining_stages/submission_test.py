"""
A run as a job: which signal saves it, which one requeues it, and what counts as a failure.
"""

import os
import pickle
import signal
import subprocess
import time
from typing import Any, Callable

import pytest
import submitit
from submitit.core.utils import FailedJobError

from mixture_pretraining_stages.submission import Job, RunFailed, signal_delay

from .jobs import ScriptJob

# A run that gets a signal of its job, saves, and ends as an interrupted run does.
SAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.2)
    open(sys.argv[1], "a").write("saved ")
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
for name in sys.argv[2:]:
    os.kill(os.getppid(), getattr(signal, name))
time.sleep(60)
"""


@pytest.fixture
def in_a_job(monkeypatch):
    """As in a process that submitit has started; returns how to say on which node."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[7-8]")
    yield lambda node: monkeypatch.setenv("SLURM_NODEID", str(node))
    for number, handler in before.items():
        signal.signal(number, handler)


class Requeued(SystemExit):
    """What submitit's handler ends the process with."""


def requeue_like_submitit(job: Job) -> Callable[..., None]:
    def handle(*_: Any) -> None:
        assert isinstance(job.checkpoint().function, Job)
        raise Requeued

    return handle


def script_job(script: str, *arguments: str, **fields: Any) -> ScriptJob:
    fields = {"nodes": 1, "ranks": 1, "grace": 20, "linger": 0, **fields}
    return ScriptJob(arguments=[script, *arguments], **fields)


def test_the_signal_saves_the_run_before_the_job_is_requeued(in_a_job, tmp_path):
    in_a_job(0)
    job = script_job(SAVES, str(tmp_path / "log"), "SIGUSR2")
    signal.signal(signal.SIGUSR2, requeue_like_submitit(job))
    with pytest.raises(Requeued):
        job()
    assert (tmp_path / "log").read_text() == "saved "
    assert pickle.loads(pickle.dumps(job.checkpoint().function)).arguments == job.arguments


def test_a_preempted_job_saves_at_once_and_waits_for_the_signal_to_requeue(in_a_job, tmp_path):
    in_a_job(0)
    job = script_job(SAVES, str(tmp_path / "log"), "SIGTERM", linger=20)
    signal.signal(signal.SIGUSR2, requeue_like_submitit(job))
    later = f"until [ -e log ]; do sleep 0.05; done; sleep 0.3; kill -USR2 {os.getpid()}"
    with subprocess.Popen(["sh", "-c", later], cwd=tmp_path), pytest.raises(Requeued):
        job()
    assert (tmp_path / "log").read_text() == "saved "


def test_a_cancelled_job_saves_and_ends_as_a_failure(in_a_job, tmp_path):
    in_a_job(0)
    for number in ("SIGTERM", "SIGINT"):
        with pytest.raises(RunFailed, match="stopped by a signal"):
            script_job(SAVES, str(tmp_path / "log"), number)()
    assert (tmp_path / "log").read_text() == "saved saved "


def test_a_signal_to_all_processes_of_the_job_does_not_end_the_run(in_a_job, tmp_path):
    in_a_job(0)
    script = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"
    script_job(script)()


def test_no_other_node_fails_before_the_first_has_requeued_the_job(in_a_job, tmp_path):
    in_a_job(1)
    signal.signal(signal.SIGUSR2, lambda *_: None)  # submitit's does nothing there
    begin = time.monotonic()
    script_job(SAVES, str(tmp_path / "log"), "SIGUSR2", nodes=2, linger=1)()
    assert time.monotonic() - begin > 1
    assert (tmp_path / "log").read_text() == "saved "


def test_a_run_that_does_not_stop_is_killed_in_time(in_a_job, tmp_path):
    in_a_job(0)
    stubborn = SAVES.replace("sys.exit(1)", "pass")
    job = script_job(stubborn, str(tmp_path / "log"), "SIGUSR2", grace=0.5)
    signal.signal(signal.SIGUSR2, requeue_like_submitit(job))
    begin = time.monotonic()
    with pytest.raises(Requeued):
        job()
    assert time.monotonic() - begin < 10


def test_a_failure_fails_the_job_and_is_not_requeued(tmp_path):
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=1, signal_delay_s=1)
    arguments = ["pretrain", str(tmp_path / "nowhere.yaml")]
    job = executor.submit(Job(arguments=arguments, nodes=1, ranks=1, grace=1, linger=0))
    with pytest.raises(FailedJobError, match="exit code 2"):
        job.result()
    assert (job.stdout() or "").count("nowhere.yaml: No such file") + (
        (job.stderr() or "").count("nowhere.yaml: No such file")
    ) == 1


def test_each_node_starts_its_own_ranks_of_one_run(in_a_job):
    def command(**fields: Any) -> str:
        job = Job(**{"arguments": ["pretrain", "a.yaml"], "grace": 1, "linger": 0, **fields})
        return " ".join(job.command()[1:])

    in_a_job(1)
    pretrain = "-m mixture_pretraining_stages pretrain a.yaml"
    assert command(nodes=1, ranks=1) == pretrain
    assert command(nodes=1, ranks=8) == f"{pretrain} --ngpus 8"
    many = command(nodes=2, ranks=8)
    assert many.startswith("-m torch.distributed.run --nnodes 2 --nproc-per-node 8 --node-rank 1 ")
    assert "--master-addr gpu7 --master-port 23456 " in many
    assert many.endswith(pretrain)


def test_a_short_job_gets_its_signal_in_time():
    assert signal_delay(1440) == 600
    assert signal_delay(8) == 120
