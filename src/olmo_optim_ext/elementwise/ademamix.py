"""
AdEMAMix (Pagliardini, Ablin & Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
arXiv:2409.03137, algorithm 1), as in the authors' code.
"""

import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar, bias_correction
from ..engine.hyperparameters import NON_NEGATIVE, THREE_BETAS
from ..engine.moments import ADAM_MOMENTS
from .moments import adam_moments

__all__ = ["AdEMAMix", "AdEMAMixConfig"]

BUFFERS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")


def ademamix_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1, beta2, _ = group["betas"]
    alpha, beta3 = mixture(group, step), slow_beta(group, step)
    lr, correction1 = group["lr"], bias_correction(beta1, step)
    return (
        lr / correction1,
        lr * alpha,
        bias_correction(beta2, step).rsqrt(),
        group["eps"],
        *(beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3),
    )


def mixture(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    """``alpha min(t / T, 1)`` with ``T`` = ``alpha_warmup``."""
    if group["alpha_warmup"] is None:
        return group["alpha"]
    return group["alpha"] * (step / group["alpha_warmup"]).clamp(max=1)


def slow_beta(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    """
    The beta whose half-life grows linearly from that of ``b1`` to that of ``b3`` in ``T`` =
    ``beta3_warmup`` updates, float64: ``0.5^(1 / (h + 1))`` with ``h = (1 - t / T) h(b1) + t / T
    h(b3)`` and ``h(b) = ln 0.5 / ln(b + 1e-8) - 1``; ``b3`` from ``t = T`` on.
    """
    beta1, _, beta3 = group["betas"]
    if group["beta3_warmup"] is None:
        return beta3
    share = step.double() / group["beta3_warmup"]
    half_life = (1 - share) * _half_life(beta1) + share * _half_life(beta3)
    warming = torch.exp(math.log(0.5) / (half_life + 1))
    return torch.where(share < 1, warming, beta3)


def _half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta + 1e-8) - 1


def ademamix(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_slow: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m1 <- b1 m1 + (1 - b1) g``, ``m2 <- b3 m2 + (1 - b3) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- (1 - lr wd) p - lr (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps)``.
    """
    of_m1, of_m2, rsqrt_correction2, eps, *betas, beta3, rest3 = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    exp_avg_slow = exp_avg_slow * beta3 + grad * rest3
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    # A sum of quotients, so that alpha = 0 leaves AdamW to the last bit.
    step = of_m1 * (exp_avg / denom) + of_m2 * (exp_avg_slow / denom)
    return step, exp_avg, exp_avg_slow, exp_avg_sq


class AdEMAMix(ElementwiseOptimizer):
    """
    AdEMAMix. For the arguments see :class:`AdEMAMixConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(BUFFERS, ademamix_scalars, ademamix, moments=ADAM_MOMENTS)
    allowed = {
        "betas": THREE_BETAS,
        "alpha": NON_NEGATIVE,
    }
    nullable = frozenset({"alpha_warmup", "beta3_warmup"})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        alpha_warmup: Optional[int] = None,
        beta3_warmup: Optional[int] = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            alpha=alpha,
            alpha_warmup=alpha_warmup,
            beta3_warmup=beta3_warmup,
            eps=eps,
            weight_decay=weight_decay,
        )
        super().__init__(params, defaults, **engine)


@OptimConfig.register("ademamix")
@dataclass
class AdEMAMixConfig(ExtOptimConfig[AdEMAMix]):
    """
    Config of :class:`AdEMAMix`. Defaults are those of the authors' code.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.999, 0.9999)
    """Decay of the fast first moment, the second moment and the slow first moment, in [0, 1)."""

    alpha: float = 2.0
    """How much of the slow moment is added, >= 0. The paper takes 5 to 10."""

    alpha_warmup: Optional[int] = None
    """
    In how many updates ``alpha`` grows linearly from 0, >= 1. The paper takes the length of the
    run, and says that large ``alpha`` needs it. ``None`` starts with ``alpha``.
    """

    beta3_warmup: Optional[int] = None
    """
    In how many updates the half-life of the slow moment grows from that of the fast one, >= 1. As
    :data:`alpha_warmup`. ``None`` starts with the third beta.
    """

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 0.0
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0."""

    @classmethod
    def optimizer(cls) -> Type[AdEMAMix]:
        return AdEMAMix
