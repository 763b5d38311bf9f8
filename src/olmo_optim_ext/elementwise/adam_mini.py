"""
Adam-mini (Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv:2406.16793,
algorithm 1 with the partition of its appendix for transformers): AdamW with one second moment for
each block of a parameter. Blocks follow from what a parameter is to its model, never from its name.
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Sequence, Tuple, Type

import torch
import torch.nn as nn
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import Scalar
from ..engine.layout import MatrixLayout
from ..engine.moments import ADAM_MOMENTS, Moment
from ..engine.roles import ParamRole
from ..engine.row_plan import RowLayout, RowMatrix, RowSums
from ..engine.rowwise import Numbers, RowwiseOptimizer
from .moments import adam_scalars

__all__ = ["AdamMini", "AdamMiniConfig"]


def blocks_of(row: ParamRole) -> RowLayout:
    """
    The blocks of a parameter, each a row, or rows that share one: a head of q and of k; any other
    output of a matrix, of each expert on its own; an entry of an embedding and of the head. Of
    vectors the gain of a normalization is one block, and so is what is stored as ``(1, n)``; of
    others, as biases, each element is.
    """
    if row.layout is None:
        numel = math.prod(row.shape)
        one = row.is_gain or (len(row.shape) == 2 and 1 in row.shape)
        return RowLayout(MatrixLayout(*((1,), (numel,)) if one else ((numel,), (1,))))
    layout, head = row.layout, row.head_dim
    if head is None or not row.scored:
        return _tall(RowLayout(layout, (1,) * len(layout.blocks())))
    values = layout.out_sizes[0] - row.scored
    if not values:
        return _tall(RowLayout(layout, (head,) * len(layout.blocks())))
    return RowLayout(layout.split_outputs((row.scored, values)), (head, 1) * len(layout.blocks()))


def _tall(rows: RowLayout) -> RowLayout:
    """The same rows as one matrix, where they are as long: fewer kernels for stacks of experts."""
    layout = rows.layout
    if layout.in_out or len(layout.col_sizes) > 1:
        return rows
    return RowLayout(MatrixLayout((layout.rows,), layout.col_sizes), rows.shared_by[:1])


class AdamMini(RowwiseOptimizer):
    """
    Adam-mini. For the arguments see :class:`AdamMiniConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    buffer_names = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        layouts: Any = None,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, layouts=layouts, **engine)

    def moments(self, group: Mapping[str, Any]) -> Sequence[Moment]:
        return ADAM_MOMENTS[:1]

    def vectors(self, matrix: RowMatrix) -> Dict[str, int]:
        return {"exp_avg_sq": matrix.n_rows // matrix.shared_by}

    def scalars(self, group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
        return adam_scalars(group, step)

    def follow(
        self,
        matrix: RowMatrix,
        sums: RowSums,
        vectors: Mapping[str, torch.Tensor],
        scalars: Sequence[torch.Tensor],
    ) -> Tuple[Numbers, Dict[str, torch.Tensor]]:
        """``v <- b2 v + (1 - b2) mean(g^2)`` over a block."""
        step_size, rsqrt_correction2, eps, _, _, beta2, rest2 = scalars
        size = matrix.shared_by
        means = sums.rows.view(-1, size).sum(1) / (size * matrix.n_cols)
        exp_avg_sq = vectors["exp_avg_sq"] * beta2 + means.to(beta2.dtype) * rest2
        scale = step_size / (exp_avg_sq.sqrt() * rsqrt_correction2 + eps)
        of_rows = scale.unsqueeze(1).expand(-1, size).reshape(-1)
        return Numbers(of_rows, of_rows.new_ones(1)), {"exp_avg_sq": exp_avg_sq}

    @staticmethod
    def rule(
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        row: torch.Tensor,
        col: torch.Tensor,
        scalars: torch.Tensor,
    ) -> Tuple[torch.Tensor, ...]:
        """
        ``m <- b1 m + (1 - b1) g``,
        ``p <- (1 - lr wd) p - lr / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) * m``.
        """
        _, _, _, beta1, rest1, _, _ = scalars.unbind()
        exp_avg = exp_avg * beta1 + grad * rest1
        return row * exp_avg, exp_avg


@OptimConfig.register("adam_mini")
@dataclass
class AdamMiniConfig(ExtOptimConfig[AdamMini]):
    """
    Config of :class:`AdamMini`. Defaults are those of the authors' code.
    """

    lr: float = 1e-3
    """Learning rate, >= 0. AdamW's is meant to fit."""

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment of a block, >= 0."""

    weight_decay: float = 0.0
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0."""

    @classmethod
    def optimizer(cls) -> Type[AdamMini]:
        return AdamMini

    def of_model(self, model: nn.Module, strict: bool = True) -> Dict[str, Any]:
        rows = self.roles(model, strict)
        return {"layouts": {name: blocks_of(row) for name, row in rows.items()}}
