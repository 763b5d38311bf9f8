"""
What optimizers with preconditioners of matrices share: which parameters they take, and in what
blocks.
"""

from dataclasses import dataclass, replace
from typing import (
    Any,
    ClassVar,
    Dict,
    FrozenSet,
    Generic,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import torch
import torch.nn as nn

from ..engine.hyperparameters import check_hyperparameters
from ..engine.layout import MatrixLayout
from ..engine.matrix import Owned
from ..engine.roles import ParamRole, Role
from .base import MatrixAndAdamW, MatrixAndAdamWConfig
from .reports import update_rms

__all__ = ["PreconditionedConfig", "PreconditionedOptimizer"]


class PreconditionedOptimizer(MatrixAndAdamW):
    """
    A rule whose state is that of whole matrices, the moments too: it belongs to the rank that owns
    the matrix, which receives the gradient.
    """

    matrix_buffers = ()

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        return (grad,)

    def report(
        self, group: Mapping[str, Any], owned: Owned, updates: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        return {"update RMS": update_rms(updates, 1.0)}


Opt = TypeVar("Opt", bound=PreconditionedOptimizer)


@dataclass
class PreconditionedConfig(MatrixAndAdamWConfig[Opt], Generic[Opt]):
    """
    Fields of the configs of optimizers with preconditioners. What they do not take follows AdamW
    (``adamw_*``); ``group_overrides`` may set the ``role`` of parameters to matrix or to vector.

    All state of what they take is that of whole matrices: float32 whatever ``state_dtype``, and
    under DDP computed on each rank whatever ``share_replicas``.
    """

    block_size: Optional[int] = None
    """
    Divide each matrix into blocks of at most this many rows and columns, >= 1, each of which is
    preconditioned as a matrix of its own. ``None`` takes matrices whole.
    """

    precondition_1d: bool = False
    """
    Also take the parameters with one dimension and at least two elements, each as a matrix with one
    column.
    """

    precondition_embeddings: bool = False
    """Also take embeddings, tied ones too. Sides that are too large have no preconditioner."""

    precondition_lm_head: bool = False
    """Also take the head, unless it is tied to an embedding."""

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = MatrixAndAdamWConfig.CONFIG_ONLY | {
        "block_size",
        "precondition_1d",
        "precondition_embeddings",
        "precondition_lm_head",
    }

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        check_hyperparameters({"block_size": self.block_size}, type(self).__name__)

    def takes_head(self) -> bool:
        return self.precondition_lm_head

    def algorithm_of(self, row: ParamRole, opts: Mapping[str, Any]) -> str:
        takes = (self.precondition_embeddings and row.role == Role.embedding) or (
            row.role == Role.vector
            and row.layout is not None
            and len(row.shape) == 1
            and "role" not in opts  # one that is told to be a vector is one
        )
        return self.optimizer().algorithm if takes else super().algorithm_of(row, opts)

    def _roles(
        self, model: nn.Module, overrides: Dict[str, Dict[str, Any]]
    ) -> Dict[str, ParamRole]:
        return {
            name: (
                replace(row, layout=MatrixLayout.whole(row.shape))
                if self.precondition_1d and len(row.shape) == 1 and row.shape[0] > 1
                else row
            )
            for name, row in super()._roles(model, overrides).items()
        }

    def layouts(self, model: nn.Module, strict: bool = True) -> Dict[str, MatrixLayout]:
        layouts = super().layouts(model, strict)
        if self.block_size is None:
            return layouts
        return {name: layout.split(self.block_size) for name, layout in layouts.items()}
