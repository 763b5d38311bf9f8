"""
The role table: what each parameter is, which rule it follows, and how its matrix gets whole.
"""

import json
from dataclasses import asdict, dataclass
from typing import List, Tuple

import torch
import torch.nn as nn
from olmo_core.optim import INITIAL_LR_FIELD, OptimConfig

from .config import ExtOptimConfig, MatrixOptimConfig
from .engine.base import ALGORITHM
from .engine.matrix_base import MatrixBase
from .engine.roles import classify, named_trainable_parameters

__all__ = ["RoleRow", "role_table", "to_json", "to_text"]


@dataclass(frozen=True)
class RoleRow:
    """One parameter."""

    name: str
    shape: Tuple[int, ...]
    role: str
    algorithm: str
    lr: float
    """Before the schedule."""
    weight_decay: float
    path: str
    """How the matrix is had: ``local``, ``rows``, ``broadcast``, ``redistribute``, ``thin``;
    ``-`` if it is not."""
    matrices: int
    """How many matrices it stores for the rule; 0 if it follows none for matrices."""
    owners: Tuple[int, ...]
    """The ranks that compute them, in their order; empty if each rank computes all."""


def role_table(
    model: nn.Module, config: OptimConfig, optim: torch.optim.Optimizer
) -> List[RoleRow]:
    """
    A row for each trainable parameter, in the model's order.

    :param config: The config that built ``optim`` for ``model``.
    """
    if isinstance(config, ExtOptimConfig):
        config = config.rule_config
    roles = config.roles(model) if isinstance(config, ExtOptimConfig) else classify(model)
    placements = optim.placements() if isinstance(optim, MatrixBase) else {}
    layouts = config.layouts(model) if isinstance(config, MatrixOptimConfig) else {}
    groups = {id(p): group for group in optim.param_groups for p in group["params"]}
    own = str(type(config).registered_name)
    rows = []
    for name, param in named_trainable_parameters(model).items():
        group = groups[id(param)]
        path, owners = placements.get(name, ("-", ()))
        layout = layouts.get(name)
        rows.append(
            RoleRow(
                name=name,
                shape=tuple(param.shape),
                role=str(roles[name].role),
                algorithm=group.get(ALGORITHM) or own,
                lr=float(group.get(INITIAL_LR_FIELD, group["lr"])),
                weight_decay=float(group.get("weight_decay", 0.0)),
                path=str(path),
                matrices=0 if layout is None else len(layout.blocks()),
                owners=owners,
            )
        )
    return rows


def to_json(rows: List[RoleRow]) -> str:
    """A list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def to_text(rows: List[RoleRow]) -> str:
    """Aligned columns."""
    header = (
        *("parameter", "shape", "role", "algorithm", "lr", "weight decay"),
        *("path", "matrices", "owners"),
    )
    table = [header] + [
        (
            row.name,
            "x".join(map(str, row.shape)) or "scalar",
            row.role,
            row.algorithm,
            f"{row.lr:g}",
            f"{row.weight_decay:g}",
            row.path,
            str(row.matrices) if row.matrices else "-",
            ",".join(map(str, sorted(set(row.owners)))) or "-",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table]
    return "\n".join(lines) + "\n"
