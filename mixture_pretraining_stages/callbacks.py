"""
Callbacks for OLMo-core's trainer: what a run shows and writes, and when it saves.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_rank, get_world_size, is_distributed
from olmo_core.train.callbacks import Callback, CheckpointerCallback, ConsoleLoggerCallback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .drafts import write_whole
from .evaluation import EVALUATOR
from .plans import StagePlan

__all__ = [
    "LOSS",
    "MetricsFile",
    "ProgressBar",
    "StageCheckpointer",
    "StopOnSignal",
    "read_metrics",
]

LOSS = "train/CE loss"
LEARNING_RATE = "optim/LR (group 0)"


@dataclass
class StageCheckpointer(CheckpointerCallback):
    """
    Saves after evaluation rather than before it, so that a run that resumes from a checkpoint has
    all metrics up to it.
    """

    priority: ClassVar[int] = -10

    def pre_train(self):
        super().pre_train()
        # Those of the run that this one continues count, too.
        known = self.checkpointer.find_checkpoints(self.save_folder) if get_rank() == 0 else []
        self._checkpoints = [path for _, path in sorted(known)]

    def post_train_batch(self):
        pass

    def post_step(self):
        super().post_train_batch()

    def post_train(self):
        super().post_train()
        self._remove_old_checkpoints()


@dataclass
class StopOnSignal(Callback):
    """
    Stops all ranks after the same step once any of them got SIGINT or SIGTERM.

    The trainer's own check is asynchronous, so that one rank may read its result a step later than
    another, and then waits for it for ever. This one costs an all-reduce of one number on the CPU.
    """

    def post_step(self):
        if self.asked():
            self.trainer.cancel_run("a signal asked to stop", no_sync=True)

    def asked(self) -> bool:
        """Whether any rank was asked to stop since the trainer started. All ranks call it."""
        # The trainer's signal handler has no other way to tell.
        here = self.trainer._canceling_rank is not None
        if not is_distributed():
            return here
        anywhere = torch.tensor(int(here))
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return bool(anywhere)


@dataclass
class MetricsFile(Callback):
    """
    Appends metrics to a file, one JSON object a line: ``step``, ``stage``, ``tokens`` and whatever
    was recorded. A step may have several lines.
    """

    path: Path = Path("metrics.jsonl")
    plan: Optional[StagePlan] = None

    def pre_train(self):
        if get_rank() == 0:
            keep_metrics(self.path, self.step)

    def log_metrics(self, step: int, metrics: Dict[str, float]):
        if get_rank() != 0:
            return
        assert self.plan is not None
        place = {"stage": self.plan.spec.name, "tokens": self.plan.tokens_at(step)}
        row = {"step": step, **place, **metrics}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> List[Dict[str, Any]]:
    """
    The metrics of a run, a dict for each step in order. A last line that was cut off by a kill is
    left out.
    """
    by_step: Dict[int, Dict[str, Any]] = {}
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or not {"step", "stage"} <= row.keys():
            continue
        if not isinstance(row["step"], int):  # of something else than a run
            continue
        # What is recorded between two stages is for the step, and the stage, that came before.
        merged = by_step.setdefault(row["step"], {"stage": row["stage"]})
        merged.update({key: value for key, value in row.items() if key != "stage"})
    return [by_step[step] for step in sorted(by_step)]


def keep_metrics(path: Path, last_step: int) -> None:
    """Drop the metrics of steps after ``last_step``, which will run again."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class ProgressBar(ConsoleLoggerCallback):
    """
    A progress bar with stage, loss, tokens per second, learning rate and time left; on a console
    that is no terminal, a line now and then. Replaces OLMo-core's console logger.
    """

    console: Console = field(default_factory=Console)
    stage: str = ""
    first_step: int = 0
    last_step: int = 0

    _bar: Optional[Progress] = None
    _task: TaskID = TaskID(0)
    _latest: Dict[str, float] = field(default_factory=dict)

    def pre_train(self):
        if get_rank() == 0 and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(
                self.stage,
                total=self.last_step - self.first_step,
                completed=self.step - self.first_step,
                status="",
            )
            self._bar.start()

    def _status(self) -> str:
        parts = []
        if (loss := self._latest.get(LOSS)) is not None:
            parts.append(f"loss {loss:.3f}")
        if (per_rank := self.trainer.training_progress.tps) is not None:
            per_second = per_rank * get_world_size(self.trainer.dp_process_group)
            parts.append(f"{per_second:,.0f} tokens/s")
        if (lr := self._latest.get(LEARNING_RATE)) is not None:
            parts.append(f"lr {lr:.2e}")
        return "  ".join(parts)

    def post_step(self):
        if get_rank() != 0:
            return
        if self._bar is not None:
            completed = self.step - self.first_step
            self._bar.update(self._task, completed=completed, status=self._status())
        elif self._every_tenth():
            done, length = self.step - self.first_step, self.last_step - self.first_step
            per_second = self.trainer.training_progress.bps
            left = f"  {(length - done) / per_second:.0f} s left" if per_second else ""
            self.console.print(f"{self.stage} {done}/{length}  {self._status()}{left}")

    def _every_tenth(self) -> bool:
        length = self.last_step - self.first_step
        return (self.step - self.first_step) % max(1, length // 10) == 0

    def log_metrics(self, step: int, metrics: Dict[str, float]):
        if get_rank() != 0:
            return
        self._latest = {**self._latest, **metrics}
        prefix, suffix = f"eval/{EVALUATOR}/", "/CE loss"
        losses = [
            f"{name[len(prefix) : -len(suffix)]} {value:.3f}"
            for name, value in metrics.items()
            if name.startswith(prefix) and name.endswith(suffix)
        ]
        if losses:
            self.console.print(f"{self.stage} step {step}: validation loss {', '.join(losses)}")

    def close(self):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
