"""
The contract table: wrappers, each around AdamW, under its name, and around Muon.

The oracles around Muon are the wrapper's rule written out by hand around our own optimizer.
"""

import math
from typing import Any, Callable, Dict, List

import torch
import torch.nn as nn
from pytorch_optimizer import Lookahead as TheirLookahead
from pytorch_optimizer import ScheduleFreeAdamW

from olmo_optim_ext import (
    AdamWConfig,
    LookaheadConfig,
    MuonConfig,
    RangerConfig,
    SAMConfig,
    ScheduleFreeConfig,
)
from olmo_optim_ext.config import ExtOptimConfig

from .case import (
    BAD_ENGINE,
    CURVATURE,
    Case,
    MixedShapes,
    Oracle,
    grads_at,
    grows_with_gradient,
    set_lr,
    torch_oracle,
    weights,
)

Params = List[nn.Parameter]


def _by_hand(inner: ExtOptimConfig, around: Callable[[Any, Params, int], None]) -> Oracle:
    """
    :param around: Makes a step: from the optimizer inside, the parameters with the gradients of the
        batch, and the number of the step from 1.
    """

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        model.load_state_dict(start)
        optim = inner.build(model)
        for step in range(steps):
            set_lr(optim, step)
            for name, param in model.named_parameters():
                param.grad = grads_at(step, model)[name]
            with torch.no_grad():
                around(optim, list(model.parameters()), step + 1)
        return weights(model)

    return run


def _lookahead(k: int, alpha: float) -> Callable[[Any, Params, int], None]:
    slow: List[torch.Tensor] = []

    def around(optim: Any, params: Params, t: int) -> None:
        if t == 1:
            slow[:] = [p.clone() for p in params]
        optim.step()
        if t % k == 0:
            for p, at in zip(params, slow):
                at.add_(alpha * (p - at))
                p.copy_(at)

    return around


def _schedule_free(momentum: float, warmup_steps: int) -> Callable[[Any, Params, int], None]:
    x: List[torch.Tensor] = []
    z: List[torch.Tensor] = []
    total = largest = 0.0

    def around(optim: Any, params: Params, t: int) -> None:
        nonlocal total, largest
        if t == 1:
            x[:], z[:] = ([p.double() for p in params] for _ in range(2))
            total = largest = 0.0
        warmup = min(1.0, t / warmup_steps)
        largest = max(largest, max(group["lr"] for group in optim.param_groups) * warmup)
        total += largest**2
        y = [p.double() for p in params]
        optim.step()
        for i, p in enumerate(params):
            z[i] = z[i] - warmup * (y[i] - p.double())
            x[i] = x[i] + largest**2 / total * (z[i] - x[i])
            p.copy_(momentum * x[i] + (1 - momentum) * z[i])

    return around


def _sam(rho: float, adaptive: bool, interval: int) -> Callable[[Any, Params, int], None]:
    def around(optim: Any, params: Params, t: int) -> None:
        if (t - 1) % interval == 0:
            scales = [p.double().abs() if adaptive else 1.0 for p in params]
            scaled = [s * p.grad.double() for s, p in zip(scales, params) if p.grad is not None]
            norm = math.sqrt(sum(float(g.square().sum()) for g in scaled))
            for p, s, g in zip(params, scales, scaled):
                assert p.grad is not None
                p.grad = (p.grad + CURVATURE * rho * s * g / norm).float()
        optim.step()

    return around


ADAMW: Dict[str, Any] = dict(betas=[0.9, 0.99])
MUON: Dict[str, Any] = dict(name="ext_muon", momentum=0.9)
COMMON: Dict[str, Any] = dict(lr=0.01, weight_decay=0.1)

_BAD: List[Dict[str, Any]] = [*BAD_ENGINE, {"lr": -1.0}, {"lr": True}, {"weight_decay": -0.1}]
_BAD_LOOKAHEAD: List[Dict[str, Any]] = [
    *_BAD,
    *({"k": value} for value in (0, 2.5, True)),
    *({"alpha": value} for value in (0.0, 1.5, True)),
]


def _case(
    config: ExtOptimConfig, oracles: List[Any], bad: List[Dict[str, Any]], **fields: Any
) -> Case:
    inner = config.rule_config
    is_muon = isinstance(inner, MuonConfig)
    extra = 0 if isinstance(config, SAMConfig) else 4
    free, fast = isinstance(config, ScheduleFreeConfig), 0.3 if is_muon else 0.05
    return Case(
        config=config,
        oracles=oracles,
        bad_fields=bad,
        bitwise=not is_muon and not isinstance(config, SAMConfig),
        fast_lr=0.1 if free and not is_muon else fast,
        state_bytes={"muon": 4 + extra, "adamw": 8 + extra} if is_muon else {"": 8 + extra},
        own_bytes=lambda name, shape: 8 if free else 0,
        **fields,
    )


def _muon(config: Any, around: Callable[[Any, Params, int], None], tolerance: float) -> Case:
    inside = config.rule_config
    return _case(config, [(config, _by_hand(inside, around), tolerance)], [])


_lookahead_adamw = LookaheadConfig(inner=ADAMW, **COMMON)
_free_adamw = ScheduleFreeConfig(inner={"betas": [0.0, 0.99]}, **COMMON)
_free_warm = _free_adamw.replace(warmup_steps=7, r=1.0)
_sam_adamw = SAMConfig(inner=ADAMW, **COMMON)
_sam_other = SAMConfig(inner=ADAMW, adaptive=True, rho=0.5, interval=3, **COMMON)


def _their_free(params: Params, **fields: Any) -> torch.optim.Optimizer:
    optim: Any = ScheduleFreeAdamW(params, betas=(0.9, 0.99), foreach=False, **COMMON, **fields)
    optim.train()
    return optim


def _their_lookahead(inner: torch.optim.Optimizer, **fields: Any) -> torch.optim.Optimizer:
    optim: Any = TheirLookahead(inner, **fields)
    return optim


CASES: Dict[str, Case] = {
    "lookahead": _case(
        _lookahead_adamw,
        [
            (
                _lookahead_adamw,
                torch_oracle(
                    lambda params: _their_lookahead(
                        torch.optim.AdamW(params, betas=(0.9, 0.99), foreach=False, **COMMON),
                        k=5,
                        alpha=0.5,
                    )
                ),
                2e-6,
            ),
            (
                LookaheadConfig(inner=AdamWConfig(betas=(0.9, 0.99)), k=3, alpha=0.8, **COMMON),
                _by_hand(AdamWConfig(betas=(0.9, 0.99), **COMMON), _lookahead(3, 0.8)),
                2e-6,
            ),
        ],
        _BAD_LOOKAHEAD,
    ),
    "lookahead_muon": _muon(LookaheadConfig(inner=MUON, **COMMON), _lookahead(5, 0.5), 2e-6),
    "ranger": _case(
        RangerConfig(inner={"betas": [0.9, 0.9]}, **COMMON),
        [
            (
                RangerConfig(**COMMON),
                torch_oracle(
                    lambda params: _their_lookahead(
                        torch.optim.RAdam(
                            params,
                            betas=(0.95, 0.999),
                            eps=1e-5,
                            decoupled_weight_decay=True,
                            foreach=False,
                            **COMMON,
                        ),
                        k=6,
                        alpha=0.5,
                    )
                ),
                5e-6,
            )
        ],
        _BAD_LOOKAHEAD,
        fast_lr_of={"rosenbrock": 0.005},
        bound=grows_with_gradient,
    ),
    "schedule_free": _case(
        _free_adamw,
        [
            (_free_adamw, torch_oracle(_their_free), 5e-6),
            (_free_warm, torch_oracle(lambda ps: _their_free(ps, warmup_steps=7, r=1.0)), 5e-6),
        ],
        [
            *_BAD,
            *({"momentum": value} for value in (0.0, 1.0, True)),
            {"warmup_steps": -1},
            {"warmup_steps": 1.5},
            {"weight_lr_power": -1.0},
            {"r": -1.0},
        ],
    ),
    "schedule_free_muon": _muon(
        ScheduleFreeConfig(inner=MUON, warmup_steps=4, **COMMON), _schedule_free(0.9, 4), 1e-5
    ),
    "sam": _case(
        _sam_adamw,
        [
            (_sam_adamw, _by_hand(_sam_adamw.rule_config, _sam(0.05, False, 1)), 2e-5),
            (_sam_other, _by_hand(_sam_other.rule_config, _sam(0.5, True, 3)), 2e-5),
        ],
        [
            *_BAD,
            {"rho": -0.1},
            {"rho": math.nan},
            {"adaptive": "yes"},
            {"interval": 0},
            {"interval": 1.5},
        ],
    ),
    "sam_muon": _muon(SAMConfig(inner=MUON, **COMMON), _sam(0.05, False, 1), 2e-5),
}
