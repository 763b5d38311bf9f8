"""
MARS (Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
arXiv:2411.10438, algorithms 2 and 3), as in the authors' code: AdamW or Lion on gradients that are
corrected by how they changed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, FrozenSet, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.config import StrEnum
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import ALGORITHM, EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar, WholeSums
from ..engine.hyperparameters import check_hyperparameters, to_choice
from ..engine.roles import ParamRole
from .moments import MOMENTS, adam_moments, adam_scalars, adam_update

__all__ = ["FirstStep", "Mars", "MarsConfig", "MarsForm"]

MARS, ADAMW = "mars", "adamw"
"""Algorithms of groups; the second is that of parameters of one dimension."""


class MarsForm(StrEnum):
    """Which rule takes the corrected gradients."""

    adamw = "adamw"
    lion = "lion"
    """The sign of their average, which is Lion without its second average."""


class FirstStep(StrEnum):
    """What the first gradient is compared with."""

    zero = "zero"
    """With nothing: it is multiplied by ``1 + gamma b1 / (1 - b1)``, as in the authors' code."""

    current = "current"
    """With itself: it is taken as it is, as in timm."""


def _correction_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1 = group["betas"][0]
    factor = group["gamma"] * (beta1 / (1 - beta1))
    if group["first_step"] == FirstStep.zero:
        return (factor,)
    return (torch.where(step == 1, 0.0, factor),)


def mars_adamw_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return *_correction_scalars(group, step), *adam_scalars(group, step)


def mars_lion_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1 = group["betas"][0]
    return *_correction_scalars(group, step), group["lr"], beta1, 1 - beta1


def corrected(grad: torch.Tensor, last_grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``c = g + gamma b1 / (1 - b1) (g - g_(t-1))``."""
    return grad + (grad - last_grad) * factor


def sum_of_squares(
    param: torch.Tensor, grad: torch.Tensor, *rest: torch.Tensor
) -> Sequence[torch.Tensor]:
    """``sum(c^2)``; the last gradient is the last buffer."""
    *_, last_grad, scalars = rest
    c = corrected(grad, last_grad, scalars[0])
    return ((c * c).sum(),)


def clip_factor(
    sums: Sequence[torch.Tensor], numel: Scalar, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    """``1 / max(1, ||c||)``, with the norm of the whole parameter's."""
    return (sums[0].sqrt().clamp(min=1).reciprocal(),)


def mars_adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    last_grad: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``c = g + gamma b1 / (1 - b1) (g - g_(t-1))``, ``c <- c / max(1, ||c||)``,
    ``m <- b1 m + (1 - b1) c``, ``v <- b2 v + (1 - b2) c^2``,
    ``p <- (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``.
    """
    factor, step_size, rsqrt_correction2, eps, *betas, clip = scalars.unbind()
    c = corrected(grad, last_grad, factor) * clip
    exp_avg, exp_avg_sq = adam_moments(c, exp_avg, exp_avg_sq, betas)
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    return step_size * (exp_avg / denom), exp_avg, exp_avg_sq, grad


def mars_lion(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    last_grad: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """``c`` and ``m`` as in :func:`mars_adamw`; ``p <- (1 - lr wd) p - lr sign(m)``."""
    factor, lr, beta1, rest1, clip = scalars.unbind()
    exp_avg = exp_avg * beta1 + corrected(grad, last_grad, factor) * clip * rest1
    return lr * exp_avg.sign(), exp_avg, grad


_CLIP = WholeSums(sum_of_squares, clip_factor)
_RULES: Dict[MarsForm, ElementwiseRule] = {
    MarsForm.adamw: ElementwiseRule((*MOMENTS, "last_grad"), mars_adamw_scalars, mars_adamw, _CLIP),
    MarsForm.lion: ElementwiseRule(("exp_avg", "last_grad"), mars_lion_scalars, mars_lion, _CLIP),
}
_ADAMW_RULE = ElementwiseRule(MOMENTS, adam_scalars, adam_update)


class Mars(ElementwiseOptimizer):
    """
    MARS, and AdamW for the groups whose ``algorithm`` is ``adamw``: the config makes them of the
    parameters of one dimension. For the arguments see :class:`MarsConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: Tuple[float, ...] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        form: MarsForm = MarsForm.adamw,
        first_step: FirstStep = FirstStep.zero,
        lr_1d_factor: float = 1.0,
        betas_1d: Tuple[float, ...] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        **engine: Unpack[EngineOptions],
    ):
        owner = type(self).__name__
        own = dict(lr_1d_factor=lr_1d_factor, betas_1d=betas_1d, weight_decay_1d=weight_decay_1d)
        check_hyperparameters({"lr": lr, **own}, owner)
        self.rule = _RULES[to_choice(MarsForm, form, "form", owner)]
        self._of_1d = dict(lr=lr * lr_1d_factor, betas=betas_1d, weight_decay=weight_decay_1d)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "first_step": str(to_choice(FirstStep, first_step, "first_step", owner)),
            ALGORITHM: MARS,
        }
        super().__init__(params, defaults, **engine)

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        if param_group.get(ALGORITHM) == ADAMW:
            param_group = {**self._of_1d, **param_group}
        super().add_param_group(param_group)

    def rule_of(self, group: Mapping[str, Any]) -> ElementwiseRule:
        return _ADAMW_RULE if group[ALGORITHM] == ADAMW else self.rule


@OptimConfig.register("mars")
@dataclass
class MarsConfig(ExtOptimConfig[Mars]):
    """
    Config of :class:`Mars`. Defaults are those of the authors' code.
    """

    lr: float = 3e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.95, 0.99)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 0.0
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0."""

    gamma: float = 0.025
    """
    How much of the gradient's change is added, >= 0. With 0 this is AdamW on gradients that are
    clipped parameter by parameter.
    """

    form: MarsForm = MarsForm.adamw
    """``adamw`` or ``lion``, which has no second moment."""

    first_step: FirstStep = FirstStep.zero
    """What the first gradient is compared with: ``zero`` or ``current``."""

    optimize_1d: bool = False
    """Whether parameters of one dimension follow MARS, too; if not, AdamW."""

    lr_1d_factor: float = 1.0
    """Learning rate of the parameters that follow AdamW over :data:`lr`, > 0."""

    betas_1d: Tuple[float, ...] = (0.9, 0.95)
    """Of these parameters, two numbers in [0, 1)."""

    weight_decay_1d: float = 0.1
    """Of these parameters, >= 0."""

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = ExtOptimConfig.CONFIG_ONLY | {"optimize_1d"}

    @classmethod
    def optimizer(cls) -> Type[Mars]:
        return Mars

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        by_mars = self.optimize_1d or len(row.shape) > 1
        return {ALGORITHM: MARS if by_mars else ADAMW}
