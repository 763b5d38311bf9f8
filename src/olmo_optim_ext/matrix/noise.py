"""
What ``muon_orthonoise`` and its control ``muon_isotropic`` share: Muon whose momentum gets noise
before it is orthogonalised, while its effective rank is low.
"""

from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import numpy as np
import torch
from olmo_core.config import StrEnum
from typing_extensions import Unpack

from ..engine.base import CALLS
from ..engine.hyperparameters import to_choice, to_flag
from ..engine.matrix import Owned
from ..engine.moments import Beta, Moment
from ..engine.random import generator, random_signs
from ..linalg.spectrum import effective_rank_of, lanczos
from .muon_family import MuonFamily, MuonFamilyConfig, MuonOptions

__all__ = [
    "AlphaAnnealing",
    "NoiseOptions",
    "NoisyMuon",
    "NoisyMuonConfig",
    "alpha_at",
]

SPECTRUM, FIRED, NOISE = "spectrum", "fired", "noise"

PROBES, STEPS = 8, 16
"""
Of Lanczos: exact to rounding up to a short side of 128, and coarse beyond: at 1024 a decaying
spectrum was seen 18 % off (plans/muon_orthonoise.md). The host takes 3 ms for a matrix; for 16
probes it takes 18.
"""


class AlphaAnnealing(StrEnum):
    """How the strength of the noise goes from ``alpha`` to ``alpha_end``, where it then stays."""

    none = "none"
    """It stays ``alpha``."""

    linear = "linear"
    """``alpha + (alpha_end - alpha) t / anneal_steps``."""

    exponential = "exponential"
    """``alpha (alpha_end / alpha)^(t / anneal_steps)``."""


def alpha_at(group: Mapping[str, Any], step: int) -> float:
    """The strength of the noise in a step, counted from 0: see :class:`AlphaAnnealing`."""
    alpha, end, annealing = group["alpha"], group["alpha_end"], group["annealing"]
    progress = min(step / group["anneal_steps"], 1.0)
    if annealing == AlphaAnnealing.linear:
        return alpha + (end - alpha) * progress
    if annealing == AlphaAnnealing.exponential:
        return alpha * (end / alpha) ** progress
    return alpha


class NoiseOptions(MuonOptions, total=False):
    """Keywords of :class:`NoisyMuon`; for their meaning see :class:`NoisyMuonConfig`."""

    alpha: float
    alpha_end: float
    annealing: AlphaAnnealing
    anneal_steps: int
    start_step: int
    rank_threshold: Optional[float]
    rank_interval: int
    persist_noise: bool


class NoisyMuon(MuonFamily):
    """
    Heavy-ball momentum ``M <- mu M + g``, and ``u = g + mu M`` (Nesterov) or ``M``. Where noise is
    due, ``u + alpha_t |g|_F N`` is orthogonalised in place of ``u``; a variant says with
    :meth:`directions` what ``N`` is, of Frobenius norm ``sqrt(min(out, in))``, and with
    :meth:`smooth` what else is done.

    Whether it is due the host decides without waiting for the device: the effective rank that is
    measured in one step counts from the next one on. Nothing but state goes into the decision, so
    that a resume continues it.

    :param params: Groups with ``algorithm`` set to the variant's or ``"adamw"``.
    :param own: Hyperparameters of groups that only the variant has.
    """

    matrix_moments = (Moment("momentum", 1, Beta("momentum"), corrected=False, heavy_ball=True),)
    measures = True
    host_factors = (SPECTRUM,)
    nullable = frozenset({"rank_threshold"})

    def __init__(
        self,
        params: Any,
        own: Mapping[str, Any],
        alpha: float = 1e-2,
        alpha_end: float = 1e-3,
        annealing: AlphaAnnealing = AlphaAnnealing.exponential,
        anneal_steps: int = 1000,
        start_step: int = 0,
        rank_threshold: Optional[float] = 0.5,
        rank_interval: int = 10,
        persist_noise: bool = False,
        **options: Unpack[MuonOptions],
    ):
        self._effective_ranks: Dict[str, Tuple[np.ndarray, float]] = {}
        own = dict(
            alpha=alpha,
            alpha_end=alpha_end,
            annealing=str(annealing),
            anneal_steps=anneal_steps,
            start_step=start_step,
            rank_threshold=rank_threshold,
            rank_interval=rank_interval,
            persist_noise=persist_noise,
            **own,
        )
        super().__init__(params, own, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        name = type(self).__name__
        to_choice(AlphaAnnealing, group["annealing"], "annealing", name)
        to_flag(group["persist_noise"], "persist_noise", name)

    def directions(self, gaussian: torch.Tensor) -> torch.Tensor:
        """``N``, of Gaussian matrices ``(k, out, in)`` in float32."""
        raise NotImplementedError

    def smooth(self, group: Mapping[str, Any], noisy: torch.Tensor) -> torch.Tensor:
        """What is orthogonalised in place of noisy matrices ``(k, out, in)``, at least float32."""
        return noisy

    def measure(
        self,
        group: Mapping[str, Any],
        grads: Sequence[torch.Tensor],
        add: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """``|g|_F^2``, ``(n, 1)``."""
        # In float64, in which no square of a float32 overflows or is lost.
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        return add(torch.stack(norms).square().unsqueeze(-1))

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        """``M <- mu M + g``; to be orthogonalised is ``g + mu M`` with the new ``M``, or ``M``."""
        mu = group["momentum"]
        momentum = buffers[0] * mu + grad
        return grad + momentum * mu if group["nesterov"] else momentum, momentum

    def factor_shapes(
        self, group: Mapping[str, Any], n_out: int, n_in: int
    ) -> Dict[str, Tuple[int, ...]]:
        shapes: Dict[str, Tuple[int, ...]] = {FIRED: (1,)}
        if group["rank_threshold"] is not None:
            shapes[SPECTRUM] = _spectrum_shape(n_out, n_in)
        if group["persist_noise"]:
            shapes[NOISE] = (n_out, n_in)
        return shapes

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        x, factors = owned.x, {}
        work = torch.promote_types(x.dtype, torch.float32)
        ahead, kept = 1.0, None
        if group["persist_noise"]:
            # Momentum is linear: M + E is momentum with the noise in it, and E stays here.
            ahead = group["momentum"] if group["nesterov"] else 1.0
            kept = owned.factors[NOISE] * group["momentum"]
            x = x.to(work) + kept * ahead
        if self._is_measured(group, owned):
            factors[SPECTRUM] = lanczos(x, self._probes(owned), STEPS)
        if owned.phase:
            noise = self._noise(group, owned).to(work)
            x = self.smooth(group, x.to(work) + noise * ahead)
            factors[FIRED] = owned.factors[FIRED] + 1
            if kept is not None:
                kept = kept + noise
        if kept is not None:
            factors[NOISE] = kept
        return self.polar(x.to(owned.x.dtype)), factors

    def report(
        self, group: Mapping[str, Any], owned: Owned, updates: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        fires = float(owned.phase)
        return {
            **super().report(group, owned, updates),
            "noise scale": self._scales(group, owned) * fires,
            "noise fired": owned.factors[FIRED][:, 0].clone(),
        }

    def _is_measured(self, group: Mapping[str, Any], owned: Owned) -> bool:
        if group["rank_threshold"] is None:
            return False
        return (owned.call - 1) % group["rank_interval"] == 0

    def phase(
        self,
        group: Mapping[str, Any],
        name: str,
        shape: Tuple[int, int],
        on_host: Mapping[str, np.ndarray],
    ) -> bool:
        """Whether a matrix gets noise."""
        if group[CALLS] - 1 < group["start_step"]:
            return False
        threshold = group["rank_threshold"]
        if threshold is None:
            return True
        return self._effective_rank(name, on_host[SPECTRUM]) < threshold * min(shape)

    def _effective_rank(self, name: str, coefficients: np.ndarray) -> float:
        """As last measured; infinite before the first measurement. Kept while they are the same."""
        known = self._effective_ranks.get(name)
        if known is None or not np.array_equal(known[0], coefficients):
            rank = np.inf
            if coefficients.any() and np.isfinite(coefficients).all():
                rank = float(effective_rank_of(coefficients[None])[0])
            known = self._effective_ranks[name] = (coefficients.copy(), rank)
        return known[1]

    def _scales(self, group: Mapping[str, Any], owned: Owned) -> torch.Tensor:
        """``alpha_t |g|_F``, ``(k,)``."""
        assert owned.numbers is not None
        return owned.numbers[:, 0].sqrt() * alpha_at(group, owned.call - 1)

    def _noise(self, group: Mapping[str, Any], owned: Owned) -> torch.Tensor:
        """``alpha_t |g|_F N``, in float32 or float64."""
        shape, device = owned.x.shape[-2:], owned.x.device
        sources = [generator(self._seed, owned.call, n, "noise", device) for n in owned.names]
        drawn = [torch.randn(shape, generator=source, device=device) for source in sources]
        scale = self._scales(group, owned).to(torch.float32)[:, None, None]
        return self.directions(torch.stack(drawn)) * scale

    def _probes(self, owned: Owned) -> torch.Tensor:
        shape = (min(owned.x.shape[-2:]), PROBES)
        names, call = owned.names, owned.call
        drawn = [random_signs(shape, self._seed, call, name, "probes", owned.x) for name in names]
        return torch.stack(drawn)


def _spectrum_shape(n_out: int, n_in: int) -> Tuple[int, ...]:
    """Of what Lanczos returns for a matrix."""
    x = torch.empty(1, n_out, n_in, device="meta")
    return tuple(lanczos(x, x.new_empty(1, min(n_out, n_in), PROBES), STEPS).shape[1:])


Opt = TypeVar("Opt", bound=NoisyMuon)


@dataclass
class NoisyMuonConfig(MuonFamilyConfig[Opt], Generic[Opt]):
    """Fields of the configs of Muon with noise; the author is that of project-muon-nolah."""

    alpha: float = 1e-2
    """
    Strength of the noise in the first step, relative to the Frobenius norm of the gradient, > 0.
    As in the author's code.
    """

    alpha_end: float = 1e-3
    """
    Strength from step ``anneal_steps`` on, > 0. What the author's code has after 1000 steps, where
    it does not stop.
    """

    annealing: AlphaAnnealing = AlphaAnnealing.exponential
    """How the strength goes from ``alpha`` to ``alpha_end``. As in the author's code."""

    anneal_steps: int = 1000
    """In how many steps, >= 1. As in the author's code."""

    start_step: int = 0
    """How many steps are without noise at first, >= 0. The author's code has none."""

    rank_threshold: Optional[float] = 0.5
    """
    Noise is due while the effective rank of the momentum is below this share of ``min(out, in)``,
    in (0, 1]. ``None`` gives noise in every step. As in the author's code.
    """

    rank_interval: int = 10
    """
    Every how many steps the effective rank is measured, >= 1. The author's code does in each, by
    an SVD; momentum of 0.95 remembers 20 steps.
    """

    persist_noise: bool = False
    """
    Keep the noise in the momentum, as the author's code does: 4 bytes more per element of a matrix.
    """
