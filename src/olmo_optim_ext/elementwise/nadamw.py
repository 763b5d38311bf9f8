"""
NAdamW: AdamW with Nesterov momentum (Dozat, "Incorporating Nesterov Momentum into Adam", 2016;
decoupled weight decay, arXiv:1711.05101). Three rules that are not equivalent share the name.
"""

import math
from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.config import StrEnum
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar, bias_correction
from ..engine.hyperparameters import to_choice
from ..engine.moments import ADAM_MOMENTS
from .moments import MOMENTS, adam_moments

__all__ = ["NAdamW", "NAdamWConfig", "NesterovForm"]


class NesterovForm(StrEnum):
    """Which numerator the update takes, with ``m`` already updated and ``t`` counted from 1."""

    algoperf = "algoperf"
    """``(b1 m + (1 - b1) g) / (1 - b1^t)``: AlgoPerf's baseline and timm. 1.9 lr at step 1."""

    dozat = "dozat"
    """``b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)``: optax, tuned in arXiv:2509.02046."""

    torch = "torch"
    """
    ``torch.optim.NAdam``: ``mu_(t+1) m / (1 - prod_(i<=t+1) mu_i) + (1 - mu_t) g /
    (1 - prod_(i<=t) mu_i)`` with ``mu_t = b1 (1 - 0.96^(t psi) / 2)``, psi = ``momentum_decay``.
    """


def nadamw_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    of_momentum, of_grad = _numerator(group, step)
    return (
        lr * of_momentum,
        lr * of_grad,
        bias_correction(beta2, step).rsqrt(),
        group["eps"],
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
    )


def _numerator(group: Mapping[str, Any], step: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The factors of ``m`` and of ``g``, each of shape ``(n,)``."""
    form, beta1 = group["nesterov"], group["betas"][0]
    if form == NesterovForm.algoperf:
        correction = bias_correction(beta1, step)
        return beta1 / correction, (1 - beta1) / correction
    if form == NesterovForm.dozat:
        of_grad = (1 - beta1) / bias_correction(beta1, step)
        return beta1 / bias_correction(beta1, step + 1), of_grad
    psi = group["momentum_decay"]
    mu, mu_next = _torch_mu(beta1, psi, step), _torch_mu(beta1, psi, step + 1)
    product = _torch_mu_product(beta1, psi, step)
    return mu_next / (1 - product * mu_next), (1 - mu) / (1 - product)


def _torch_mu(beta1: float, psi: float, step: torch.Tensor) -> torch.Tensor:
    return beta1 * (1 - 0.5 * torch.pow(0.96, step * psi))


def _torch_mu_product(beta1: float, psi: float, step: torch.Tensor) -> torch.Tensor:
    """
    ``prod_(i<=t) mu_i`` in closed form, so that it needs no state: with ``q = 0.96^psi``,
    ``sum_(i<=t) log(1 - q^i / 2) = -sum_k (2^-k / k) sum_(i<=t) q^(i k)``, and the inner sum is
    geometric. Fifty terms leave an error of 2^-50.
    """
    log_sum = torch.zeros_like(step)
    for k in range(1, 51):
        log_qk = psi * k * math.log(0.96)
        # expm1, because q^k is so close to 1 that the differences would cancel.
        geometric = (
            math.exp(log_qk) * torch.expm1(step * log_qk) / math.expm1(log_qk) if psi > 0 else step
        )
        log_sum = log_sum - 2.0**-k / k * geometric
    return torch.pow(beta1, step) * log_sum.exp()


def nadamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- (1 - lr wd) p - lr (a_t m + c_t g) / (sqrt(v / (1 - b2^t)) + eps)``,
    with ``a_t`` and ``c_t`` of :class:`NesterovForm`.
    """
    of_m, of_g, rsqrt_correction2, eps, *betas = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    return (exp_avg * of_m + grad * of_g) / denom, exp_avg, exp_avg_sq


class NAdamW(ElementwiseOptimizer):
    """
    AdamW with Nesterov momentum. For the arguments see :class:`NAdamWConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(MOMENTS, nadamw_scalars, nadamw, moments=ADAM_MOMENTS)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        nesterov: NesterovForm = NesterovForm.algoperf,
        momentum_decay: float = 4e-3,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            nesterov=str(nesterov),
            momentum_decay=momentum_decay,
        )
        super().__init__(params, defaults, **engine)

    def check_group(self, group: Mapping[str, Any]) -> None:
        to_choice(NesterovForm, group["nesterov"], "nesterov", type(self).__name__)


@OptimConfig.register("nadamw")
@dataclass
class NAdamWConfig(ExtOptimConfig[NAdamW]):
    """
    Config of :class:`NAdamW`. Defaults are those of timm's ``NAdamW``, which is AlgoPerf's rule.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 1e-2
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0."""

    nesterov: NesterovForm = NesterovForm.algoperf
    """Which of the three rules."""

    momentum_decay: float = 4e-3
    """``psi`` of the ``torch`` form, >= 0; the other forms have no use for it. As in torch."""

    @classmethod
    def optimizer(cls) -> Type[NAdamW]:
        return NAdamW
