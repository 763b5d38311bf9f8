"""
Sophia (Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv:2305.14342): momentum over a moving average of the Hessian's diagonal, clipped
in each coordinate. Its estimates come from
:class:`~olmo_optim_ext.training.hessian.SophiaCallback`.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
from olmo_core.config import StrEnum
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import CALLS, STEP, EngineOptions, GroupWork, Member
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar
from ..engine.gate import all_finite
from ..engine.hyperparameters import check_hyperparameters, to_choice
from ..engine.placement import sum_over_shards
from ..engine.write import chunks, rounding_of, some_of, write_state

__all__ = ["HESSIAN_UPDATES", "HessianEstimator", "Sophia", "SophiaConfig"]

HESSIAN_UPDATES = "hessian_updates"
"""Param-group key: how many estimates were given, a host integer, the same in every group."""

HESSIAN_STEP = "hessian_step"
"""State key: how many estimates entered the parameter's average, a 0-d tensor on its device."""


class HessianEstimator(StrEnum):
    """Where estimates of the Hessian's diagonal come from."""

    gauss_newton_bartlett = "gauss_newton_bartlett"
    """
    ``B g^2`` with the gradient ``g`` of the mean loss over ``B`` tokens whose labels are drawn from
    the model's own predictions (Algorithm 2): the diagonal of the Gauss-Newton matrix, never
    negative.
    """

    hutchinson = "hutchinson"
    """
    ``u (H u)`` with random ``u`` (Algorithm 1): the diagonal of the Hessian itself. ``H u`` is a
    difference of two gradients, so it needs no double backward, which FSDP2 and attention on CPU do
    not have.
    """


def clip_threshold(hessian: torch.Tensor, rho: Scalar, eps: Scalar) -> torch.Tensor:
    """``max(rho h, 0) + eps``: momentum beyond it is clipped."""
    return (hessian * rho).clamp(min=0.0) + eps


def sophia_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1, _ = group["betas"]
    estimates = group[HESSIAN_STEP].to(step)
    return group["lr"], beta1, 1 - beta1, group["rho"], group["eps"], estimates


def sophia(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    hessian: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) g``, ``p <- (1 - lr wd) p - lr clip(m / (max(rho h, 0) + eps), 1)``, and
    as long as no estimate has entered ``h`` the last term is 0 (Algorithm 3). ``h`` stays.
    """
    lr, beta1, rest1, rho, eps, estimates = scalars.unbind()
    exp_avg = exp_avg * beta1 + grad * rest1
    ratio = (exp_avg / clip_threshold(hessian, rho, eps)).clamp(-1.0, 1.0)
    return torch.where(estimates > 0, lr * ratio, 0.0), exp_avg


class Sophia(ElementwiseOptimizer):
    """
    Sophia. For the arguments see :class:`SophiaConfig`.

    Between two calls of :meth:`step` an estimate of the Hessian's diagonal may be given, with
    :meth:`update_hessian` or :meth:`update_hessian_from_estimates`; the first step needs one. Where
    a step is skipped, so is the estimate that came before it.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    # The Hessian comes last, as a step does not write it.
    rule = ElementwiseRule(("exp_avg", "hessian"), sophia_scalars, sophia)
    counters = (CALLS, HESSIAN_UPDATES)
    allowed = {"eps": (lambda value: 0 < value < float("inf"), "a finite number > 0")}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Tuple[float, ...] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-15,
        weight_decay: float = 0.1,
        batch_tokens: Optional[int] = None,
        hessian_update_interval: int = 10,
        estimator: HessianEstimator = HessianEstimator.gauss_newton_bartlett,
        hutchinson_epsilon: float = 1e-3,
        **engine: Unpack[EngineOptions],
    ):
        name = type(self).__name__
        options: Dict[str, Any] = dict(
            batch_tokens=batch_tokens,
            hessian_update_interval=hessian_update_interval,
            hutchinson_epsilon=hutchinson_epsilon,
        )
        check_hyperparameters(options, name)
        self.batch_tokens = batch_tokens
        self.hessian_update_interval = hessian_update_interval
        self.estimator = to_choice(HessianEstimator, estimator, "estimator", name)
        self.hutchinson_epsilon = hutchinson_epsilon
        # Of parameters: the average and its count before the estimates since the last step.
        self._before: Dict[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]] = {}
        defaults = dict(lr=lr, betas=betas, rho=rho, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, **engine)

    @property
    def seed(self) -> int:
        """The seed of labels and probes."""
        return self._seed

    @property
    def hessian_updates(self) -> int:
        """How many estimates were given, those included that did not enter."""
        return self.param_groups[0][HESSIAN_UPDATES]

    def has_hessian(self) -> bool:
        """Whether an estimate has entered. Waits for the device."""
        return self.hessian_updates > 0 and bool(
            torch.stack([state[HESSIAN_STEP] for state in self.state.values()]).any()
        )

    def _create_state(self, group: Dict[str, Any]) -> torch.Tensor:
        clock = super()._create_state(group)
        for param in (p for p in group["params"] if p in self.state):
            self.state[param][HESSIAN_STEP] = torch.zeros_like(self.state[param][STEP])
        return clock

    @torch.no_grad()
    def update_hessian(self, tokens: Optional[Union[float, torch.Tensor]] = None) -> None:
        """
        Take in an estimate from the gradients, ``tokens * g^2``: call it after the backward pass of
        a mean loss with labels drawn from the model's predictions. Gradients stay as they are.

        :param tokens: How many tokens the loss is a mean over, over all ranks and micro-batches,
            a number or a 0-d tensor. Default is :data:`batch_tokens`.

        :raises OLMoConfigurationError: If neither is given, or no parameter has a gradient.
        """
        members = [member for group in self.param_groups for member in self._members(group)]
        factor = self.batch_tokens if tokens is None else tokens
        if factor is None:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'batch_tokens' is None, allowed is the number of tokens "
                "that the loss is a mean over"
            )
        if not members:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: update_hessian() was called and no parameter has a "
                "gradient, allowed is a call after a backward pass"
            )
        # The sum of squares is finite only if each of them is.
        norms = [torch.linalg.vector_norm(m.grad, dtype=m.state[STEP].dtype) for m in members]
        self._take_in(members, [x * x * factor for x in norms], lambda g: (g * g) * factor)

    @torch.no_grad()
    def update_hessian_from_estimates(self, estimates: Mapping[str, torch.Tensor]) -> None:
        """
        Take in estimates of the diagonal of the mean loss's Hessian, as they are.

        :param estimates: By canonical name, of the parameter's shape: a :class:`DTensor` where the
            parameter is one, or its local part. Parameters without one keep their average.

        :raises OLMoConfigurationError: If there are none, or a name or shape is not a parameter's.
        """
        params = {self.name_of(param): param for param in self.state}
        members = []
        for slot, (name, estimate) in enumerate(estimates.items()):
            if name not in params:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: there is an estimate for '{name}', allowed are names "
                    f"of trainable parameters: {', '.join(sorted(params)[:3])}, ..."
                )
            param = params[name]
            local = self._local_estimate(name, param, estimate)
            members.append(Member(slot, param, local, self.state[param]))
        if not members:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'estimates' is empty, allowed is at least one"
            )
        self._take_in(members, [member.grad for member in members], lambda estimate: estimate)

    def _local_estimate(
        self, name: str, param: torch.Tensor, estimate: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(estimate, DTensor) and isinstance(param, DTensor):
            if estimate.placements != param.placements:
                estimate = estimate.redistribute(param.device_mesh, param.placements)
        local, expected = get_local_tensor(estimate), get_local_tensor(param)
        if local.shape != expected.shape:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the estimate for '{name}' has the shape "
                f"{tuple(estimate.shape)}, allowed is {tuple(param.shape)}"
            )
        return local

    def _take_in(
        self,
        members: Sequence[Member],
        checked: Sequence[torch.Tensor],
        estimate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """
        ``h <- b2 h + (1 - b2) estimate(grad)``, or nothing, on all ranks alike.

        :param checked: For each member what is finite only if its estimate is.
        """
        finite = all_finite([member.param for member in members], checked)
        beta2_of = {p: g["betas"][1] for g in self.param_groups for p in g["params"]}
        for group in self.param_groups:
            group[HESSIAN_UPDATES] += 1
        for member in members:
            hessian, step = member.local("hessian").view(-1), member.state[HESSIAN_STEP]
            if self._skip_step:
                self._before.setdefault(member.param, (hessian.clone(), step.clone()))
            step.add_(finite)
            grad, beta2 = member.grad.reshape(-1), beta2_of[member.param]
            # Not the numbers with which a step rounds the momentum.
            names = {member.param: f"{self.name_of(member.param)}/hessian"}
            rounding = rounding_of(member, [hessian], names, self.hessian_updates, self._seed)
            for i, j in chunks(hessian):
                new = hessian[i:j].to(step.dtype) * beta2 + estimate(grad[i:j].to(step.dtype)) * (
                    1 - beta2
                )
                write_state([hessian[i:j]], [new], finite, some_of(rounding, i, j))

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """
        Update every parameter that has a gradient.

        :param closure: Re-evaluates the model and returns the loss.

        :returns: What ``closure`` returned.

        :raises OLMoConfigurationError: If no estimate of the Hessian was given yet.
        """
        if self.hessian_updates == 0:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the first step has no estimate of the Hessian, allowed is "
                "a step after one; OLMo-core's trainer gives them with "
                'trainer_config.add_callback("sophia", SophiaCallback()), from '
                "olmo_optim_ext.training import SophiaCallback; a loop of your own calls "
                "update_hessian() or update_hessian_from_estimates()"
            )
        loss = super().step(closure)
        if (proceed := self._proceed) is not None:
            for param, (hessian, count) in self._before.items():
                state = self.state[param]
                write_state(
                    [get_local_tensor(state["hessian"]).view(-1)], [hessian], ~proceed, None
                )
                write_state([state[HESSIAN_STEP]], [count], ~proceed, None)
        self._before = {}
        return loss

    def update(self, work: Sequence[GroupWork]) -> None:
        super().update([each._replace(group=self._with_estimates(each.group)) for each in work])

    def _with_estimates(self, group: Dict[str, Any]) -> Dict[str, Any]:
        # One by one, not from the group: parameters that came later have had fewer.
        counts = [self.state[p][HESSIAN_STEP] for p in group["params"] if p in self.state]
        return {**group, HESSIAN_STEP: torch.stack(counts)}

    @torch.no_grad()
    def clipped_share(self) -> torch.Tensor:
        """
        The share of coordinates in which momentum and Hessian are such that the update is clipped,
        0-d, the same on all ranks. Collective where parameters are sharded.
        """
        params, counts = [], []
        for group in self.param_groups:
            for param in (p for p in group["params"] if p in self.state):
                work = self.state[param][STEP].dtype
                exp_avg, hessian = (
                    get_local_tensor(self.state[param][key]).to(work) for key in self.rule.buffers
                )
                clipped = exp_avg.abs() >= clip_threshold(hessian, group["rho"], group["eps"])
                params.append(param)
                counts.append(clipped.sum(dtype=torch.float64).view(1))
        total = sum_over_shards(params, torch.stack(counts)).sum()
        return (total / sum(param.numel() for param in params)).float()


@OptimConfig.register("sophia")
@dataclass
class SophiaConfig(ExtOptimConfig[Sophia]):
    """
    Config of :class:`Sophia`. Defaults are those of the authors' code, where there are any.
    """

    lr: float = 1e-4
    """Learning rate: no coordinate moves by more in a step, beside the decay. >= 0."""

    betas: Tuple[float, ...] = (0.965, 0.99)
    """
    Decay of the momentum and of the Hessian's average, two numbers in [0, 1). Neither has a bias
    correction.
    """

    rho: float = 0.04
    """
    By how much of the curvature momentum is divided, > 0; the paper's gamma. Larger values clip
    fewer coordinates. The authors choose it so that 10 to 50 percent are not clipped.
    """

    eps: float = 1e-15
    """Added to what momentum is divided by, > 0."""

    weight_decay: float = 0.1
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0."""

    batch_tokens: Optional[int] = None
    """
    The batch factor of the Gauss-Newton-Bartlett estimate, >= 1: the tokens of the global batch,
    over all ranks and micro-batches. The experiment system fills it in. By default the callback
    counts the tokens of each estimate. The authors' factor of a step is part of the estimate here,
    as in the paper, so that an estimate may come from a part of the batch.
    """

    hessian_update_interval: int = 10
    """Steps from one estimate of the Hessian to the next, >= 1."""

    estimator: HessianEstimator = HessianEstimator.gauss_newton_bartlett
    """``gauss_newton_bartlett`` or ``hutchinson``."""

    hutchinson_epsilon: float = 1e-3
    """
    How far each parameter is moved, up or down, for the two gradients of Hutchinson's estimate,
    > 0. Ours: no implementation takes differences.
    """

    @classmethod
    def optimizer(cls) -> Type[Sophia]:
        return Sophia
