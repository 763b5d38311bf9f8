"""
The catalogue: one row per optimizer.
"""

import difflib
from typing import Dict, Iterable, List, Type

from olmo_core.exceptions import OLMoConfigurationError

from .config import ExtOptimConfig
from .elementwise import rows as elementwise
from .matrix import rows as matrix
from .optimizer_info import OptimizerInfo, Preset
from .wrappers import rows as wrappers

__all__ = [
    "OptimizerInfo",
    "Preset",
    "closest",
    "get_config_class",
    "list_optimizers",
    "markdown_table",
    "optimizer_info",
]

_ROWS = (*elementwise.ROWS, *matrix.ROWS, *wrappers.ROWS)
_BY_NAME: Dict[str, OptimizerInfo] = {row.name: row for row in _ROWS}


def closest(name: str, allowed: Iterable[str]) -> str:
    """For messages: the allowed names, and those most like ``name``."""
    names = list(allowed)
    known = {
        **{each.removeprefix("ext_"): each for each in names},
        **{each: each for each in names},
    }
    matches = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    near = dict.fromkeys(known[match] for match in matches)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"{', '.join(names)}{hint}"


def list_optimizers() -> List[str]:
    """The names of all optimizers of this package."""
    return list(_BY_NAME)


def markdown_table() -> str:
    """The catalogue as a Markdown table, for the README."""
    lines = ["| name | what it is | state, bytes per parameter | source |", "|---|---|---|---|"]
    for row in _ROWS:
        lines.append(
            f"| `{row.name}` | {row.summary} | {row.state_bytes_per_param:g} | {row.paper} |"
        )
    return "\n".join(lines) + "\n"


def optimizer_info(name: str) -> OptimizerInfo:
    """
    The catalogue's row of an optimizer. A bare ``muon`` means ``ext_muon``.

    :raises OLMoConfigurationError: If there is no such optimizer; gives the closest names.
    """
    for candidate in (name, f"ext_{name}"):
        if candidate in _BY_NAME:
            return _BY_NAME[candidate]
    raise OLMoConfigurationError(
        f"there is no optimizer {name!r}, allowed are {closest(name, _BY_NAME)}"
    )


def get_config_class(name: str) -> Type[ExtOptimConfig]:
    """
    The config class of an optimizer.

    :raises OLMoConfigurationError: If there is no such optimizer; gives the closest names.
    """
    return optimizer_info(name).config_class
