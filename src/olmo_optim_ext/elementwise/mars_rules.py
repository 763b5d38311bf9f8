"""
The rules of MARS (Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large
Models", arXiv:2411.10438, algorithms 2 and 3), as in the authors' code: AdamW or Lion on gradients
that are corrected by how they changed.
"""

from typing import Any, Dict, Mapping, Sequence, Tuple

import torch
from olmo_core.config import StrEnum

from ..engine.elementwise import ElementwiseRule, Scalar, WholeSums, first_or
from .moments import ADAM, MOMENTS, adam_scalars, adam_update

__all__ = ["ADAMW_RULES", "LAST_GRAD", "LAST_PARAM", "RULES", "FirstStep", "MarsForm"]

LAST_GRAD, LAST_PARAM = "last_grad", "last_param"


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
    return (first_or(step, 0.0, factor),)


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
    return ((c * c).sum(dtype=torch.float64),)


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
    c = corrected(grad, last_grad, scalars[0]) * scalars[-1]
    return *adam_update(param, c, exp_avg, exp_avg_sq, scalars[1:-1]), grad


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


def mars_adamw_exact(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    last_param: torch.Tensor,
    last_grad: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """As :func:`mars_adamw`, with the gradient of this batch at the last parameters."""
    *out, _ = mars_adamw(param, grad, exp_avg, exp_avg_sq, last_grad, scalars)
    return *out, param


def mars_lion_exact(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    last_param: torch.Tensor,
    last_grad: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """As :func:`mars_lion`, with the gradient of this batch at the last parameters."""
    *out, _ = mars_lion(param, grad, exp_avg, last_grad, scalars)
    return *out, param


def adamw_exact(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    last_param: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """AdamW, and the parameters before it."""
    return *adam_update(param, grad, exp_avg, exp_avg_sq, scalars), param


_CLIP = WholeSums(sum_of_squares, clip_factor)
_EXACT = (LAST_PARAM, LAST_GRAD)
RULES: Dict[Tuple[MarsForm, bool], ElementwiseRule] = {
    (MarsForm.adamw, False): ElementwiseRule(
        (*MOMENTS, LAST_GRAD), mars_adamw_scalars, mars_adamw, _CLIP
    ),
    (MarsForm.lion, False): ElementwiseRule(
        ("exp_avg", LAST_GRAD), mars_lion_scalars, mars_lion, _CLIP
    ),
    (MarsForm.adamw, True): ElementwiseRule(
        (*MOMENTS, *_EXACT), mars_adamw_scalars, mars_adamw_exact, _CLIP
    ),
    (MarsForm.lion, True): ElementwiseRule(
        ("exp_avg", *_EXACT), mars_lion_scalars, mars_lion_exact, _CLIP
    ),
}
"""By form, and whether the last gradient is one of this batch."""
ADAMW_RULES: Dict[bool, ElementwiseRule] = {
    False: ADAM,
    True: ElementwiseRule((*MOMENTS, LAST_PARAM), adam_scalars, adamw_exact),
}
