"""
What a function allocates.
"""

from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist


def peak_bytes(function: Callable[[], object]) -> int:
    """
    The most bytes of CPU tensors that are allocated at a time, results included. What other threads
    free is not seen.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    # Not profile.events(), where what an operator allocates is not an event of its own.
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class _Done:
    """A transfer that is done, and like one under way holds its tensors until it is dropped."""

    def __init__(self, *tensors: torch.Tensor):
        self._tensors = tensors

    def wait(self) -> bool:
        return True


@contextmanager
def transfers_held_by_their_work(numel: int) -> Iterator[None]:
    """
    Let the work of a transfer alone hold its tensors. Threads of gloo's, too, hold them for a while
    after it is done, which depends on the machine's load, and free them unseen; here they get
    others.

    :param numel: Elements of the largest transfer, sent and received.
    """
    spare = torch.empty(numel)
    originals = dist.all_to_all_single, dist.broadcast

    def all_to_all(
        output: torch.Tensor, input: torch.Tensor, coming: Any, going: Any, **more: Any
    ) -> _Done:
        assert more.pop("async_op")
        received, sent, _ = spare.split(
            [output.numel(), input.numel(), numel - output.numel() - input.numel()]
        )
        originals[0](received, sent.copy_(input), coming, going, **more)
        output.copy_(received)
        return _Done(output, input)

    def broadcast(tensor: torch.Tensor, source: int, **more: Any) -> _Done:
        assert more.pop("async_op")
        originals[1](spare[: tensor.numel()].copy_(tensor), source, **more)
        tensor.copy_(spare[: tensor.numel()])
        return _Done(tensor)

    dist.all_to_all_single, dist.broadcast = all_to_all, broadcast  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.all_to_all_single, dist.broadcast = originals
