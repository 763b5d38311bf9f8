"""
Sophia (Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv:2305.14342): momentum over a moving average of the Hessian's diagonal, clipped
in each coordinate. Its estimates come from
:class:`~olmo_optim_ext.training.hessian.SophiaCallback`.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Type

import torch
from olmo_core.config import StrEnum
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import STEP, EngineOptions
from ..engine.elementwise import ElementwiseRule, Scalar
from ..engine.hyperparameters import POSITIVE, check_hyperparameters, to_choice
from ..engine.moments import Beta, Moment
from ..engine.placement import sum_over_shards
from .hessian import HESSIAN, HESSIAN_STEP, HessianOptimizer

__all__ = ["HessianEstimator", "Sophia", "SophiaConfig"]


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


class Sophia(HessianOptimizer):
    """
    Sophia. For the arguments see :class:`SophiaConfig`.

    In OLMo-core's trainer a ``SophiaCallback`` gives the estimates of the Hessian; a loop of one's
    own calls :meth:`update_hessian` or :meth:`update_hessian_from_estimates`, at first before the
    first step.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    # The Hessian comes last, as a step does not write it.
    rule = ElementwiseRule(
        ("exp_avg", HESSIAN),
        sophia_scalars,
        sophia,
        moments=(Moment("exp_avg", 1, Beta("betas", 0), corrected=False),),
    )
    how_to_estimate = (
        'OLMo-core\'s trainer gives them with trainer_config.add_callback("sophia", '
        "SophiaCallback()), from olmo_optim_ext.training import SophiaCallback; a loop of your own "
        "calls update_hessian() or update_hessian_from_estimates()"
    )
    allowed = {"eps": POSITIVE}

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
        hessian_batch_fraction: float = 0.5,
        hutchinson_epsilon: float = 1e-3,
        **engine: Unpack[EngineOptions],
    ):
        name = type(self).__name__
        options: Dict[str, Any] = dict(
            batch_tokens=batch_tokens,
            hessian_update_interval=hessian_update_interval,
            hessian_batch_fraction=hessian_batch_fraction,
            hutchinson_epsilon=hutchinson_epsilon,
        )
        check_hyperparameters(options, name)
        self.hessian_update_interval = hessian_update_interval
        self.estimator = to_choice(HessianEstimator, estimator, "estimator", name)
        self.hessian_batch_fraction = hessian_batch_fraction
        self.hutchinson_epsilon = hutchinson_epsilon
        defaults = dict(lr=lr, betas=betas, rho=rho, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, batch_tokens, **engine)

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

    hessian_batch_fraction: float = 0.5
    """
    The share of the batch that an estimate is made of, in (0, 1]: each rank's first instances, one
    at least. The paper takes 240 sequences of 480, and 32 for ``hutchinson``.
    """

    hutchinson_epsilon: float = 1e-3
    """
    How far each parameter is moved, up or down, for the two gradients of Hutchinson's estimate,
    > 0. Ours: no implementation takes differences.
    """

    @classmethod
    def optimizer(cls) -> Type[Sophia]:
        return Sophia
