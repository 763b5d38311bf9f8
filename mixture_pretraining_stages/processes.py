"""
Processes that a process has started.
"""

import os
import signal
from pathlib import Path
from typing import Dict, List

__all__ = ["kill_tree"]


def kill_tree(pid: int) -> None:
    """
    Kill a process and all that it has started. torchrun and its ranks are in sessions of their own,
    so that no signal to a group reaches them; where there is no ``/proc`` they are left.
    """
    for each in [pid, *_descendants(pid)]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:  # it has ended meanwhile
            pass


def _descendants(pid: int) -> List[int]:
    children: Dict[int, List[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may have spaces and brackets; state and parent follow.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for each in found:
        found += children.get(each, [])
    return found
