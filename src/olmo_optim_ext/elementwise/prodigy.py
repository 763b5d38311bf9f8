"""
Prodigy (Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner",
arXiv:2306.06101, algorithm 4), as in the authors' code: Adam whose learning rate follows from an
estimate ``d`` of the distance between the first weights and a solution.
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions, GroupWork
from ..engine.elementwise import (
    ElementwiseOptimizer,
    ElementwiseRule,
    Scalar,
    WholeSums,
    apply_rule,
    bias_correction,
    first_or,
    sum_over_model,
)
from ..engine.write import write_state
from .moments import adam_moments

__all__ = ["Prodigy", "ProdigyConfig"]

BUFFERS = ("exp_avg", "exp_avg_sq", "grad_sum", "first_param")
PROGRESS = "prodigy"
"""State key of ``d``, the largest ``d``, the sum of ``<g, p_0 - p>`` and the updates so far."""

# Keys of the groups that are given to the functions below, beside the hyperparameters.
_D, _D_STEP, _D_NEXT, _RUNS = "d", "d_step", "d_next", "runs"


def prodigy_decay(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    return 1 - group[_D_STEP] * group["weight_decay"]


def prodigy_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    """
    Whether this is the parameter's first update; the weight of ``g`` in ``s``, the decay of ``s``;
    ``d lr``, ``d_next eps``, and the betas with ``d`` and ``d^2`` as factors of new gradients. With
    a learning rate of 0 all that is kept stays as it is.
    """
    d, runs, (beta1, beta2) = group[_D], group[_RUNS], group["betas"]
    relative = runs * d / group["d0"]
    of_grad = relative * (d if group["safeguard_warmup"] else group[_D_STEP])
    kept = [beta * runs + (1 - runs) for beta in (slow_beta(group), beta1, beta2)]
    return (
        first_or(step, 1.0, 0.0),
        of_grad,
        kept[0],
        group[_D_STEP],
        group[_D_NEXT] * group["eps"],
        *(kept[1], runs * d * (1 - beta1), kept[2], runs * d * d * (1 - beta2)),
    )


def slow_beta(group: Mapping[str, Any]) -> float:
    """``b3``, by default ``sqrt(b2)``."""
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]


def progress(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_sum: torch.Tensor,
    first_param: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """``<g, p_0 - p>`` and ``||s||_1``, with ``s`` already updated."""
    first, of_grad, beta3, *_ = scalars.unbind()
    moved = torch.where(first > 0, 0.0, first_param - param)
    grad_sum = grad_sum * beta3 + grad * of_grad
    return (grad * moved).sum(dtype=torch.float64), grad_sum.abs().sum(dtype=torch.float64)


def prodigy(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_sum: torch.Tensor,
    first_param: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) d g``, ``v <- b2 v + (1 - b2) d^2 g^2``,
    ``s <- b3 s + d / d_0 * d lr * g``, ``p <- (1 - d lr wd) p - d lr m / (sqrt(v) + d_next eps)``.
    With ``use_bias_correction`` ``lr`` has Adam's corrections; with ``safeguard_warmup`` ``s`` is
    without ``lr``.
    """
    first, of_grad, beta3, step_size, eps, *betas = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    first_param = torch.where(first > 0, param, first_param)
    step = step_size * (exp_avg / (exp_avg_sq.sqrt() + eps))
    return step, exp_avg, exp_avg_sq, grad_sum * beta3 + grad * of_grad, first_param


_PROGRESS_SUMS = WholeSums(progress, lambda *_: ())


class Prodigy(ElementwiseOptimizer):
    """
    Prodigy, with one ``d`` for the whole model. For the arguments see :class:`ProdigyConfig`.

    :raises OLMoConfigurationError: If a value is out of its range, or groups differ in what ``d``
        follows from: ``lr``, ``betas``, ``beta3``, ``d0``, ``d_coef``, ``growth_rate``,
        ``use_bias_correction`` and ``safeguard_warmup``.
    """

    rule = ElementwiseRule(BUFFERS, prodigy_scalars, prodigy, decay=prodigy_decay)
    exact_buffers = frozenset({"first_param"})
    nullable = frozenset({"beta3", "growth_rate"})

    shared_hyperparameters = (
        *("lr", "betas", "beta3", "d0", "d_coef", "growth_rate"),
        *("use_bias_correction", "safeguard_warmup"),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: Tuple[float, ...] = (0.9, 0.999),
        beta3: Optional[float] = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: Optional[float] = None,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
        }
        super().__init__(params, defaults, **engine)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        first = {**self.defaults, **(self.param_groups[0] if self.param_groups else group)}
        for key in self.shared_hyperparameters:
            mine, theirs = group[key], first[key]
            if key == "lr" and "initial_lr" in first:
                theirs = first["initial_lr"]
            if isinstance(mine, torch.Tensor) or isinstance(theirs, torch.Tensor):
                continue  # reading them would be a sync
            if mine != theirs:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: '{key}' of a group is {mine!r} and {theirs!r} of "
                    "another, allowed is one for all, as they share the estimate of the distance"
                )

    def shared_state(self, device: torch.device) -> Dict[str, torch.Tensor]:
        # Filled on the device by the first update: d0 may be another when a checkpoint is loaded.
        new = torch.zeros(4, dtype=torch.float64, device=device)
        return {**super().shared_state(device), PROGRESS: new}

    def update(self, work: Sequence[GroupWork]) -> None:
        group, proceed, state = work[0].group, work[0].proceed, self.shared[PROGRESS]
        saved_d, saved_max, numerator, updates = state.unbind()
        fresh = updates == 0
        d = torch.where(fresh, group["d0"], saved_d)
        d_max = torch.where(fresh, group["d0"], saved_max)
        step_size = d * group["lr"] * _correction(group, updates + 1)

        runs = (step_size > 0).to(d)
        known = _with(work, {_D: d, _D_STEP: step_size, _D_NEXT: d, _RUNS: runs})
        inner, size = sum_over_model(self.rule, _PROGRESS_SUMS, known, self._compile).unbind()
        numerator = slow_beta(group) * numerator + d / group["d0"] * step_size * inner
        # With a rate of 0, and as long as all gradients are zero, nothing moves.
        moves = (size > 0) & (runs > 0)
        estimate = group["d_coef"] * numerator / torch.where(moves, size, 1.0)
        d_next = torch.where(d == group["d0"], torch.maximum(d, estimate), d)
        d_max = torch.maximum(d_max, estimate)
        growth = group["growth_rate"]
        d_next = d_max if growth is None else torch.minimum(d_max, d_next * growth)
        d_next = torch.where(moves, d_next, d)

        new = torch.where(moves, torch.stack([d_next, d_max, numerator, updates + 1]), state)
        moving = torch.where(moves, step_size, 0.0)
        apply_rule(
            self.rule,
            _with(work, {_D: d, _D_STEP: moving, _D_NEXT: d_next, _RUNS: runs}),
            *(self._names, self._compile, self._seed),
        )
        write_state([state], [new], proceed, None)


def _correction(group: Mapping[str, Any], updates: torch.Tensor) -> Scalar:
    """``sqrt(1 - b2^k) / (1 - b1^k)`` if it is asked for."""
    if not group["use_bias_correction"]:
        return 1.0
    beta1, beta2 = group["betas"]
    return bias_correction(beta2, updates).sqrt() / bias_correction(beta1, updates)


def _with(work: Sequence[GroupWork], more: Mapping[str, torch.Tensor]) -> List[GroupWork]:
    return [each._replace(group={**each.group, **more}) for each in work]


@OptimConfig.register("prodigy")
@dataclass
class ProdigyConfig(ExtOptimConfig[Prodigy]):
    """
    Config of :class:`Prodigy`. Defaults are those of the authors' code.
    """

    lr: float = 1.0
    """
    What the estimated rate is multiplied by, >= 0, the same in all groups. It is meant to stay 1
    but for a schedule.
    """

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    beta3: Optional[float] = None
    """Decay of the sums that ``d`` is estimated from, in [0, 1). ``None`` takes ``sqrt(b2)``."""

    eps: float = 1e-8
    """Times ``d``, added to the root of the second moment, >= 0."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = True
    """
    ``True``: a step multiplies parameters by ``1 - d lr weight_decay``. ``False``: L2,
    ``weight_decay * p`` is added to the gradient.
    """

    use_bias_correction: bool = False
    """Multiply the rate by Adam's bias corrections."""

    safeguard_warmup: bool = False
    """Leave ``lr`` out of the sum of gradients, or a warm-up of ``lr`` would inflate ``d``."""

    d0: float = 1e-6
    """The first ``d``, > 0."""

    d_coef: float = 1.0
    """What estimates are multiplied by, > 0: the way to ask for another rate."""

    growth_rate: Optional[float] = None
    """By how much ``d`` may grow in an update, >= 1. ``None`` does not limit it."""

    @classmethod
    def optimizer(cls) -> Type[Prodigy]:
        return Prodigy
