"""
PSGD Kron: momentum, whitened by a preconditioner with Kronecker factors (Li, arXiv:1512.04202 and
arXiv:2211.04422; the rule is that of the package kron_torch).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Dict, Mapping, Optional, Tuple, Type

import torch
import torch.nn as nn
from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..engine.base import ALGORITHM
from ..engine.elementwise import bias_correction
from ..engine.hyperparameters import to_choice, to_flag
from ..engine.layout import MatrixLayout
from ..engine.matrix import Owned
from ..engine.moments import Beta, Moment
from ..engine.random import generator, stream
from ..engine.roles import ParamRole, Role
from ..linalg.kronecker import balanced, fit_by_division, fit_by_products, precondition
from .base import AdamWOptions
from .preconditioned import PreconditionedConfig, PreconditionedOptimizer

__all__ = [
    "Kron",
    "KronConfig",
    "KronFit",
    "MemorySaveMode",
    "TrustRegion",
    "UpdateSchedule",
    "clipped",
    "damped",
]

MOMENTUM = "owner_momentum"
FACTORS, LIPSCHITZ = ("q_left", "q_right"), ("lipschitz_left", "lipschitz_right")


class KronFit(StrEnum):
    """How the factors are fitted."""

    lie = "lie"
    """``dQ = E Q`` on triangular factors, with two triangular solves: kron_torch."""

    pro = "pro"
    """``dQ = Q^1/2 E Q^3/2`` on full factors, products only: later versions of psgd_torch."""


class MemorySaveMode(StrEnum):
    """Which factors are diagonal, beside those that are too large."""

    none = "none"
    """None of them."""

    one_diag = "one_diag"
    """That of the larger side; of square matrices the right one."""

    smart_one_diag = "smart_one_diag"
    """That of the larger side, unless the matrix is square."""

    all_diag = "all_diag"
    """All of them."""


class TrustRegion(StrEnum):
    """How large the update of a matrix may be before the learning rate."""

    rms = "rms"
    """An RMS of 1.1 at most: kron_torch."""

    amplitude = "amplitude"
    """An RMS of 2 at most, and then each element within 10: psgd_torch."""

    none = "none"
    """As it is."""


class UpdateSchedule:
    """
    In which calls preconditioners are updated, as a function of the number of the call alone: when
    the calls since the last update are ``1 / p`` or more, where in call ``n``, from 0 on::

        p = clip(prob_max exp(-decay (n - flat_start)), prob_min, prob_max)
    """

    def __init__(self, prob_max: float, prob_min: float, decay: float, flat_start: int):
        self._settings = prob_max, prob_min, decay, flat_start
        self._restart()

    def _restart(self) -> None:
        self._call, self._waited, self._due = 0, 0, False

    def is_due(self, call: int) -> bool:
        """:param call: From 1 on."""
        if call < self._call:
            self._restart()
        while self._call < call:
            self._waited += 1
            self._due = self._waited >= 1 / self.probability(self._call)
            self._waited = 0 if self._due else self._waited
            self._call += 1
        return self._due

    def probability(self, n: int) -> float:
        prob_max, prob_min, decay, flat_start = self._settings
        return min(prob_max, max(prob_min, prob_max * math.exp(-decay * max(0, n - flat_start))))


def damped(x: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """``x + sqrt(eps) mean|x| v`` of matrices ``(k, m, n)``, with the eps of float32."""
    scale = torch.finfo(torch.float32).eps ** 0.5
    return x + scale * x.abs().mean((-2, -1), keepdim=True) * probe


def clipped(x: torch.Tensor, factor: torch.Tensor, region: str) -> torch.Tensor:
    """
    ``factor x`` of matrices ``(k, m, n)``, in their :class:`TrustRegion`. Without one, of matrices
    whose squares overflow, zero.

    :param factor: Shape ``(k, 1, 1)``.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = torch.where(norm.isfinite(), x, 0.0)
    if region == TrustRegion.none:
        return x * factor
    rms = norm * factor / math.sqrt(x.shape[-2] * x.shape[-1])
    largest = 1.1 if region == TrustRegion.rms else 2.0
    x = x * (factor * (largest / (rms + 1e-12)).clamp(max=1.0))
    return x.clamp_(-10.0, 10.0) if region == TrustRegion.amplitude else x


class KronOptions(AdamWOptions, total=False):
    """Keywords of :class:`Kron`; for their meaning see :class:`KronConfig`."""

    lr: float
    momentum: float
    weight_decay: float
    update: KronFit
    precond_lr: float
    precond_init_scale: float
    precond_update_prob_max: float
    precond_update_prob_min: float
    precond_update_prob_decay: float
    precond_update_prob_flat_start: int
    balance_prob: float
    max_size_triangular: int
    min_ndim_triangular: int
    memory_save_mode: MemorySaveMode
    momentum_into_precond_update: bool
    trust_region: TrustRegion
    author_noise: bool


class Kron(PreconditionedOptimizer):
    """
    ``m <- b m + (1 - b) g``, ``W <- (1 - lr wd) W - lr clip(P m / (1 - b^t))``, with ``P = Q^T Q``
    and a factor ``Q`` for each side, which :func:`~olmo_optim_ext.linalg.kronecker.fit_by_division`
    fits in the calls of :class:`UpdateSchedule`.

    Probes are standard normal, from (seed, call, name). All state of a matrix belongs to the rank
    that owns it. For the arguments see :class:`KronConfig`.

    :param params: Groups with ``algorithm`` set to ``"kron"`` or ``"adamw"``;
        ``KronConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group follows Kron.
    """

    algorithm = "kron"
    matrix_moments = (Moment(MOMENTUM, 1, Beta("momentum")),)

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        update: KronFit = KronFit.lie,
        precond_lr: float = 0.1,
        precond_init_scale: float = 1.0,
        precond_update_prob_max: float = 1.0,
        precond_update_prob_min: float = 0.03,
        precond_update_prob_decay: float = 0.001,
        precond_update_prob_flat_start: int = 500,
        balance_prob: float = 0.01,
        max_size_triangular: int = 8192,
        min_ndim_triangular: int = 2,
        memory_save_mode: MemorySaveMode = MemorySaveMode.none,
        momentum_into_precond_update: bool = True,
        trust_region: TrustRegion = TrustRegion.rms,
        author_noise: bool = False,
        **options: Unpack[AdamWOptions],
    ):
        self._schedules: Dict[Tuple[Any, ...], UpdateSchedule] = {}
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            update=str(update),
            precond_lr=precond_lr,
            precond_init_scale=precond_init_scale,
            precond_update_prob_max=precond_update_prob_max,
            precond_update_prob_min=precond_update_prob_min,
            precond_update_prob_decay=precond_update_prob_decay,
            precond_update_prob_flat_start=precond_update_prob_flat_start,
            balance_prob=balance_prob,
            max_size_triangular=max_size_triangular,
            min_ndim_triangular=min_ndim_triangular,
            memory_save_mode=str(memory_save_mode),
            momentum_into_precond_update=momentum_into_precond_update,
            trust_region=str(trust_region),
            author_noise=author_noise,
        )
        super().__init__(params, defaults, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        to_choice(KronFit, group["update"], "update", name)
        to_choice(MemorySaveMode, group["memory_save_mode"], "memory_save_mode", name)
        to_choice(TrustRegion, group["trust_region"], "trust_region", name)
        for flag in ("momentum_into_precond_update", "author_noise"):
            to_flag(group[flag], flag, name)
        if group["author_noise"] and not group["momentum_into_precond_update"]:
            raise OLMoConfigurationError(
                f"{name}: 'author_noise' is True, allowed is False where "
                "'momentum_into_precond_update' is, as then the noise is in the gradient alone"
            )
        least, most = (group[f"precond_update_prob_{end}"] for end in ("min", "max"))
        if least > most:
            raise OLMoConfigurationError(
                f"{name}: 'precond_update_prob_min' is {least}, allowed are numbers up to "
                f"'precond_update_prob_max', {most}"
            )

    def factor_shapes(
        self, group: Mapping[str, Any], n_out: int, n_in: int
    ) -> Dict[str, Tuple[int, ...]]:
        shapes: Dict[str, Tuple[int, ...]] = {MOMENTUM: (n_out, n_in)}
        for side, diagonal in sides(group, n_out, n_in).items():
            n = (n_out, n_in)[side]
            shapes[FACTORS[side]] = (n,) if diagonal else (n, n)
            if group["update"] == KronFit.pro:
                shapes[LIPSCHITZ[side]] = (1,)
        return shapes

    def fill_factor(
        self,
        group: Mapping[str, Any],
        name: str,
        factor: torch.Tensor,
        matrix: str,
        shape: Tuple[int, int],
    ) -> None:
        if name in FACTORS:
            scale = group["precond_init_scale"] ** (1 / len(sides(group, *shape)))
            (factor if factor.ndim == 1 else factor.diagonal()).fill_(scale)

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        grad, beta = owned.x, group["momentum"]
        momentum = torch.lerp(owned.factors[MOMENTUM], grad, 1 - beta)
        debias = 1 / bias_correction(beta, owned.step)[:, None, None]
        new, direction = {MOMENTUM: momentum}, momentum
        factors = [owned.factors.get(name) for name in FACTORS]
        if self._schedule(group).is_due(owned.call):
            if self._balances(group, owned.call):
                factors = balanced(factors)
            into = group["momentum_into_precond_update"]
            probe = self._probe(owned)
            noisy = damped(momentum * debias if into else grad, probe)
            # Not of the momentum: it fades for long, and factors would grow with it.
            alive = torch.linalg.vector_norm(grad, ord=torch.inf, dim=(-2, -1)) > 0
            if group["author_noise"] and into:
                direction, debias = noisy, torch.ones_like(debias)
            if group["update"] == KronFit.pro:
                bounds = [owned.factors.get(name) for name in LIPSCHITZ]
                factors, bounds = fit_by_products(
                    factors, bounds, noisy, group["precond_lr"], alive
                )
                new.update({name: x for name, x in zip(LIPSCHITZ, bounds) if x is not None})
            else:
                factors = fit_by_division(factors, noisy, probe, group["precond_lr"], alive)
            new.update({name: q for name, q in zip(FACTORS, factors) if q is not None})
        update = precondition(factors, direction, triangular=group["update"] == KronFit.lie)
        return clipped(update, debias, group["trust_region"]), new

    def _schedule(self, group: Mapping[str, Any]) -> UpdateSchedule:
        names = ("max", "min", "decay", "flat_start")
        settings = tuple(group[f"precond_update_prob_{name}"] for name in names)
        if settings not in self._schedules:
            if len(self._schedules) >= 16:  # somebody changes them from call to call
                self._schedules.clear()
            self._schedules[settings] = UpdateSchedule(*settings)
        return self._schedules[settings]

    def _balances(self, group: Mapping[str, Any], call: int) -> bool:
        """In which updates factors are balanced, from (seed, call)."""
        return stream(self._seed, call, "", "balance") / 2**63 < group["balance_prob"]

    def _probe(self, owned: Owned) -> torch.Tensor:
        x = owned.x
        drawn = [
            torch.randn(
                x.shape[-2:],
                generator=generator(self._seed, owned.call, name, "probe", x.device),
                dtype=x.dtype,
                device=x.device,
            )
            for name in owned.names
        ]
        return torch.stack(drawn)

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return 1.0

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        share = group["precond_update_prob_min"]
        return kron_flops(n_out, n_in, sides(group, n_out, n_in), group, share)

    def flops(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        # Of one of the first steps, which fit more often.
        share = group["precond_update_prob_max"]
        return kron_flops(n_out, n_in, sides(group, n_out, n_in), group, share)


def sides(group: Mapping[str, Any], n_out: int, n_in: int) -> Dict[int, bool]:
    """
    Which sides of an ``(out, in)`` matrix have a factor, 0 for the left and 1 for the right, and
    whether it is diagonal.
    """
    shape, mode = (n_out, n_in), group["memory_save_mode"]
    found = [side for side in (0, 1) if shape[side] > 1] or [0]
    diagonal = {
        side: shape[side] > group["max_size_triangular"]
        or len(found) < group["min_ndim_triangular"]
        or mode == MemorySaveMode.all_diag
        for side in found
    }
    larger = 0 if n_out > n_in else 1
    if mode == MemorySaveMode.one_diag or (
        mode == MemorySaveMode.smart_one_diag and n_out != n_in and len(found) == 2
    ):
        diagonal[larger] = True
    return diagonal


def kron_flops(
    n_out: int, n_in: int, at: Mapping[int, bool], group: Mapping[str, Any], share: float
) -> float:
    """
    Floating point operations of a step, on average: those of the products, of which triangular
    factors need half, and some for each element.

    :param share: Of the steps in which factors are fitted.
    """
    pro, elements = group["update"] == KronFit.pro, 1.0 * n_out * n_in
    applied, fitted = 12 * elements, 20 * elements
    for side, diagonal in at.items():
        if diagonal:
            continue
        n = (n_out, n_in)[side]
        product = 2.0 * n * elements
        applied += (2 if pro else 1) * product
        fitted += 2.5 * product + 7.0 * n**3 if pro else 2 * product + n**3 / 3
    return applied + fitted * share


@OptimConfig.register("kron")
@dataclass
class KronConfig(PreconditionedConfig[Kron]):
    """
    Config of :class:`Kron`. Embeddings, head and vectors follow AdamW (``adamw_*``), unless
    ``precondition_embeddings``, ``precondition_lm_head`` and ``precondition_1d`` say otherwise.
    Parameters with one dimension that Kron takes have no weight decay. Convolutions with the role
    matrix are taken as the squarer of ``(out, rest)`` and ``(rest, width)``.
    """

    lr: float = 3e-4
    """
    Learning rate of matrices, >= 0; about a third of what suits Adam, say the authors. As in
    kron_torch.
    """

    momentum: float = 0.9
    """Decay of the momentum, in [0, 1). As in kron_torch."""

    weight_decay: float = 0.0
    """
    Decoupled: a step multiplies matrices by ``1 - lr * weight_decay``. >= 0. As in kron_torch,
    whose authors advise 3 to 10 times what suits Adam.
    """

    update: KronFit = KronFit.lie
    """How the factors are fitted. As in kron_torch."""

    precond_lr: float = 0.1
    """Step size of the fit, in (0, 1]. As in kron_torch."""

    precond_init_scale: float = 1.0
    """What ``Q_L (x) Q_R`` is at first, times the identity, > 0. As in kron_torch."""

    precond_update_prob_max: float = 1.0
    """
    Share of the calls in which the factors are fitted: in the first ``flat_start``, in (0, 1]. This
    and the next three as in kron_torch.
    """

    precond_update_prob_min: float = 0.03
    """In the long run, in (0, 1]."""

    precond_update_prob_decay: float = 0.001
    """By which the share falls exponentially from the one to the other, per call, >= 0."""

    precond_update_prob_flat_start: int = 500
    """How many calls have the first share, >= 0."""

    balance_prob: float = 0.01
    """
    In which share of these calls the factors of a matrix are scaled to the same size, in [0, 1].
    As in kron_torch.
    """

    max_size_triangular: int = 8192
    """The factor of a side that is larger is diagonal, >= 1. As in kron_torch."""

    min_ndim_triangular: int = 2
    """
    The factors of matrices with fewer sides larger than one are diagonal, >= 1: with 2 those of
    parameters with one dimension, with 3 all. As in kron_torch.
    """

    memory_save_mode: MemorySaveMode = MemorySaveMode.none
    """Which other factors are diagonal. As in kron_torch."""

    momentum_into_precond_update: bool = True
    """Fit the factors to the momentum rather than to the gradient. As in kron_torch."""

    trust_region: TrustRegion = TrustRegion.rms
    """How large an update may be. As in kron_torch."""

    author_noise: bool = False
    """
    Precondition the momentum with the noise that damps the fit, in the calls that fit, as
    kron_torch does in place.
    """

    @classmethod
    def optimizer(cls) -> Type[Kron]:
        return Kron

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        fields = super().group_fields(row, opts)
        if fields[ALGORITHM] == Kron.algorithm and len(row.shape) == 1:
            fields["weight_decay"] = 0.0
        return fields

    def _roles(
        self, model: nn.Module, overrides: Dict[str, Dict[str, Any]]
    ) -> Dict[str, ParamRole]:
        return {
            name: replace(row, layout=_merged(row))
            for name, row in super()._roles(model, overrides).items()
        }


def _merged(row: ParamRole) -> Optional[MatrixLayout]:
    """
    The layout of a parameter with more than two dimensions that stores one matrix: the squarer of
    ``(first, rest)`` and ``(rest, last)``.
    """
    whole = row.layout is not None and len(row.layout.blocks()) == 1 and not row.layout.in_out
    if not whole or len(row.shape) < 3 or row.role == Role.experts:
        return row.layout
    last = row.shape[-1]
    first, rest = math.prod(row.shape[:-1]), math.prod(row.shape[1:])
    if last > 1 and abs(first - last) < abs(row.shape[0] - rest):
        return MatrixLayout((first,), (last,))
    return row.layout
