"""
Adafactor (Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
arXiv:1804.04235, algorithms 4 and 5), in the form of ``torch.optim.Adafactor``.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Sequence, Tuple, Type

import torch
import torch.nn as nn
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import Scalar
from ..engine.hyperparameters import POSITIVE
from ..engine.row_plan import RowLayout, RowMatrix, RowSums
from ..engine.rowwise import Numbers, RowwiseOptimizer

__all__ = ["Adafactor", "AdafactorConfig"]


class Adafactor(RowwiseOptimizer):
    """
    Adafactor. Each matrix of a stack is factored on its own, vectors are not. For the arguments see
    :class:`AdafactorConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    sums_columns = True
    allowed = {"eps": POSITIVE}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: float = 2.0**-23,
        param_rms_eps: float = 1e-3,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        layouts: Any = None,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "param_rms_eps": param_rms_eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
        }
        super().__init__(params, defaults, layouts=layouts, **engine)

    def vectors(self, matrix: RowMatrix) -> Dict[str, int]:
        if matrix.is_vector:
            return {"variance": matrix.n_cols}
        return {"row_var": matrix.n_rows, "col_var": matrix.n_cols}

    def scalars(self, group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
        new = step.pow(group["beta2_decay"])
        rate = step.rsqrt().clamp(max=group["lr"])
        return rate, group["param_rms_eps"], group["clip_threshold"], group["eps"], new, 1 - new

    def follow(
        self,
        matrix: RowMatrix,
        sums: RowSums,
        vectors: Mapping[str, torch.Tensor],
        scalars: Sequence[torch.Tensor],
    ) -> Tuple[Numbers, Dict[str, torch.Tensor]]:
        """
        ``R <- b R + (1 - b) row means of g^2``, ``C <- b C + (1 - b) column means``, with
        ``1 - b = t^beta2_decay``. The second moment is ``R C / max(mean(R), eps)``; of a vector it
        is that of each element.
        """
        _, _, _, eps, new, old = scalars
        assert sums.cols is not None
        col_means = (sums.cols / matrix.n_rows).to(new.dtype)
        if matrix.is_vector:
            variance = vectors["variance"] * old + col_means * new
            return Numbers(variance.new_ones(1), variance), {"variance": variance}
        row_means = (sums.rows / matrix.n_cols).to(new.dtype)
        row_var = vectors["row_var"] * old + row_means * new
        col_var = vectors["col_var"] * old + col_means * new
        row = row_var / torch.maximum(row_var.mean(), eps)
        return Numbers(row, col_var), {"row_var": row_var, "col_var": col_var}

    @staticmethod
    def whole_sum(
        param: torch.Tensor,
        grad: torch.Tensor,
        row: torch.Tensor,
        col: torch.Tensor,
        scalars: torch.Tensor,
    ) -> Sequence[torch.Tensor]:
        """``sum(p^2)`` and ``sum(u^2)``."""
        update = _scaled(grad, row, col, scalars[3])
        return (param * param).sum(dtype=torch.float64), (update * update).sum(dtype=torch.float64)

    def more_scalars(
        self, totals: torch.Tensor, numel: int, scalars: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """``max(eps_2, RMS(p)) min(lr, 1 / sqrt(t)) / max(1, RMS(u) / d)``."""
        rate, rms_eps, threshold, *_ = (x.to(totals.dtype) for x in scalars)
        of_param, of_update = (totals / numel).sqrt().unbind()
        return (torch.maximum(of_param, rms_eps) * rate / (of_update / threshold).clamp(min=1),)

    @staticmethod
    def rule(
        param: torch.Tensor,
        grad: torch.Tensor,
        row: torch.Tensor,
        col: torch.Tensor,
        scalars: torch.Tensor,
    ) -> Tuple[torch.Tensor, ...]:
        """
        ``u = g / sqrt(max(R C / max(mean(R), eps), eps^2))``,
        ``p <- (1 - lr wd) p - max(eps_2, RMS(p)) min(lr, 1 / sqrt(t)) / max(1, RMS(u) / d) u``.
        """
        return (scalars[-1] * _scaled(grad, row, col, scalars[3]),)


def _scaled(
    grad: torch.Tensor, row: torch.Tensor, col: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    return grad / torch.maximum((row * col).sqrt(), eps)


@OptimConfig.register("adafactor")
@dataclass
class AdafactorConfig(ExtOptimConfig[Adafactor]):
    """
    Config of :class:`Adafactor`. Defaults are those of ``torch.optim.Adafactor``.
    """

    lr: float = 1e-2
    """
    Largest relative step, >= 0: a step is ``min(lr, 1 / sqrt(t))`` of a parameter's RMS.
    """

    beta2_decay: float = -0.8
    """The second moment takes ``t^beta2_decay`` of a new square, < 0."""

    eps: float = 2.0**-23
    """The least that a gradient is divided by, > 0; torch's ``eps[0]`` for float32."""

    param_rms_eps: float = 1e-3
    """The least RMS that a parameter is taken to have, >= 0; torch's ``eps[1]``."""

    clip_threshold: float = 1.0
    """An update whose RMS is larger is scaled down to it, > 0; torch's ``d``."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = True
    """
    ``True``: a step multiplies parameters by ``1 - lr * weight_decay``, as in torch. ``False``: L2,
    ``weight_decay * p`` is added to the gradient.
    """

    @classmethod
    def optimizer(cls) -> Type[Adafactor]:
        return Adafactor

    def of_model(self, model: nn.Module, strict: bool = True) -> Dict[str, Any]:
        rows = self.roles(model, strict)
        layouts = {name: row.layout for name, row in rows.items() if row.layout is not None}
        return {"layouts": {name: RowLayout(layout) for name, layout in layouts.items()}}
