"""
What the optimizers for matrices share: AdamW for the parameters that are none.
"""

from typing import Any, Dict, Optional, Tuple

from typing_extensions import Unpack

from ..elementwise.adamw import ADAMW
from ..engine.hyperparameters import check_hyperparameters
from ..engine.matrix import ALGORITHM, MatrixOptimizer, MatrixOptions

__all__ = ["MatrixAndAdamW"]


class MatrixAndAdamW(MatrixOptimizer):
    """
    A matrix rule, and AdamW with hyperparameters of its own for the rest.

    :param defaults: Of the groups that follow the matrix rule.
    :param adamw_lr: And the other ``adamw_*``: see
        :class:`~olmo_optim_ext.config.MatrixOptimConfig`.
    """

    leftover_rule = ADAMW

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        *,
        adamw_lr: Optional[float],
        adamw_betas: Tuple[float, ...],
        adamw_eps: float,
        adamw_weight_decay: Optional[float],
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
        }
        # All groups have the same keys, as DCP wants it; matrices have no use for these two.
        defaults = {**defaults, "betas": adamw_betas, "eps": adamw_eps}
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        if param_group.get(ALGORITHM) == self.leftover_algorithm:
            param_group = {**self._adamw, **param_group}
        super().add_param_group(param_group)
