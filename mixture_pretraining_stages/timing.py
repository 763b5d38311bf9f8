"""
How long steps take, and the optimizer's share of them.
"""

import time
from dataclasses import dataclass, field
from typing import ClassVar, Dict, List, Optional, Union

import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback

__all__ = ["OPTIMIZER_SECONDS", "STEP_SECONDS", "StepTimer"]

STEP_SECONDS = "timing/step seconds"
OPTIMIZER_SECONDS = "timing/optimizer seconds"

Mark = Union[float, "torch.cuda.Event"]


@dataclass
class StepTimer(Callback):
    """
    Adds to the metrics of each step, in seconds, as rank 0 sees them:

    - ``timing/step seconds``: from asking for the batch to the end of the update. Evaluations,
      checkpoints and what other callbacks do after the update are not in it.
    - ``timing/optimizer seconds``: the end of that, from the backward pass on. Further passes that
      an optimizer asks for, such as SAM's, clipping, the schedule and the step.

    On CUDA both are measured with events on the stream, which are read when the metrics of the step
    are logged: there is no host-device sync in a step. That was only reasoned, never run.
    """

    # First in every hook: further passes come after it in ``pre_optim_step``, reports of other
    # callbacks in ``post_train_batch``.
    priority: ClassVar[int] = 10_000

    _marks: List[Mark] = field(default_factory=list, init=False, repr=False)
    """Begin of the step, of the optimizer, and their end."""

    _done: Dict[int, List[Mark]] = field(default_factory=dict, init=False, repr=False)

    def pre_load_batch(self):
        self._marks = [self._now()]

    def pre_optim_step(self):
        self._marks.append(self._now())

    def post_train_batch(self):
        # Metrics of other ranks are not written, so that theirs would pile up.
        if get_rank() == 0 and len(self._marks) == 2:
            self._done[self.step] = [*self._marks, self._now()]

    def pre_log_metrics(self, step: int, metrics: Dict[str, float]):
        # Metrics of a step may be logged several times; these are complete at the first.
        marks: Optional[List[Mark]] = self._done.pop(step, None)
        if marks is not None:
            begin, optimizer, end = marks
            metrics[STEP_SECONDS] = _seconds(begin, end)
            metrics[OPTIMIZER_SECONDS] = _seconds(optimizer, end)

    def _now(self) -> Mark:
        if self.trainer.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()  # the metrics that are logged with it were computed later
    return begin.elapsed_time(end) / 1000
