"""
How often the compiler was asked for a program.
"""

from typing import Any, List

import jax.monitoring

_seen: List[str] = []


def _listen(event: str, *_: Any, **__: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _seen.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations() -> int:
    """In this process, since this module was imported."""
    return len(_seen)
