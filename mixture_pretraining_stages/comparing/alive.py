"""
Which of the processes that work at a comparison are alive.
"""

import socket
import uuid
from pathlib import Path
from typing import Dict

from filelock import FileLock, Timeout

__all__ = ["Worker"]


class Worker:
    """
    This process among those that work at a comparison. It keeps a lock as long as it lives, from
    which others on its machine see that it does.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.attribute = {"host": socket.gethostname(), "id": uuid.uuid4().hex}
        self._lock = FileLock(self._path(self.attribute))
        self._lock.acquire()

    def _path(self, attribute: Dict[str, str]) -> Path:
        return self.folder / f"{attribute['id']}.lock"

    def close(self) -> None:
        self._lock.release()
        self._path(self.attribute).unlink(missing_ok=True)

    def knows_to_be_dead(self, attribute: Dict[str, str]) -> bool:
        """Whether a process of this machine has ended. Of other machines nothing is known."""
        if attribute["host"] != self.attribute["host"] or attribute == self.attribute:
            return False
        return not _is_held(self._path(attribute))

    def is_alone(self) -> bool:
        """Whether no other process that uses the folder from this machine is alive."""
        own = self._path(self.attribute)
        return not any(_is_held(path) for path in self.folder.glob("*.lock") if path != own)


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(blocking=False):
            path.unlink(missing_ok=True)
            return False
    except Timeout:
        return True
