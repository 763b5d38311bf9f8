"""
The contract table: one row per catalogue name, and what the contract tests share.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

from olmo_optim_ext import (
    AdamWConfig,
    CautiousAdamWConfig,
    LRScaling,
    MuonConfig,
    NAdamWConfig,
    NesterovForm,
    PolarMethod,
)
from olmo_optim_ext.config import ExtOptimConfig

Grads = Dict[str, torch.Tensor]

STEPS = 20
"""Length of the runs that are compared across meshes and resumes."""


class MixedShapes(nn.Module):
    """One parameter of each kind; with 4 ranks some shards are uneven and some empty."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.square = nn.Linear(8, 8)
        self.tall = nn.Linear(8, 14, bias=False)
        self.wide = nn.Linear(20, 6, bias=False)
        self.few_rows = nn.Linear(8, 3)
        self.row = nn.Linear(8, 1)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.2)


def grads_at(step: int, model: nn.Module, scale: float = 0.1) -> Grads:
    """The global gradients of a step: the same whatever the mesh."""
    grads: Grads = {}
    for index, (name, param) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grads[name] = torch.randn(param.shape, generator=generator) * scale
    return grads


def train(
    model: nn.Module, optim: torch.optim.Optimizer, first: int, last: int, scale: float = 0.1
) -> None:
    """Steps ``first`` to ``last`` (exclusive) on plain tensors, under a moving learning rate."""
    for step in range(first, last):
        set_lr(optim, step)
        grads = grads_at(step, model, scale)
        for name, param in model.named_parameters():
            param.grad = grads[name]
        optim.step()
        optim.zero_grad()


def set_lr(optim: torch.optim.Optimizer, step: int) -> None:
    for group in optim.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * (1.0 - 0.01 * step)


def weights(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def relative_error(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
) -> float:
    """The largest ``||W - W_ref|| / ||W_ref - W_0||`` over parameters."""
    return max(
        float(
            torch.linalg.vector_norm(got[name].double() - expected[name].double())
            / torch.linalg.vector_norm(expected[name].double() - start[name].double())
        )
        for name in expected
    )


Oracle = Callable[[Dict[str, torch.Tensor], int], Dict[str, torch.Tensor]]
"""From the start weights and a number of steps to the end weights."""


@dataclass
class Case:
    config: ExtOptimConfig
    """With which the contracts run."""

    oracles: List[Tuple[ExtOptimConfig, Oracle, float]]
    """Pairs of a config and what it must agree with, and the relative error allowed."""

    bad_fields: List[Dict[str, Any]]
    """Values that the config must refuse, one field each."""

    bitwise: bool
    """Whether meshes agree bitwise."""

    fast_lr: float
    """A learning rate that solves the small problems."""

    state_bytes: Dict[str, float] = field(default_factory=dict)
    """Bytes of state per parameter by algorithm."""


def _torch_oracle(make: Callable[[List[nn.Parameter]], torch.optim.Optimizer]) -> Oracle:
    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        model.load_state_dict(start)
        optim = make(list(model.parameters()))
        train(model, optim, 0, steps)
        return weights(model)

    return run


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


def _muon_oracle(adjust_lr_fn: Optional[str], nesterov: bool) -> Oracle:
    """
    ``torch.optim.Muon`` and ``torch.optim.AdamW``, with an exact polar factor in place of torch's
    bfloat16 one: two right bfloat16 implementations differ by 2e-2.
    """

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        import torch.optim._muon as torch_muon

        def exact(grad, ns_coefficients, ns_steps, eps):
            u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
            return (u @ vh).to(grad.dtype)

        model = MixedShapes()
        model.load_state_dict(start)
        matrices = {"square.weight", "tall.weight", "wide.weight", "few_rows.weight"}
        named = dict(model.named_parameters())
        muon = torch.optim.Muon(
            [named[n] for n in sorted(matrices)],
            lr=0.01,
            weight_decay=0.1,
            momentum=0.9,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
        )
        adamw = torch.optim.AdamW(
            [p for n, p in named.items() if n not in matrices],
            lr=0.002,
            betas=(0.8, 0.9),
            eps=1e-7,
            weight_decay=0.05,
            foreach=False,
        )

        def spectral(lr, adjust_lr_fn, shape):  # torch has no such choice
            return lr * math.sqrt(shape[0] / shape[1])

        original = torch_muon._zeropower_via_newtonschulz, torch_muon._adjust_lr
        torch_muon._zeropower_via_newtonschulz = exact
        if adjust_lr_fn is None:
            torch_muon._adjust_lr = spectral
        try:
            for step in range(steps):
                grads = grads_at(step, model)
                for name, param in named.items():
                    param.grad = grads[name]
                for optim in (muon, adamw):
                    set_lr(optim, step)
                    optim.step()
        finally:
            torch_muon._zeropower_via_newtonschulz, torch_muon._adjust_lr = original
        return weights(model)

    return run


_ADAM_LIKE: Dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
_MUON: Dict[str, Any] = dict(
    lr=0.01,
    momentum=0.9,
    weight_decay=0.1,
    adamw_lr=0.002,
    adamw_betas=(0.8, 0.9),
    adamw_eps=1e-7,
    adamw_weight_decay=0.05,
)
_BAD_ENGINE: List[Dict[str, Any]] = [
    {"compile": "false"},
    {"skip_step": 1},
    {"rolling_interval_length": 1},
    {"rolling_interval_length": 1025},
    {"sigma_factor": 0},
    {"state_dtype": "float16"},
    {"seed": -1},
    {"cautious_weight_decay": "yes"},
]
_BAD_ADAM_LIKE: List[Dict[str, Any]] = [
    *_BAD_ENGINE,
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
                _torch_oracle(
                    lambda params: torch.optim.AdamW(params, foreach=False, **_ADAM_LIKE)
                ),
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
                _torch_oracle(
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
    "ext_muon": Case(
        config=MuonConfig(**_MUON),
        oracles=[
            (
                MuonConfig(
                    polar_method=PolarMethod.svd, lr_scaling=ours, nesterov=nesterov, **_MUON
                ),
                _muon_oracle(theirs, nesterov),
                5e-6,
            )
            for ours, theirs in (
                (LRScaling.match_adamw_rms, "match_rms_adamw"),
                (LRScaling.original, "original"),
                (LRScaling.spectral, None),
            )
            for nesterov in (True, False)
        ],
        bad_fields=[
            *_BAD_ENGINE,
            {"lr": -1.0},
            {"momentum": 1.0},
            {"momentum": -0.1},
            {"nesterov": "yes"},
            {"weight_decay": -0.1},
            {"lr_scaling": "rms_norm"},
            {"polar_method": "qr"},
            {"polar_steps": 0},
            {"polar_steps": 2.5},
            {"polar_dtype": "float16"},
            {"adamw_lr": -1.0},
            {"adamw_betas": (0.9,)},
            {"adamw_eps": -1.0},
            {"adamw_weight_decay": -1.0},
            {"muon_on_lm_head": 1},
        ],
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"muon": 4, "adamw": 8},
    ),
}
