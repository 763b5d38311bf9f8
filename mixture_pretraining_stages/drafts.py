"""
Files that are whole whenever somebody reads them, also after a kill.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside ``path``, with the same ending, that takes its place once it is written."""
    draft = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
