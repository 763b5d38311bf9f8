"""
The contract table: rules for single coordinates.
"""

import math
from typing import Any, Dict, List

import numpy as np
import torch
from pytorch_optimizer import SophiaH

from olmo_optim_ext import (
    AdamWConfig,
    CautiousAdamWConfig,
    NAdamWConfig,
    NesterovForm,
    SophiaConfig,
)

from .case import BAD_ENGINE, Case, MixedShapes, grads_at, set_lr, torch_oracle, weights


def _optax_nadamw(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    import jax
    import optax

    to_jax = lambda tensors: {k: jax.numpy.asarray(v.numpy()) for k, v in tensors.items()}  # noqa: E731
    optim = optax.inject_hyperparams(optax.nadamw)(
        learning_rate=0.01, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1
    )
    params = to_jax(start)
    state = optim.init(params)
    for step in range(steps):
        state.hyperparams["learning_rate"] = jax.numpy.asarray(0.01 * (1.0 - 0.01 * step))
        updates, state = optim.update(to_jax(grads_at(step, MixedShapes())), state, params)
        params = optax.apply_updates(params, updates)
    return {k: torch.from_numpy(np.array(v)) for k, v in params.items()}


def _algoperf_nadamw(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """AlgoPerf's rule in float64, written out for one step at a time."""
    beta1, beta2 = 0.9, 0.99
    out = {}
    for name, initial in start.items():
        p = initial.double()
        m = v = torch.zeros_like(p)
        for step in range(steps):
            lr, t = 0.01 * (1.0 - 0.01 * step), step + 1
            g = grads_at(step, MixedShapes())[name].double()
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            m_hat = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
            v_hat = v / (1 - beta2**t)
            p = p - lr * 0.1 * p
            p = p - lr * m_hat / (v_hat.sqrt() + 1e-8)
        out[name] = p
    return out


def _cautious_adamw(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """The authors' rule in float64, written out for one step at a time."""
    beta1, beta2 = 0.9, 0.99
    out = {}
    for name, initial in start.items():
        p = initial.double()
        m = v = torch.zeros_like(p)
        for step in range(steps):
            lr, t = 0.01 * (1.0 - 0.01 * step), step + 1
            g = grads_at(step, MixedShapes())[name].double()
            m = m + (1 - beta1) * (g - m)
            v = beta2 * v + (1 - beta2) * g**2
            mask = (m * g > 0).double()
            mask = mask / mask.mean().clamp(min=1e-3)
            p = p - lr * 0.1 * p
            p = p - lr * mask * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-6)
        out[name] = p
    return out


def _sophia_g(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """The authors' rule in float64, written out for one step at a time."""
    beta1, beta2, rho, bs = 0.9, 0.8, 0.3, 100
    out = {}
    for name, initial in start.items():
        p = initial.double()
        m = h = torch.zeros_like(p)
        for step in range(steps):
            lr = 0.01 * (1.0 - 0.01 * step)
            g = grads_at(step, MixedShapes())[name].double()
            if step % 3 == 0:
                h = beta2 * h + (1 - beta2) * g * g
            p = p - lr * 0.1 * p
            m = beta1 * m + (1 - beta1) * g
            ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
            p = p - lr * m.sign() * ratio
        out[name] = p
    return out


def _sophia_h(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """The package's rule, which divides by the Hessian first and clips at ``p``, our rho."""
    model = MixedShapes()
    model.load_state_dict(start)
    params = list(model.parameters())
    optim = SophiaH(
        params, lr=0.01 / 0.3, betas=(0.9, 0.8), p=0.3, weight_decay=0.1 * 0.3, update_period=10**9
    )
    for step in range(steps):
        set_lr(optim, step)
        grads = list(grads_at(step, model).values())
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        optim.step(hessian=[100 * grad * grad for grad in grads] if step % 3 == 0 else None)
    return weights(model)


_SOPHIA: Dict[str, Any] = dict(
    lr=0.01, betas=(0.9, 0.8), rho=0.3, batch_tokens=100, hessian_update_interval=3
)
_ADAM_LIKE: Dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
_BAD_ADAM_LIKE: List[Dict[str, Any]] = [
    *BAD_ENGINE,
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": True},
    {"betas": (0.9,)},
    {"betas": (0.9, 0.95, 0.99)},
    {"betas": (0.9, 1.0)},
    {"eps": -1e-8},
    {"weight_decay": -0.1},
    {"weight_decay": math.inf},
]

CASES: Dict[str, Case] = {
    "ext_adamw": Case(
        config=AdamWConfig(**_ADAM_LIKE),
        oracles=[
            (
                AdamWConfig(**_ADAM_LIKE),
                torch_oracle(lambda params: torch.optim.AdamW(params, foreach=False, **_ADAM_LIKE)),
                2e-6,
            )
        ],
        bad_fields=_BAD_ADAM_LIKE,
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 8},
    ),
    "nadamw": Case(
        config=NAdamWConfig(**_ADAM_LIKE),
        oracles=[
            (NAdamWConfig(**_ADAM_LIKE), _algoperf_nadamw, 2e-6),
            (NAdamWConfig(nesterov=NesterovForm.dozat, **_ADAM_LIKE), _optax_nadamw, 5e-6),
            (
                NAdamWConfig(nesterov=NesterovForm.torch, **_ADAM_LIKE),
                torch_oracle(
                    lambda params: torch.optim.NAdam(
                        params, decoupled_weight_decay=True, foreach=False, **_ADAM_LIKE
                    )
                ),
                2e-6,
            ),
        ],
        bad_fields=[*_BAD_ADAM_LIKE, {"nesterov": "nesterov"}, {"momentum_decay": -1.0}],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 8},
    ),
    "cautious_adamw": Case(
        config=CautiousAdamWConfig(**_ADAM_LIKE),
        oracles=[(CautiousAdamWConfig(**_ADAM_LIKE), _cautious_adamw, 2e-6)],
        bad_fields=[*_BAD_ADAM_LIKE, {"mask_eps": 0.0}],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 8},
    ),
    "sophia": Case(
        config=SophiaConfig(**_SOPHIA),
        oracles=[
            (SophiaConfig(**_SOPHIA), _sophia_g, 2e-6),
            (SophiaConfig(**_SOPHIA), _sophia_h, 2e-6),
        ],
        bad_fields=[
            *_BAD_ADAM_LIKE,
            {"eps": 0.0},
            {"rho": 0.0},
            {"batch_tokens": 0},
            {"batch_tokens": 2.5},
            {"hessian_update_interval": 0},
            {"estimator": "fisher"},
            {"hessian_batch_fraction": 0.0},
            {"hessian_batch_fraction": 1.5},
            {"hutchinson_epsilon": 0.0},
        ],
        bitwise=True,
        fast_lr=0.05,
        state_bytes={"": 8},
    ),
}
