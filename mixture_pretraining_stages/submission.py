"""
A run as a job of SLURM, by submitit: what each node of the job does, and when the job is requeued.

Imports neither torch nor OLMo-core, since submitit imports it in a process of its own on each node.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Sequence

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from .processes import kill_tree

__all__ = ["REQUEUES", "Job", "RunFailed", "signal_delay"]

REQUEUES = 100
"""How often a job may be requeued at its time limit, in case it is too short to get anywhere."""

MARGIN = 30
"""Seconds of the time between signal and kill that are left for requeuing."""

REQUEUING = 60
"""
Seconds that the first node may take to requeue the job. A task that fails before may end the job.
"""


class RunFailed(Exception):
    """The run ended with an error, or was stopped for good."""


def signal_delay(minutes: int) -> int:
    """
    How many seconds before the end of a job its processes get the signal to save themselves: ten
    minutes, as a checkpoint of some hundred GB and the step before it take minutes, but at most a
    quarter of the job.

    :param minutes: The time limit of the job.
    """
    return min(600, minutes * 60 // 4)


@dataclass
class Job:
    """
    What submitit calls on each node: runs ``arguments`` of the command line in a child process, for
    the ranks of the node.

    On submitit's signal (SIGUSR2) the child saves and ends, and the job is requeued by submitit. On
    SIGTERM the child saves and ends as well, but whether the job starts again is up to SLURM: it
    sends this to jobs that are cancelled and, as a rule, to those that are preempted.

    :raises RunFailed: If the child fails.
    """

    arguments: Sequence[str]
    """Of the command line."""
    nodes: int
    ranks: int
    """On each node."""
    grace: float
    """Seconds that the child has to save."""
    linger: float
    """
    Seconds to wait, after a SIGTERM and saving, for whoever sent it: SLURM requeues a preempted job
    only if it is still there at the end.
    """

    _child: Optional["subprocess.Popen[bytes]"] = field(default=None, init=False, repr=False)
    _stopped: bool = field(default=False, init=False, repr=False)

    def __call__(self) -> None:
        node = JobEnvironment().node
        command = self.command()
        print(shlex.join(command), flush=True)
        preempted = _preemption_signal()
        for number in (signal.SIGTERM, signal.SIGINT, preempted):
            self._stop_child_on(number)
        # The child and its ranks inherit the mask: a signal that SLURM sends to all processes of
        # the job, and not only to this one, would end them before they have saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, {preempted})
        try:
            # A session of its own, so that nothing else that is meant for this process reaches it.
            self._child = subprocess.Popen(command, env=self._environment(), start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {preempted})
        if self._stopped:  # before there was a child
            self._child.terminate()
        code = self._child.wait()
        if code == 0:
            return
        if self._stopped:
            time.sleep(self.linger)
            if node > 0:
                return
            raise RunFailed("The run was stopped by a signal. Submit it again to continue it.")
        if node > 0:
            # Only the first may have got the signal; the ranks here have stopped with the others.
            time.sleep(REQUEUING)
        raise RunFailed(f"The run ended with exit code {code}; its output tells why.")

    def checkpoint(self, *arguments: Any, **options: Any) -> DelayedSubmission:
        """Called by submitit in its handler of the signal, on the first node."""
        if self._child is not None:
            self._child.terminate()
            # Not wait(), which this has interrupted and which holds a lock.
            deadline = time.monotonic() + self.grace
            while not _has_ended(self._child.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not _has_ended(self._child.pid):
                print(f"No checkpoint within {self.grace:.0f} s: the run is killed.", flush=True)
                kill_tree(self._child.pid)
        return DelayedSubmission(replace(self), *arguments, **options)

    __submitit_checkpoint__ = checkpoint  # its name in later versions of submitit

    def command(self) -> List[str]:
        """What this node runs."""
        module = ["-m", "mixture_pretraining_stages", *self.arguments]
        if self.nodes == 1:
            ranks = [] if self.ranks == 1 else ["--ngpus", str(self.ranks)]
            return [sys.executable, *module, *ranks]
        from .launch import patience

        env = JobEnvironment()
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.nodes)),
            *("--nproc-per-node", str(self.ranks), "--node-rank", str(env.node)),
            *("--master-addr", env.hostnames[0], "--master-port", _port(env), *patience()),
            *module,
        ]

    def _environment(self) -> Dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.ranks)
        return {"OMP_NUM_THREADS": str(threads), **os.environ}

    def _stop_child_on(self, number: int) -> None:
        """Let a signal stop the child; what handled it before has its turn after that."""
        before = signal.getsignal(number)

        def handle(signum: int, frame: Any) -> None:
            self._stopped = True
            if self._child is not None:
                self._child.terminate()
            # submitit's; Python's own for SIGINT would raise while the child saves.
            if callable(before) and before is not signal.default_int_handler:
                before(signum, frame)

        signal.signal(number, handle)


def _preemption_signal() -> int:
    return getattr(signal, f"SIG{JobEnvironment.USR_SIG}")


def _port(env: JobEnvironment) -> str:
    """The same on all nodes, and another for another job."""
    return str(20_000 + int(env.raw_job_id) % 40_000)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, whoever waits for it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
