"""
The runs of a comparison on this machine: each in a process of its own, some at a time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from ..drafts import write_whole
from ..processes import kill_tree
from .comparison import RunPlan, validation_losses
from .folder import steps_of
from .study import Ended, Outcome, Queue

__all__ = ["Crew", "Metrics", "Place", "places"]

COMMAND = (sys.executable, "-m", "mixture_pretraining_stages.comparing.child")

POLL = 0.2
"""Seconds between looks at a run."""

REFRESH = 2.0
"""Seconds between looks at the queue."""

TURNS = 5
"""How often a run may find its folder taken although it was free a moment ago."""


class Place(NamedTuple):
    """Where a run may run: what it finds in its environment."""

    environment: Dict[str, str]


def places(jobs: Optional[int], nproc: int, cores: int, gpus: List[str], runs: int) -> List[Place]:
    """
    Where runs can run at a time. On CPU there is one for each core, as one thread each does more in
    all than several threads on each of fewer small models; on GPUs one for each ``nproc`` of them.

    :param jobs: How many there shall be, if not as many as that and no more than ``runs``.
    :param nproc: Ranks of a run.
    :param gpus: As in ``CUDA_VISIBLE_DEVICES``.
    """
    groups = [gpus[i : i + nproc] for i in range(0, len(gpus) - nproc + 1, nproc)]
    count = jobs or max(1, min(runs, len(groups) if gpus else cores // nproc))
    threads = str(max(1, cores // (count * nproc)))
    found = []
    for index in range(count):
        environment = {"OMP_NUM_THREADS": threads}
        if groups:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(groups[index % len(groups)])
        found.append(Place(environment))
    return found


@dataclass
class Crew:
    """
    Takes runs from a queue until all are done, as many at a time as there are places.

    :param nproc: Ranks of a run.
    :param command: Starts a run; its arguments follow.
    """

    queue: Queue
    places: List[Place]
    nproc: int = 1
    command: Tuple[str, ...] = field(default_factory=lambda: COMMAND)
    running: Dict[str, float] = field(default_factory=dict)
    """Runs under way here, and which part of each is done."""
    stopping: Event = field(default_factory=Event)
    killing: Event = field(default_factory=Event)

    def work(self, show: Callable[[], None]) -> None:
        """
        Work until nothing is left or a signal came, which asks the runs to save themselves; a
        second one kills them.

        :param show: Called now and then.
        """
        with self._signals(), ThreadPoolExecutor(len(self.places)) as pool:
            served: List["Future[None]"] = []
            try:
                self.queue.refresh()
                show()  # what had ended before
                served += [pool.submit(self._serve, place) for place in self.places]
                while not all(each.done() for each in served):
                    if any(each.done() and each.exception() for each in served):
                        self.stopping.set()
                    self.queue.refresh()
                    show()
                    time.sleep(POLL if self.stopping.is_set() else REFRESH)
            finally:
                self.stopping.set()
        for each in served:
            each.result()
        self.queue.refresh()
        show()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(*_: Any) -> None:
            (self.killing if self.stopping.is_set() else self.stopping).set()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _serve(self, place: Place) -> None:
        def execute(run: RunPlan, observe: Callable[[int, float], bool]) -> Outcome:
            self.running[run.label] = 0.0
            try:
                return self._execute(run, place, observe)
            finally:
                self.running.pop(run.label, None)  # two samples may be the same rate

        while not self.stopping.is_set() and not self.queue.finished:
            if not self.queue.run_next(execute):
                self.stopping.wait(REFRESH)

    def _execute(
        self, run: RunPlan, place: Place, observe: Callable[[int, float], bool]
    ) -> Outcome:
        spec = _write_spec(run)
        for turn in range(1, TURNS + 1):
            if not self._wait_until_free(run.folder):
                return Outcome(Ended.stopped)
            log = run.folder / "output.log"
            begin = log.stat().st_size if log.exists() else 0
            code, asked = self._train(run, spec, log, place, observe)
            said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
            last = said[-1] if said else ""
            if code == 0:
                return Outcome(Ended.complete)
            if asked is not None:
                return Outcome(asked)
            if code < 0 or last.startswith("Interrupted"):
                reason = f"by signal {-code}" if code < 0 else "by a signal"
                return Outcome(Ended.killed, f"it was stopped {reason}, not by the comparison")
            if "another process is running" not in last or turn == TURNS:
                break
        return Outcome(Ended.failed, last.partition(" Resume with:")[0] or f"exit {code}")

    def _wait_until_free(self, folder: Path) -> bool:
        # A run whose comparison was killed needs a moment to save itself.
        lock = FileLock(folder / ".lock")
        while not self.stopping.is_set():
            try:
                with lock.acquire(blocking=False):
                    return True
            except Timeout:
                time.sleep(POLL)
        return False

    def _train(
        self,
        run: RunPlan,
        spec: Path,
        log: Path,
        place: Place,
        observe: Callable[[int, float], bool],
    ) -> Tuple[int, Optional[Ended]]:
        """The exit code, and why the run was asked to end, if it was."""
        command = [*self.command, "pretrain", str(spec)]
        if self.nproc > 1:
            command += ["--nproc", str(self.nproc)]
        environment = {**place.environment, "COLUMNS": "200", **os.environ}
        if (gpus := place.environment.get("CUDA_VISIBLE_DEVICES")) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        metrics = Metrics(run)
        with open(log, "ab") as output:
            # A session of its own, so that Ctrl-C reaches it once, and through this process.
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        asked: Optional[Ended] = None
        try:
            while child.poll() is None:
                time.sleep(POLL)
                losses = metrics.read()
                self.running[run.label] = metrics.step / steps_of(run)
                unwanted = any([observe(step, loss) for step, loss in losses])
                if asked is None and (unwanted or self.stopping.is_set()):
                    asked = Ended.stopped if self.stopping.is_set() else Ended.pruned
                    child.terminate()
                if self.killing.is_set():
                    kill_tree(child.pid)
            for step, loss in metrics.read():
                observe(step, loss)
        finally:
            child.terminate()  # nothing happens to one that has ended
            while child.poll() is None:
                if self.killing.is_set():
                    kill_tree(child.pid)
                time.sleep(POLL)
            assert child.stdin is not None
            child.stdin.close()
        return child.returncode, asked


def _write_spec(run: RunPlan) -> Path:
    path = run.folder / "spec.yaml"
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(run.spec.as_plain())))
    return path


class Metrics:
    """Reads what a run adds to its metrics; from the start again when it has dropped some."""

    def __init__(self, run: RunPlan):
        self.path = run.folder / "metrics.jsonl"
        self.sources = list(run.spec.sources)
        self.step = 0
        self._file = 0
        self._offset = 0
        self._rows: Dict[int, Dict[str, Any]] = {}
        self._known: Dict[int, float] = {}

    def read(self) -> List[Tuple[int, float]]:
        """``(step, validation loss)`` of each evaluation that was not there before."""
        for row in self._new_rows():
            self.step = row["step"]
            evaluated = {key: value for key, value in row.items() if key.startswith("eval/")}
            if evaluated:
                self._rows.setdefault(self.step, {"step": self.step}).update(evaluated)
        found = validation_losses(list(self._rows.values()), self.sources)
        fresh = [(step, loss) for step, loss in found if step not in self._known]
        self._known.update(fresh)
        return fresh

    def _new_rows(self) -> Iterator[Mapping[str, Any]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self._file or state.st_size < self._offset:
                self._file, self._offset = state.st_ino, 0
            file.seek(self._offset)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill, and written on
                continue
            if isinstance(row, dict) and "step" in row:
                yield row
