"""
The contract table: Muon with noise and what it is compared with.
"""

from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import torch

from olmo_optim_ext import (
    AlphaAnnealing,
    GradientGate,
    MuonIsotropicConfig,
    MuonNolahConfig,
    MuonOrthoNoiseConfig,
    PolarMethod,
)
from olmo_optim_ext.engine.random import generator

from .case import MATRICES, Case, MixedShapes, Oracle, adamw_oracle, grads_at
from .muon_cases import BAD_MUON, MUON

Direction = Callable[[np.ndarray], np.ndarray]


def orthonormal(z: np.ndarray) -> np.ndarray:
    tall = z if z.shape[0] >= z.shape[1] else z.T
    q, r = np.linalg.qr(tall)
    q = q @ np.diag(np.sign(np.diag(r)))
    return q if z.shape[0] >= z.shape[1] else q.T


def isotropic(z: np.ndarray) -> np.ndarray:
    return np.sqrt(min(z.shape)) * z / np.sqrt((z * z).sum())


def cubic(u: np.ndarray, steps: int) -> np.ndarray:
    y = u / np.sqrt((u * u).sum())
    for _ in range(steps):
        y = 1.5 * y - 0.5 * y @ y.T @ y
    return y


def effective_rank(x: np.ndarray) -> float:
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def annealed(kind: str, alpha: float, end: float, steps: int) -> Callable[[int], float]:
    def at(t: int) -> float:
        if kind == "none":
            return alpha
        if t >= steps:
            return end
        if kind == "linear":
            return alpha * (1 - t / steps) + end * t / steps
        return alpha ** (1 - t / steps) * end ** (t / steps)

    return at


def exact_polar(u: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(u, full_matrices=False)
    return left * (values > 1e-6 * values[0]) @ right  # a gate may leave a row without signal


def newton_schulz(u: np.ndarray) -> np.ndarray:
    left, s, right = np.linalg.svd(u, full_matrices=False)
    s = s / np.sqrt((s * s).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left * s @ right


def _step(
    w: np.ndarray, u: np.ndarray, t: int, polar: Callable[[np.ndarray], np.ndarray] = exact_polar
) -> np.ndarray:
    lr = 0.01 * (1 - 0.01 * t)
    return w - lr * 0.1 * w - lr * 0.2 * np.sqrt(max(w.shape)) * polar(u)


def _grads(t: int) -> Dict[str, np.ndarray]:
    return {name: g.double().numpy() for name, g in grads_at(t, MixedShapes()).items()}


def noisy(
    direction: Direction,
    cubic_steps: int,
    alpha: Callable[[int], float],
    threshold: Optional[float] = None,
    interval: int = 1,
    start_step: int = 0,
    persist: bool = False,
    nesterov: bool = True,
    polar: Callable[[np.ndarray], np.ndarray] = exact_polar,
) -> Oracle:
    """
    The rule in float64, a matrix at a time, with exact effective ranks and noise that is written
    into the momentum if it persists. Given is only the Gaussian.
    """

    def gaussian(name: str, t: int, shape: Any) -> np.ndarray:
        source = generator(0, t + 1, name, "noise", torch.device("cpu"))
        return torch.randn(shape, generator=source).double().numpy()

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        out, fired = adamw_oracle(start, steps), 0
        grads = [_grads(t) for t in range(steps)]
        for name in MATRICES:
            w = start[name].double().numpy()
            m, low = np.zeros_like(w), False
            for t in range(steps):
                g = grads[t][name]
                m = 0.9 * m + g
                u = g + 0.9 * m if nesterov else m
                fires = t >= start_step and (threshold is None or low)
                if threshold is not None and t % interval == 0:
                    ratio = effective_rank(u) / min(w.shape)
                    assert abs(ratio - threshold) > 1e-4, "too close to tell"
                    low = ratio < threshold
                if fires:
                    fired += 1
                    scale = alpha(t) * np.sqrt((g * g).sum())
                    noise = scale * direction(gaussian(name, t, w.shape))
                    if persist:
                        m = m + noise
                        u = g + 0.9 * m if nesterov else m
                    else:
                        u = u + noise
                    u = cubic(u, cubic_steps) if cubic_steps else u
                w = _step(w, u, t, polar)
            out[name] = torch.from_numpy(w)
        always = len(MATRICES) * max(steps - start_step, 0)
        assert fired == always if threshold is None else 0.1 * always < fired < 0.9 * always
        return out

    return run


def nolah(gate: str, scale: float, projection: bool, nesterov: bool = True) -> Oracle:
    """The rule in float64, with ``torch.quantile``."""
    gates: Dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "tanh": lambda g: np.tanh(g) * np.abs(g),
        "sigmoid": lambda g: g / (1 + np.exp(-g)),
        "relu": lambda g: np.maximum(g, 0),
        "none": lambda g: g,
    }

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        out = adamw_oracle(start, steps)
        grads = [_grads(t) for t in range(steps)]
        for name in MATRICES:
            w = start[name].double().numpy()
            m = np.zeros_like(w)
            for t in range(steps):
                g = grads[t][name]
                step = gates[gate](g)
                top = torch.quantile(torch.from_numpy(g).abs(), 0.95).item()
                m = (0.9 * m + step) * np.where(np.abs(g) > top, scale, 1.0)
                u = step + 0.9 * m if nesterov else m
                w = _step(w, u / (1 + np.exp(-u)) if projection else u, t)
            out[name] = torch.from_numpy(w)
        return out

    return run


FROM_THE_START: Dict[str, Any] = dict(
    **MUON, rank_threshold=None, alpha=0.05, alpha_end=1e-5, anneal_steps=100
)
"""Noise in every step, and gone where small problems are to be solved."""

ALWAYS: Dict[str, Any] = dict(**FROM_THE_START, start_step=4)
"""The same from the fifth step on."""

EXACT: Dict[str, Any] = dict(**ALWAYS, polar_method=PolarMethod.svd)
FADING = annealed("exponential", 0.05, 1e-5, 100)

TRIGGERED: Dict[str, Any] = dict(rank_threshold=0.9, rank_interval=3, start_step=2, alpha=0.2)
"""A threshold at which some matrices get noise in some steps; see :func:`noisy`."""

BAD_NOISE: List[Dict[str, Any]] = [
    *BAD_MUON,
    {"alpha": 0.0},
    {"alpha": "0.1"},
    {"alpha_end": -1e-3},
    {"annealing": "cosine"},
    {"anneal_steps": 0},
    {"start_step": -1},
    {"start_step": 1.5},
    {"rank_threshold": 0.0},
    {"rank_threshold": 1.1},
    {"rank_interval": 0},
    {"persist_noise": "no"},
]


def _noise_oracles(config: Any, direction: Direction, cubic_steps: int) -> List[Any]:
    triggered = annealed("exponential", 0.2, 1e-5, 100)
    trigger = dict(threshold=0.9, interval=3, start_step=2)
    rows: List[Any] = [
        ({}, {}),
        ({"nesterov": False}, {"nesterov": False}),
        ({"start_step": 0}, {"start_step": 0}),
        ({"persist_noise": True}, {"persist": True}),
        ({"persist_noise": True, "nesterov": False}, {"persist": True, "nesterov": False}),
        (TRIGGERED, {**trigger, "alpha": triggered}),
        (
            {**TRIGGERED, "persist_noise": True, "nesterov": False},
            {**trigger, "alpha": triggered, "persist": True, "nesterov": False},
        ),
    ]
    for kind in AlphaAnnealing:
        fields = {"annealing": kind, "alpha": 0.1, "alpha_end": 0.02, "anneal_steps": 20}
        rows.append((fields, {"alpha": annealed(str(kind), 0.1, 0.02, 20)}))
    rows = [(fields, {"start_step": 4, **options}) for fields, options in rows]
    return [
        (
            replace(config, **fields),
            noisy(direction, cubic_steps, **{"alpha": FADING, **options}),
            1e-5,
        )
        for fields, options in rows
    ]


CASES: Dict[str, Case] = {
    "muon_orthonoise": Case(
        config=MuonOrthoNoiseConfig(**FROM_THE_START),
        oracles=[
            *_noise_oracles(MuonOrthoNoiseConfig(**EXACT), orthonormal, 3),
            # An exact polar factor does not see cubic steps, which keep singular vectors.
            *(
                (
                    MuonOrthoNoiseConfig(**ALWAYS, ns_reorthogonalize_steps=steps),
                    noisy(orthonormal, steps, FADING, start_step=4, polar=newton_schulz),
                    1e-5,
                )
                for steps in (0, 1, 3)
            ),
        ],
        bad_fields=[
            *BAD_NOISE,
            {"ns_reorthogonalize_steps": -1},
            {"ns_reorthogonalize_steps": 1.5},
        ],
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"muon_orthonoise": 4, "adamw": 8},
        factor_bytes=lambda n_out, n_in: 4,
        without_randomness={"start_step": 4},
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
    ),
    "muon_isotropic": Case(
        config=MuonIsotropicConfig(**FROM_THE_START),
        oracles=_noise_oracles(MuonIsotropicConfig(**EXACT), isotropic, 0),
        bad_fields=BAD_NOISE,
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"muon_isotropic": 4, "adamw": 8},
        factor_bytes=lambda n_out, n_in: 4,
        without_randomness={"start_step": 4},
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
    ),
    "muon_nolah": Case(
        config=MuonNolahConfig(**MUON),
        oracles=[
            (
                MuonNolahConfig(
                    **MUON,
                    polar_method=PolarMethod.svd,
                    gate=GradientGate(gate),
                    scale=scale,
                    projection=projection,
                    nesterov=nesterov,
                ),
                nolah(gate, scale, projection, nesterov),
                1e-5,
            )
            for gate, scale, projection, nesterov in (
                ("tanh", 0.95, True, True),
                ("tanh", 0.95, True, False),
                ("sigmoid", 0.95, True, True),
                ("relu", 0.9, True, True),
                ("none", 0.9, True, True),
                ("tanh", 1.0, True, True),
                ("tanh", 0.5, False, True),
                ("none", 0.0, False, False),
                ("none", 1.0, False, True),
            )
        ],
        bad_fields=[
            *BAD_MUON,
            {"gate": "gelu"},
            {"scale": 1.1},
            {"scale": -0.1},
            {"projection": 1},
        ],
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"muon_nolah": 4, "adamw": 8},
        # The projection keeps nothing of large negative momentum: such weights do not move.
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0, "projection": False},
    ),
}
