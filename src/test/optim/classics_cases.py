"""
The contract table: the rules of ``torch.optim``, and Lion.
"""

import math
from typing import Any, Dict, List, Tuple

import torch
from olmo_core.optim import Lion

from olmo_optim_ext import (
    AdafactorConfig,
    AdagradConfig,
    AdamConfig,
    LionConfig,
    RAdamConfig,
    RMSpropConfig,
    SGDConfig,
)

from .case import BAD_ENGINE, Case, Oracle, grows_with_gradient, torch_oracle
from .references import Memory, written_out


def sgd(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
) -> torch.Tensor:
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    memory.buf = g if memory.t == 1 else momentum * memory.buf + (1 - dampening) * g
    if momentum == 0:
        return p - lr * g
    return p - lr * (g + momentum * memory.buf if nesterov else memory.buf)


def adagrad(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
) -> torch.Tensor:
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    if memory.t == 1:
        memory.sum = torch.full_like(p, initial_accumulator_value)
    memory.sum = memory.sum + g**2
    return p - lr / (1 + (memory.t - 1) * lr_decay) * g / (memory.sum.sqrt() + eps)


def rmsprop(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    beta2: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
) -> torch.Tensor:
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    memory.v = beta2 * memory.v + (1 - beta2) * g**2
    memory.mean = beta2 * memory.mean + (1 - beta2) * g
    variance = memory.v - memory.mean**2 if centered else memory.v
    memory.buf = momentum * memory.buf + g / (variance.sqrt() + eps)
    return p - lr * memory.buf


def adafactor(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    beta2_decay: float = -0.8,
    eps: float = 2.0**-23,
    param_rms_eps: float = 1e-3,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
) -> torch.Tensor:
    """As in torch, the size of a parameter is taken before its decay."""
    size = max(param_rms_eps, float(p.square().mean().sqrt()))
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    rest = memory.t**beta2_decay
    if p.ndim == 1:
        memory.v = (1 - rest) * memory.v + rest * g**2
        v = memory.v
    else:
        memory.rows = (1 - rest) * memory.rows + rest * g.square().mean(-1, keepdim=True)
        memory.cols = (1 - rest) * memory.cols + rest * g.square().mean(-2, keepdim=True)
        v = memory.rows * memory.cols / memory.rows.mean(-2, keepdim=True).clamp(min=eps)
    u = g / v.clamp(min=eps**2).sqrt()
    u = u / max(1.0, float(u.square().mean().sqrt()) / clip_threshold)
    return p - min(lr, memory.t**-0.5) * size * u


def lion(
    memory: Memory,
    p: torch.Tensor,
    g: torch.Tensor,
    lr: float,
    betas: Any = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> torch.Tensor:
    beta1, beta2 = betas
    p = p - lr * weight_decay * p
    p = p - lr * torch.sign(beta1 * memory.m + (1 - beta1) * g)
    memory.m = beta2 * memory.m + (1 - beta2) * g
    return p


def _torch(optimizer: Any, **fields: Any) -> Oracle:
    return torch_oracle(lambda params: optimizer(params, foreach=False, **fields))


def _factors_or_variance(name: str, shape: Tuple[int, ...]) -> float:
    """Of a vector the second moment, of a matrix its means along rows and columns."""
    del name
    return 4 * sum(shape)


_DECOUPLED: Dict[str, Any] = {"decoupled_weight_decay": True}
_COUPLED: Dict[str, Any] = {"decoupled_weight_decay": False}

_SGD: Dict[str, Any] = dict(lr=0.05, momentum=0.8, weight_decay=0.1)
_DAMPENED: Dict[str, Any] = {**_SGD, "dampening": 0.3}
_NESTEROV: Dict[str, Any] = {**_SGD, "nesterov": True}
_PLAIN: Dict[str, Any] = {**_SGD, "momentum": 0.0, "dampening": 0.3}

_ADAGRAD: Dict[str, Any] = dict(lr=0.1, eps=1e-6, weight_decay=0.1)
_ADAGRAD_DECAYING: Dict[str, Any] = {
    **_ADAGRAD,
    "lr_decay": 0.05,
    "initial_accumulator_value": 0.02,
}

_RMSPROP: Dict[str, Any] = dict(lr=0.01, beta2=0.95, eps=1e-6, weight_decay=0.1)
_CENTERED: Dict[str, Any] = {**_RMSPROP, "centered": True}
_WITH_MOMENTUM: Dict[str, Any] = {**_RMSPROP, "momentum": 0.6}
_BOTH: Dict[str, Any] = {**_CENTERED, **_WITH_MOMENTUM}

_ADAM: Dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)

# Large enough for the first steps, which are proportional to the gradient.
_RADAM: Dict[str, Any] = {**_ADAM, "lr": 0.05}

_ADAFACTOR: Dict[str, Any] = dict(lr=0.35, weight_decay=0.1)
_ADAFACTOR_LARGE: Dict[str, Any] = dict(
    # 1 / sqrt(t) falls below this lr, the updates are clipped, and rms(p) is below its floor.
    lr=0.5,
    beta2_decay=-0.6,
    param_rms_eps=0.25,
    clip_threshold=1.1,
    weight_decay=0.1,
)
_ADAFACTOR_SMALL: Dict[str, Any] = {**_ADAFACTOR, "eps": 0.15}

_LION: Dict[str, Any] = dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)


def _rmsprop(**fields: Any) -> Oracle:
    beta2 = fields.pop("beta2")
    return _torch(torch.optim.RMSprop, alpha=beta2, **fields)


def _adafactor(**fields: Any) -> Oracle:
    eps = (fields.pop("eps", None), fields.pop("param_rms_eps", 1e-3))
    d = fields.pop("clip_threshold", 1.0)
    return _torch(torch.optim.Adafactor, eps=eps, d=d, **fields)


_BAD: List[Dict[str, Any]] = [
    *BAD_ENGINE,
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": True},
    {"weight_decay": -0.1},
    {"weight_decay": math.inf},
]
_BAD_EPS: List[Dict[str, Any]] = [{"eps": -1e-8}, {"eps": math.nan}]
_BAD_PAIR: List[Dict[str, Any]] = [
    {"betas": (0.9,)},
    {"betas": (0.9, 0.95, 0.99)},
    {"betas": (0.9, 1.0)},
]
_BAD_KIND: List[Dict[str, Any]] = [{"decoupled_weight_decay": "no"}]


CASES: Dict[str, Case] = {
    "sgd": Case(
        config=SGDConfig(**_NESTEROV),
        oracles=[
            (SGDConfig(**_SGD), _torch(torch.optim.SGD, **_SGD), 2e-6),
            (SGDConfig(**_DAMPENED), _torch(torch.optim.SGD, **_DAMPENED), 2e-6),
            (SGDConfig(**_NESTEROV), _torch(torch.optim.SGD, **_NESTEROV), 2e-6),
            (SGDConfig(**_PLAIN), _torch(torch.optim.SGD, **_PLAIN), 2e-6),
            (SGDConfig(**_NESTEROV), written_out(sgd, **_NESTEROV), 2e-6),
            (
                SGDConfig(**_NESTEROV, **_DECOUPLED),
                written_out(sgd, **_NESTEROV, **_DECOUPLED),
                2e-6,
            ),
        ],
        bad_fields=[
            *_BAD,
            *_BAD_KIND,
            {"momentum": 1.0},
            {"momentum": -0.1},
            {"dampening": -1.0},
            {"nesterov": "yes"},
        ],
        bitwise=True,
        fast_lr=0.05,
        fast_lr_of={"rosenbrock": 0.002},
        bound=grows_with_gradient,
        state_bytes={"": 4},
    ),
    "adagrad": Case(
        config=AdagradConfig(**_ADAGRAD),
        oracles=[
            (AdagradConfig(**_ADAGRAD), _torch(torch.optim.Adagrad, **_ADAGRAD), 2e-6),
            (
                AdagradConfig(**_ADAGRAD_DECAYING),
                _torch(torch.optim.Adagrad, **_ADAGRAD_DECAYING),
                2e-6,
            ),
            (AdagradConfig(**_ADAGRAD), written_out(adagrad, **_ADAGRAD), 2e-6),
            (
                AdagradConfig(**_ADAGRAD_DECAYING, **_DECOUPLED),
                written_out(adagrad, **_ADAGRAD_DECAYING, **_DECOUPLED),
                2e-6,
            ),
        ],
        bad_fields=[
            *_BAD,
            *_BAD_EPS,
            *_BAD_KIND,
            {"lr_decay": -0.1},
            {"initial_accumulator_value": -1.0},
        ],
        bitwise=True,
        fast_lr=0.5,
        state_bytes={"": 4},
    ),
    "rmsprop": Case(
        config=RMSpropConfig(**_RMSPROP),
        oracles=[
            (RMSpropConfig(**_RMSPROP), _rmsprop(**_RMSPROP), 2e-6),
            (RMSpropConfig(**_WITH_MOMENTUM), _rmsprop(**_WITH_MOMENTUM), 2e-6),
            (RMSpropConfig(**_CENTERED), _rmsprop(**_CENTERED), 2e-6),
            (RMSpropConfig(**_BOTH), written_out(rmsprop, **_BOTH), 2e-6),
            (
                RMSpropConfig(**_BOTH, **_DECOUPLED),
                written_out(rmsprop, **_BOTH, **_DECOUPLED),
                2e-6,
            ),
        ],
        bad_fields=[
            *_BAD,
            *_BAD_EPS,
            *_BAD_KIND,
            {"beta2": 1.0},
            {"beta2": -0.1},
            {"momentum": 1.0},
            {"centered": "no"},
        ],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 4},
    ),
    "rmsprop_centered": Case(
        config=RMSpropConfig(**_BOTH),
        oracles=[],
        bad_fields=[],
        bitwise=True,
        fast_lr=0.02,
        bound=lambda lr, largest_grad: 5 * 10 * lr,  # momentum adds up what is up to 3 lr each
        state_bytes={"": 12},
    ),
    "ext_adam": Case(
        config=AdamConfig(**_ADAM),
        oracles=[
            (AdamConfig(**_ADAM), _torch(torch.optim.Adam, **_ADAM), 2e-6),
            (
                AdamConfig(**_ADAM, **_DECOUPLED),
                _torch(torch.optim.Adam, **_ADAM, **_DECOUPLED),
                2e-6,
            ),
        ],
        bad_fields=[*_BAD, *_BAD_EPS, *_BAD_PAIR, *_BAD_KIND],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 8},
    ),
    "adafactor": Case(
        config=AdafactorConfig(**_ADAFACTOR),
        oracles=[
            (AdafactorConfig(**_ADAFACTOR), _adafactor(**_ADAFACTOR), 2e-6),
            (AdafactorConfig(**_ADAFACTOR_LARGE), _adafactor(**_ADAFACTOR_LARGE), 2e-6),
            (AdafactorConfig(**_ADAFACTOR_SMALL), _adafactor(**_ADAFACTOR_SMALL), 2e-6),
            (AdafactorConfig(**_ADAFACTOR), written_out(adafactor, **_ADAFACTOR), 2e-6),
            (
                AdafactorConfig(**_ADAFACTOR, **_COUPLED),
                written_out(adafactor, **_ADAFACTOR, **_COUPLED),
                2e-6,
            ),
        ],
        bad_fields=[
            *_BAD,
            *_BAD_EPS,
            *_BAD_KIND,
            {"eps": 0.0},
            {"beta2_decay": 0.5},
            {"beta2_decay": math.nan},
            {"param_rms_eps": -1e-3},
            {"clip_threshold": -1.0},
        ],
        bitwise=False,
        fast_lr=0.2,
        own_bytes=_factors_or_variance,
        other_values={"lr": 0.4, "weight_decay": 0.3},
        state_bytes={"": 0},
    ),
    "radam": Case(
        config=RAdamConfig(**_RADAM),
        oracles=[
            (RAdamConfig(**_RADAM), _torch(torch.optim.RAdam, **_RADAM), 2e-6),
            (
                RAdamConfig(**_RADAM, **_DECOUPLED),
                _torch(torch.optim.RAdam, **_RADAM, **_DECOUPLED),
                2e-6,
            ),
        ],
        bad_fields=[*_BAD, *_BAD_EPS, *_BAD_PAIR, *_BAD_KIND],
        bitwise=True,
        fast_lr=0.05,
        fast_lr_of={"rosenbrock": 0.005},
        bound=grows_with_gradient,
        state_bytes={"": 8},
        other_values={"lr": 0.1, "weight_decay": 0.3},
    ),
    "ext_lion": Case(
        config=LionConfig(**_LION),
        oracles=[
            (LionConfig(**_LION), torch_oracle(lambda params: Lion(params, **_LION)), 2e-6),
            (LionConfig(**_LION), written_out(lion, **_LION), 2e-6),
        ],
        bad_fields=[*_BAD, *_BAD_PAIR],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 4},
    ),
}
