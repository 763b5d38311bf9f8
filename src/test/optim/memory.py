"""
What a function allocates.
"""

from typing import Callable

import torch


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that are allocated at a time, results included."""
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
