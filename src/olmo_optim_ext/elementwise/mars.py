"""
MARS (Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
arXiv:2411.10438, algorithms 2 and 3), as in the authors' code: AdamW or Lion on gradients that are
corrected by how they changed.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    FrozenSet,
    Iterator,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
)

import torch
from olmo_core.config import StrEnum
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import ALGORITHM, STEP, EngineOptions, Member
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar, WholeSums
from ..engine.gate import all_finite
from ..engine.hyperparameters import check_hyperparameters, to_choice, to_flag
from ..engine.roles import ParamRole
from .moments import MOMENTS, adam_moments, adam_scalars, adam_update

__all__ = ["FirstStep", "Mars", "MarsConfig", "MarsForm"]

LAST_GRAD, LAST_PARAM = "last_grad", "last_param"
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
    return *out, param, last_grad


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
    return *out, param, last_grad


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
_RULES: Dict[Tuple[MarsForm, bool], ElementwiseRule] = {
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
_ADAMW_RULES: Dict[bool, ElementwiseRule] = {
    False: ElementwiseRule(MOMENTS, adam_scalars, adam_update),
    True: ElementwiseRule((*MOMENTS, LAST_PARAM), adam_scalars, adamw_exact),
}


class Mars(ElementwiseOptimizer):
    """
    MARS, and AdamW for the groups whose ``algorithm`` is ``adamw``: the config makes them of the
    parameters of one dimension. For the arguments see :class:`MarsConfig`.

    With ``exact`` the gradient that a new one is compared with is of the same batch:
    :meth:`at_last_weights` and :meth:`keep_last_gradients` before each step, which
    :class:`~olmo_optim_ext.training.LastWeightsCallback` calls.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    exact_buffers = frozenset({LAST_PARAM})

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
        exact: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        owner = type(self).__name__
        self.exact = to_flag(exact, "exact", owner)
        self._finite: Optional[torch.Tensor] = None
        """With ``exact``, whether the gradients at the last weights are."""
        own = dict(lr_1d_factor=lr_1d_factor, betas_1d=betas_1d, weight_decay_1d=weight_decay_1d)
        check_hyperparameters({"lr": lr, **own}, owner)
        self.rule = _RULES[to_choice(MarsForm, form, "form", owner), self.exact]
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
        return _ADAMW_RULES[self.exact] if group[ALGORITHM] == ADAMW else self.rule

    @contextmanager
    def at_last_weights(self) -> Iterator[None]:
        """
        Inside, parameters have the values that they had before the last update, those that had none
        yet the ones that they have. Afterwards they have theirs again, to the last bit.
        """
        params = [p for p in self.state if LAST_PARAM in self.state[p]]
        now = [get_local_tensor(param).clone() for param in params]
        with torch.no_grad():
            for param, weights in zip(params, now):
                last = get_local_tensor(self.state[param][LAST_PARAM])
                known = self.state[param][STEP] > 0
                get_local_tensor(param).copy_(torch.where(known, last, weights))
        try:
            yield
        finally:
            with torch.no_grad():
                for param, weights in zip(params, now):
                    get_local_tensor(param).copy_(weights)

    @torch.no_grad()
    def keep_last_gradients(self) -> None:
        """
        Take the gradients for those of the next batch at the last weights. If one is not finite,
        the next step is skipped, on all ranks alike.
        """
        members = [m for group in self.param_groups for m in self._members(group)]
        members = [m for m in members if LAST_GRAD in m.state]
        self._finite = all_finite([m.param for m in members], [m.grad for m in members])
        for member in members:
            last = member.local(LAST_GRAD)
            last.copy_(torch.where(self._finite, member.grad.to(last.dtype), last))

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """
        Update every parameter that has a gradient.

        :param closure: Re-evaluates the model and returns the loss.

        :returns: What ``closure`` returned.

        :raises OLMoConfigurationError: With ``exact``, if nothing came before it.
        """
        if self.exact and self._finite is None:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'exact' is True and the gradients of this batch at the "
                "last weights are not known, allowed is a step after keep_last_gradients(); "
                "OLMo-core's trainer does it with "
                'trainer_config.add_callback("last_weights", LastWeightsCallback()) from '
                "olmo_optim_ext.training"
            )
        loss = super().step(closure)
        self._finite = None
        return loss

    def _open_gate(self, members: Sequence[Member]) -> Optional[torch.Tensor]:
        proceed = super()._open_gate(members)
        if proceed is not None and self._finite is not None:
            proceed = proceed & self._finite
            self._proceed = proceed
        return proceed


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

    exact: bool = False
    """
    Compare with the gradient of the same batch at the last weights, as in the paper, and not with
    that of the last batch. It takes another forward and backward pass a step, 4 bytes a parameter,
    and the callback ``LastWeightsCallback``, which experiments add themselves.
    """

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = ExtOptimConfig.CONFIG_ONLY | {"optimize_1d"}

    @classmethod
    def optimizer(cls) -> Type[Mars]:
        return Mars

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        by_mars = self.optimize_1d or len(row.shape) > 1
        return {ALGORITHM: MARS if by_mars else ADAMW}
