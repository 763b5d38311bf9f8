"""
MARS (Yuan et al., arXiv:2411.10438): the optimizer and its config; the rules are in
:mod:`~olmo_optim_ext.elementwise.mars_rules`.
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
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import ALGORITHM, STEP, EngineOptions, GroupWork, Member
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule
from ..engine.gate import all_finite
from ..engine.hyperparameters import check_hyperparameters, to_choice, to_flag
from ..engine.roles import ParamRole
from .mars_rules import ADAMW_RULES, LAST_GRAD, LAST_PARAM, RULES, FirstStep, MarsForm

__all__ = ["Mars", "MarsConfig"]

MARS, ADAMW = "mars", "adamw"
"""Algorithms of groups; the second is that of parameters of one dimension."""


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
        """With ``exact``, whether the gradients at the last weights are, and they by parameter."""
        self._last_grads: Dict[torch.Tensor, torch.Tensor] = {}
        own = dict(lr_1d_factor=lr_1d_factor, betas_1d=betas_1d, weight_decay_1d=weight_decay_1d)
        check_hyperparameters({"lr": lr, **own}, owner)
        self.rule = RULES[to_choice(MarsForm, form, "form", owner), self.exact]
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

    def check_group(self, group: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        if group[ALGORITHM] not in (MARS, ADAMW):
            raise OLMoConfigurationError(
                f"{owner}: 'algorithm' is {group[ALGORITHM]!r}, allowed are {MARS} and {ADAMW}"
            )
        first = to_choice(FirstStep, group["first_step"], "first_step", owner)
        if self.exact and first != FirstStep.zero:
            raise OLMoConfigurationError(
                f"{owner}: 'first_step' is '{first}' with 'exact' True, allowed is zero: the first "
                "gradient is then compared with itself anyway"
            )
        super().check_group(group)

    def rule_of(self, group: Mapping[str, Any]) -> ElementwiseRule:
        return ADAMW_RULES[self.exact] if group[ALGORITHM] == ADAMW else self.rule

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
        by_group = [(group, self._members(group)) for group in self.param_groups]
        members = [m for group, some in by_group for m in some if group[ALGORITHM] == MARS]
        self._last_grads = {member.param: member.grad.clone() for member in members}
        self._finite = all_finite([m.param for m in members], [m.grad for m in members])

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
        self._finite, self._last_grads = None, {}
        return loss

    def update(self, work: Sequence[GroupWork]) -> None:
        if not self.exact:
            return super().update(work)
        # To the rules it is like state, but it stays in none.
        super().update(
            [
                each._replace(members=[self._with_last_grad(m) for m in each.members])
                if each.group[ALGORITHM] == MARS
                else each
                for each in work
            ]
        )

    def _with_last_grad(self, member: Member) -> Member:
        last = self._last_grads.get(member.param, member.grad)
        return member._replace(state={**member.state, LAST_GRAD: last})

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        buffers = super().buffers(group)
        return [name for name in buffers if name != LAST_GRAD] if self.exact else buffers

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
    """
    What the first gradient is compared with: ``zero`` or ``current``. With :data:`exact` it is the
    one of the same batch at the same weights, so that nothing is added.
    """

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
    that of the last batch. It takes another forward and backward pass a step, and the callback
    ``LastWeightsCallback``, which experiments add themselves.
    """

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = ExtOptimConfig.CONFIG_ONLY | {"optimize_1d"}

    @classmethod
    def optimizer(cls) -> Type[Mars]:
        return Mars

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        by_mars = self.optimize_1d or len(row.shape) > 1
        return {ALGORITHM: MARS if by_mars else ADAMW}
