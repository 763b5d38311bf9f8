"""
The contract table: rules with other momenta, and Prodigy.
"""

import math
from typing import Any, Dict, List, Optional

import torch

from olmo_optim_ext import (
    AdanConfig,
    AdEMAMixConfig,
    AdoptConfig,
    MarsConfig,
    ProdigyConfig,
)

from .case import BAD_ENGINE, CURVATURE, Case, MixedShapes, Oracle, grads_at, torch_oracle
from .references import Memory, written_out


def adan(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
) -> torch.Tensor:
    beta1, beta2, beta3 = betas
    t = memory.t
    diff = g - memory.last if t > 1 else torch.zeros_like(g)
    memory.last = g
    memory.m = beta1 * memory.m + (1 - beta1) * g
    memory.n = beta2 * memory.n + (1 - beta2) * diff
    memory.v = beta3 * memory.v + (1 - beta3) * (g + beta2 * diff) ** 2
    u = memory.m / (1 - beta1**t) + beta2 * memory.n / (1 - beta2**t)
    u = u / ((memory.v / (1 - beta3**t)).sqrt() + eps)
    if no_prox:
        return (1 - lr * weight_decay) * p - lr * u
    return (p - lr * u) / (1 + lr * weight_decay)


def adopt(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.9, 0.9999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    clip_exp: Optional[float] = 0.25,
) -> torch.Tensor:
    """The first step only takes ``g^2``: nothing moves in it, no decay either."""
    beta1, beta2 = betas
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if memory.t == 1:
        memory.v = g**2
        return p
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    u = g / memory.v.sqrt().clamp(min=eps)
    if clip_exp is not None:
        clip = (memory.t - 1) ** clip_exp
        u = u.clamp(-clip, clip)
    memory.m = beta1 * memory.m + (1 - beta1) * u
    memory.v = beta2 * memory.v + (1 - beta2) * g**2
    return p - lr * memory.m


def ademamix(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.9, 0.999, 0.9999),
    alpha: float = 2.0,
    alpha_warmup: Optional[int] = None,
    beta3_warmup: Optional[int] = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.Tensor:
    beta1, beta2, beta3 = betas
    t = memory.t
    if alpha_warmup is not None and t < alpha_warmup:
        alpha = alpha * t / alpha_warmup
    if beta3_warmup is not None and t < beta3_warmup:
        of_beta1, of_beta3 = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))
        part = t / beta3_warmup
        beta3 = 0.5 ** (1 / ((1 - part) * of_beta1 + part * of_beta3 + 1))
    memory.fast = beta1 * memory.fast + (1 - beta1) * g
    memory.slow = beta3 * memory.slow + (1 - beta3) * g
    memory.v = beta2 * memory.v + (1 - beta2) * g**2
    u = memory.fast / (1 - beta1**t) + alpha * memory.slow
    u = u / ((memory.v / (1 - beta2**t)).sqrt() + eps)
    return p - lr * (u + weight_decay * p)


def mars(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.95, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gamma: float = 0.025,
    form: str = "adamw",
    first_step: str = "zero",
    optimize_1d: bool = False,
    lr_1d_factor: float = 1.0,
    betas_1d: Any = (0.9, 0.95),
    weight_decay_1d: float = 0.1,
    exact: bool = False,
) -> torch.Tensor:
    beta1, beta2 = betas
    c = g
    if p.ndim >= 2 or optimize_1d:
        last = g if memory.t == 1 and first_step == "current" else memory.last
        memory.last = g
        if exact:
            last = g + CURVATURE * (memory.last_p - p) if memory.t > 1 else g
            memory.last_p = p
        c = g + gamma * beta1 / (1 - beta1) * (g - last)
        c = c / max(1.0, float(c.norm()))
    else:
        form = "adamw"
        lr, weight_decay = lr * lr_1d_factor, weight_decay_1d
        beta1, beta2 = betas_1d
    memory.m = beta1 * memory.m + (1 - beta1) * c
    memory.v = beta2 * memory.v + (1 - beta2) * c**2
    if form == "lion":
        u = memory.m.sign()
    else:
        denom = (memory.v / (1 - beta2**memory.t)).sqrt() + eps
        u = memory.m / (1 - beta1**memory.t) / denom
    return p - lr * (u + weight_decay * p)


def prodigy(
    lr: float,
    betas: Any = (0.9, 0.999),
    beta3: Optional[float] = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = math.inf,
) -> Oracle:
    """The authors' code in float64, written out for one step at a time."""
    beta1, beta2 = betas
    beta3 = math.sqrt(beta2) if beta3 is None else beta3

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        first = {name: param.double() for name, param in start.items()}
        p, model = dict(first), MixedShapes()
        m, v, s = ({name: torch.zeros_like(x) for name, x in first.items()} for _ in range(3))
        d = d_max = d0
        numerator = 0.0
        for step in range(steps):
            correction = 1.0
            if use_bias_correction:
                correction = math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
            dlr = d * lr * (1.0 - 0.01 * step) * correction
            numerator *= beta3
            for name, grad in grads_at(step, model).items():
                g = grad.double()
                if not decoupled_weight_decay:
                    g = g + weight_decay * p[name]
                numerator += d / d0 * dlr * float((g * (first[name] - p[name])).sum())
                m[name] = beta1 * m[name] + (1 - beta1) * d * g
                v[name] = beta2 * v[name] + (1 - beta2) * d**2 * g**2
                s[name] = beta3 * s[name] + d / d0 * (d if safeguard_warmup else dlr) * g
            d_hat = d_coef * numerator / sum(float(x.abs().sum()) for x in s.values())
            next_d = max(d, d_hat) if d == d0 else d
            d_max = max(d_max, d_hat)
            next_d = min(d_max, next_d * growth_rate)
            for name in p:
                if decoupled_weight_decay:
                    p[name] = p[name] - dlr * weight_decay * p[name]
                # As in the authors' code, eps has the new d where the moments have the old one.
                p[name] = p[name] - dlr * m[name] / (v[name].sqrt() + next_d * eps)
            d = next_d
        return p

    return run


def _package(optimizer: str, **fields: Any) -> Oracle:
    """Of pytorch-optimizer."""

    def make(params: List[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, optimizer)(params, foreach=False, **fields)

    return torch_oracle(make)


_ADAN: Dict[str, Any] = dict(lr=0.05, betas=(0.9, 0.8, 0.95), eps=1e-7, weight_decay=0.1)

# Some of the first gradients are below eps.
_ADOPT: Dict[str, Any] = dict(lr=0.05, betas=(0.9, 0.99), eps=1e-2, weight_decay=0.1)
_ADOPT_FORMS: List[Dict[str, Any]] = [
    {},
    {"decoupled_weight_decay": True},
    {"clip_exp": 0.5},
    {"clip_exp": None, "decoupled_weight_decay": True},
]

_ADEMAMIX: Dict[str, Any] = dict(
    lr=0.02, betas=(0.9, 0.99, 0.995), alpha=4.0, eps=1e-7, weight_decay=0.1
)
_ADEMAMIX_FORMS: List[Dict[str, Any]] = [
    {"alpha_warmup": 30},
    {"beta3_warmup": 20},
    {"alpha_warmup": 100, "beta3_warmup": 100},
    {"alpha_warmup": 1, "beta3_warmup": 1, "betas": (0.0, 0.99, 0.995)},
    {"beta3_warmup": 20, "betas": (0.0, 0.99, 0.995)},
]

# The clip is active for the larger matrices, and for the others it is not.
_MARS: Dict[str, Any] = dict(
    lr=0.03,
    betas=(0.9, 0.99),
    eps=1e-7,
    weight_decay=0.1,
    gamma=0.05,
    lr_1d_factor=0.5,
    betas_1d=(0.8, 0.9),
    weight_decay_1d=0.2,
)
_MARS_FORMS: List[Dict[str, Any]] = [
    {},
    {"form": "lion"},
    {"first_step": "current"},
    {"optimize_1d": True},
    {"form": "lion", "first_step": "current", "optimize_1d": True},
]
_MARS_LION: Dict[str, Any] = dict(
    lr=0.03, betas=(0.9, 0.99), weight_decay=0.1, gamma=0.05, optimize_1d=True
)

# An estimate that starts so large, times such a coefficient, grows within a few steps.
_PRODIGY: Dict[str, Any] = dict(
    lr=0.5, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, d0=0.03, d_coef=20.0
)
_PRODIGY_FORMS: List[Dict[str, Any]] = [
    {},
    {"beta3": 0.8},
    {"growth_rate": 1.05},
    {"use_bias_correction": True},
    {"safeguard_warmup": True},
    {"decoupled_weight_decay": False},
    {"d_coef": 1.0},
]

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
_BAD_TRIPLE: List[Dict[str, Any]] = [
    {"betas": (0.9, 0.99)},
    {"betas": (0.9, 0.95, 0.99, 0.999)},
    {"betas": (0.9, 0.99, 1.0)},
    {"betas": (0.9, -0.1, 0.99)},
]

CASES: Dict[str, Case] = {
    "adan": Case(
        config=AdanConfig(**_ADAN),
        oracles=[
            (AdanConfig(**_ADAN), _package("Adan", **_ADAN), 2e-6),
            (AdanConfig(**_ADAN), written_out(adan, **_ADAN), 2e-6),
            (
                AdanConfig(**_ADAN, no_prox=True),
                _package("Adan", **_ADAN, weight_decouple=True),
                2e-6,
            ),
            (AdanConfig(**_ADAN, no_prox=True), written_out(adan, **_ADAN, no_prox=True), 2e-6),
        ],
        bad_fields=[*_BAD, *_BAD_TRIPLE, {"no_prox": "no"}],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 16},
    ),
    "adopt": Case(
        config=AdoptConfig(**_ADOPT),
        oracles=[
            (AdoptConfig(**_ADOPT, **form), written_out(adopt, **_ADOPT, **form), 2e-6)
            for form in _ADOPT_FORMS
        ]
        + [
            (
                AdoptConfig(**_ADOPT, clip_exp=None),
                _package("ADOPT", **_ADOPT, clip_lambda=None),
                2e-6,
            )
        ],
        bad_fields=[
            {"eps": 0.0},
            *_BAD,
            *_BAD_PAIR,
            {"decoupled_weight_decay": "no"},
            {"clip_exp": -0.25},
        ],
        bitwise=True,
        fast_lr=0.1,
        state_bytes={"": 8},
    ),
    "ademamix": Case(
        config=AdEMAMixConfig(**_ADEMAMIX, alpha_warmup=30, beta3_warmup=30),
        oracles=[
            (AdEMAMixConfig(**fields), written_out(ademamix, **fields), 2e-6)
            for fields in [_ADEMAMIX, *({**_ADEMAMIX, **form} for form in _ADEMAMIX_FORMS)]
        ]
        + [
            (
                AdEMAMixConfig(**_ADEMAMIX),
                _package("AdEMAMix", **_ADEMAMIX, weight_decouple=True),
                2e-6,
            )
        ],
        bad_fields=[
            *_BAD,
            *_BAD_TRIPLE,
            {"alpha": -1.0},
            {"alpha_warmup": 0},
            {"alpha_warmup": 2.5},
            {"beta3_warmup": 0},
        ],
        bitwise=True,
        fast_lr=0.1,
        state_bytes={"": 12},
    ),
    "mars": Case(
        config=MarsConfig(**_MARS),
        oracles=[
            (MarsConfig(**_MARS, **form), written_out(mars, **_MARS, **form), 2e-6)
            for form in _MARS_FORMS
        ]
        + [
            (
                MarsConfig(**{**_MARS_LION, "form": "lion"}),
                _package("MARS", **_MARS_LION, mars_type="lion"),
                2e-6,
            )
        ],
        bad_fields=[
            *_BAD,
            *_BAD_PAIR,
            {"gamma": -0.1},
            {"form": "shampoo"},
            {"first_step": "none"},
            {"optimize_1d": "no"},
            {"lr_1d_factor": -1.0},
            {"betas_1d": (0.9, 1.0)},
            {"weight_decay_1d": -0.1},
            {"exact": "no"},
        ],
        bitwise=False,
        fast_lr=0.05,
        state_bytes={"mars": 12, "adamw": 8},
        without_decay={"weight_decay": 0.0, "weight_decay_1d": 0.0},
    ),
    "mars_exact": Case(
        config=MarsConfig(**_MARS, exact=True),
        oracles=[
            (MarsConfig(**fields), written_out(mars, **fields), 2e-6)
            for form in ({}, {"optimize_1d": True, "form": "lion"})
            for fields in [{**_MARS, **form, "exact": True}]
        ],
        bad_fields=[],
        bitwise=False,
        fast_lr=0.05,
        state_bytes={"mars": 12, "adamw": 12},
        without_decay={"weight_decay": 0.0, "weight_decay_1d": 0.0},
    ),
    "prodigy": Case(
        # The estimate grows in steps 9 to 18: on both sides of a resume.
        config=ProdigyConfig(**_PRODIGY, beta3=0.8),
        oracles=[
            (ProdigyConfig(**fields), prodigy(**fields), 2e-6)
            for fields in [{**_PRODIGY, **form} for form in _PRODIGY_FORMS]
        ]
        + [(ProdigyConfig(**_PRODIGY), _package("Prodigy", **_PRODIGY), 2e-6)],
        bad_fields=[
            *_BAD,
            *_BAD_PAIR,
            {"beta3": 1.0},
            {"decoupled_weight_decay": "no"},
            {"use_bias_correction": "no"},
            {"safeguard_warmup": 1},
            {"d0": 0.0},
            {"d_coef": 0.0},
            {"growth_rate": 0.5},
        ],
        bitwise=False,
        fast_lr=0.1,
        state_bytes={"": 16},
        whole_model=True,
        other_values={"lr": 1.0, "weight_decay": 0.3},
    ),
}
