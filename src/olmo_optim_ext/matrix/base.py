"""
What the optimizers for matrices share: AdamW for the parameters that are none.
"""

from dataclasses import dataclass
from typing import Any, Dict, Generic, Optional, Tuple, TypeVar

from typing_extensions import Unpack

from ..config import MatrixOptimConfig
from ..elementwise.adamw import ADAMW
from ..engine.base import ALGORITHM
from ..engine.hyperparameters import check_hyperparameters
from ..engine.matrix import MatrixOptimizer
from ..engine.matrix_base import MatrixBase, MatrixOptions

__all__ = ["AdamWForOthers", "AdamWOptions", "MatrixAndAdamW", "MatrixAndAdamWConfig"]


class AdamWOptions(MatrixOptions, total=False):
    """Keywords of :class:`AdamWForOthers`."""

    adamw_lr: Optional[float]
    adamw_betas: Tuple[float, ...]
    adamw_eps: float
    adamw_weight_decay: Optional[float]


class AdamWForOthers(MatrixBase):
    """
    AdamW, with hyperparameters of its own, for the parameters that are no matrices.

    :param defaults: Of the groups that follow the matrix rule.
    :param adamw_lr: And the other ``adamw_*``: see :class:`MatrixAndAdamWConfig`.
    """

    leftover_rules = {"adamw": ADAMW}

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        adamw_lr: Optional[float] = None,
        adamw_betas: Tuple[float, ...] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: Optional[float] = None,
        **options: Unpack[MatrixOptions],
    ):
        own = {
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        check_hyperparameters(own, type(self).__name__)
        lr, weight_decay = defaults["lr"], defaults["weight_decay"]
        self._adamw = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
            "betas": adamw_betas,
            "eps": adamw_eps,
        }
        # All groups have the same keys, as DCP wants it; most matrix rules have no use for these.
        defaults = {"betas": adamw_betas, "eps": adamw_eps, **defaults}
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        if param_group.get(ALGORITHM) in self.leftover_rules:
            param_group = {**self._adamw, **param_group}
        super().add_param_group(param_group)


class MatrixAndAdamW(AdamWForOthers, MatrixOptimizer):
    """A rule for whole matrices, and AdamW for the rest."""


Opt = TypeVar("Opt", bound=AdamWForOthers)


@dataclass
class MatrixAndAdamWConfig(MatrixOptimConfig[Opt], Generic[Opt]):
    """Fields of the configs of optimizers that leave embeddings, head and vectors to AdamW."""

    adamw_lr: Optional[float] = None
    """
    Learning rate of the parameters that follow AdamW, >= 0. ``None`` takes ``lr``, as OLMo-core's
    ``MuonConfig`` does.
    """

    adamw_betas: Tuple[float, ...] = (0.9, 0.95)
    """Of these parameters, two numbers in [0, 1). As in OLMo-core's ``MuonConfig``."""

    adamw_eps: float = 1e-8
    """Of these parameters, >= 0. As in ``torch.optim.AdamW``."""

    adamw_weight_decay: Optional[float] = None
    """Of these parameters, >= 0. ``None`` takes ``weight_decay``, as in arXiv:2502.16982."""
