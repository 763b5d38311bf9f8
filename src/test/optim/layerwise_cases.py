"""
The contract table: rules with one scale for each parameter, or for each block of it.
"""

import math
from typing import Any, Dict, List, Tuple

import numpy as np
import torch

from olmo_optim_ext import AdamMiniConfig, EvaConfig, LambConfig, LarsConfig

from .case import BAD_ENGINE, Case, MixedShapes, grads_at
from .references import Memory, written_out


def _trust(weight_norm: float, norm: float, ratio: float) -> float:
    """One where there is nothing to compare."""
    return ratio if weight_norm > 0 and norm > 0 else 1.0


def lamb(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    always_adapt: bool = False,
) -> torch.Tensor:
    beta1, beta2 = betas
    memory.m = beta1 * memory.m + (1 - beta1) * g
    memory.v = beta2 * memory.v + (1 - beta2) * g**2
    denom = (memory.v / (1 - beta2**memory.t)).sqrt() + eps
    u = memory.m / (1 - beta1**memory.t) / denom + weight_decay * p
    if weight_decay > 0 or always_adapt:
        p_norm, u_norm = float(p.norm()), float(u.norm())
        u = u * _trust(p_norm, u_norm, p_norm / max(u_norm, 1e-300))
    return p - lr * u


def lars(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    always_adapt: bool = False,
) -> torch.Tensor:
    if weight_decay > 0 or always_adapt:
        p_norm, g_norm = float(p.norm()), float(g.norm())
        ratio = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
        g = _trust(p_norm, g_norm, ratio) * (g + weight_decay * p)
    if momentum == 0:
        return p - lr * g
    memory.buf = g if memory.t == 1 else momentum * memory.buf + (1 - dampening) * g
    return p - lr * (g + momentum * memory.buf if nesterov else memory.buf)


def eva(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    adaptation_strength: float = 0.1,
) -> torch.Tensor:
    beta1, beta2 = betas
    spread = math.sqrt(float(g.var(correction=0)) + eps)
    factor = min(max(1 / (1 + adaptation_strength * spread), 0.1), 2.0)
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    memory.m = beta1 * memory.m + (1 - beta1) * g
    memory.v = beta2 * memory.v + (1 - beta2) * g**2
    denom = (memory.v / (1 - beta2**memory.t)).sqrt() + eps
    return p - lr * factor * memory.m / (1 - beta1**memory.t) / denom


def _has_block_per_element(name: str) -> bool:
    return name.endswith("bias")


def adam_mini(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.Tensor:
    """Of a matrix each row is a block, a gain is one, and of a bias each element is."""
    beta1, beta2 = betas
    if _has_block_per_element(memory.name):
        mean_sq = g**2
    else:
        mean_sq = g.square().mean(-1, keepdim=True)
    memory.m = beta1 * memory.m + (1 - beta1) * g
    memory.v = beta2 * memory.v + (1 - beta2) * mean_sq
    denom = (memory.v / (1 - beta2**memory.t)).sqrt() + eps
    p = p - lr * weight_decay * p
    return p - lr * memory.m / (1 - beta1**memory.t) / denom


def _block_bytes(name: str, shape: Tuple[int, ...]) -> float:
    return 4 * math.prod(shape if _has_block_per_element(name) else shape[:-1])


def _optax_lamb(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """It always adapts."""
    import jax
    import optax

    to_jax = lambda tensors: {k: jax.numpy.asarray(v.numpy()) for k, v in tensors.items()}  # noqa: E731
    (b1, b2), model = _LAMB["betas"], MixedShapes()
    optim = optax.inject_hyperparams(optax.lamb)(
        learning_rate=_LAMB["lr"],
        b1=b1,
        b2=b2,
        eps=_LAMB["eps"],
        weight_decay=_LAMB["weight_decay"],
    )
    params = to_jax(start)
    state = optim.init(params)
    for step in range(steps):
        state.hyperparams["learning_rate"] = jax.numpy.asarray(_LAMB["lr"] * (1.0 - 0.01 * step))
        updates, state = optim.update(to_jax(grads_at(step, model)), state, params)
        params = optax.apply_updates(params, updates)
    return {k: torch.from_numpy(np.array(v)) for k, v in params.items()}


_LAMB: Dict[str, Any] = dict(lr=0.05, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.1)
_LAMB_FORMS: List[Dict[str, Any]] = [
    {},
    {"weight_decay": 0.0},
    {"weight_decay": 0.0, "always_adapt": True},
]

_LARS: Dict[str, Any] = dict(
    lr=1.0, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02, eps=1e-3
)
_LARS_FORMS: List[Dict[str, Any]] = [
    {},
    {"nesterov": True},
    {"dampening": 0.3},
    {"momentum": 0.0, "dampening": 0.3, "lr": 4.0},
    {"weight_decay": 0.0},
    {"weight_decay": 0.0, "always_adapt": True},
]

_EVA: Dict[str, Any] = dict(
    lr=0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, adaptation_strength=1.0
)
_EVA_FORMS: List[Dict[str, Any]] = [
    {},
    {"decoupled_weight_decay": True},
    {"adaptation_strength": 0.0},
    # Beyond the limit but for a parameter of one element, whose variance is zero.
    {"adaptation_strength": 200.0, "lr": 0.3},
]

_ADAM_MINI: Dict[str, Any] = dict(lr=0.03, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1)

_BAD: List[Dict[str, Any]] = [
    *BAD_ENGINE,
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": True},
    {"eps": -1e-8},
    {"weight_decay": -0.1},
    {"weight_decay": math.inf},
]
_BAD_PAIR: List[Dict[str, Any]] = [
    {"betas": (0.9,)},
    {"betas": (0.9, 0.95, 0.99)},
    {"betas": (0.9, 1.0)},
]

CASES: Dict[str, Case] = {
    "lamb": Case(
        config=LambConfig(**_LAMB, always_adapt=True),
        oracles=[
            (LambConfig(**fields), written_out(lamb, **fields), 2e-6)
            for fields in [{**_LAMB, **form} for form in _LAMB_FORMS]
        ]
        + [(LambConfig(**_LAMB), _optax_lamb, 2e-6)],
        bad_fields=[*_BAD, *_BAD_PAIR, {"always_adapt": "no"}],
        bitwise=False,
        fast_lr=0.05,
        state_bytes={"": 8},
    ),
    "lars": Case(
        config=LarsConfig(**_LARS, nesterov=True, always_adapt=True),
        oracles=[
            (LarsConfig(**fields), written_out(lars, **fields), 2e-6)
            for fields in [{**_LARS, **form} for form in _LARS_FORMS]
        ],
        bad_fields=[
            *_BAD,
            {"momentum": 1.0},
            {"dampening": -1.0},
            {"nesterov": "yes"},
            {"trust_coefficient": -0.001},
            {"always_adapt": "no"},
        ],
        bitwise=False,
        fast_lr=0.5,
        state_bytes={"": 4},
        other_values={"lr": 2.0, "weight_decay": 0.3},
    ),
    "eva": Case(
        config=EvaConfig(**_EVA),
        oracles=[
            (EvaConfig(**fields), written_out(eva, **fields), 2e-6)
            for fields in [{**_EVA, **form} for form in _EVA_FORMS]
        ],
        bad_fields=[
            *_BAD,
            *_BAD_PAIR,
            {"decoupled_weight_decay": "no"},
            {"adaptation_strength": -1.0},
        ],
        bitwise=False,
        fast_lr=0.2,
        state_bytes={"": 8},
    ),
    "adam_mini": Case(
        config=AdamMiniConfig(**_ADAM_MINI),
        oracles=[(AdamMiniConfig(**_ADAM_MINI), written_out(adam_mini, **_ADAM_MINI), 2e-6)],
        bad_fields=[*_BAD, *_BAD_PAIR],
        bitwise=False,
        fast_lr=0.05,
        state_bytes={"": 4},
        own_bytes=_block_bytes,
    ),
}
