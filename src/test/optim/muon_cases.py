"""
The contract table: Muon and NorMuon.
"""

import math
from typing import Any, Dict, List, Optional

import torch

from olmo_optim_ext import LRScaling, MuonConfig, NorMuonConfig, PolarMethod

from .case import (
    ADAMW_REST,
    BAD_ENGINE,
    MATRICES,
    Case,
    MixedShapes,
    Oracle,
    adamw_oracle,
    grads_at,
    set_lr,
    weights,
)


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
        named = dict(model.named_parameters())
        muon = torch.optim.Muon(
            [named[n] for n in MATRICES],
            lr=0.01,
            weight_decay=0.1,
            momentum=0.9,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
        )
        adamw = torch.optim.AdamW(
            [p for n, p in named.items() if n not in MATRICES],
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


def _package_nor_muon(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """pytorch-optimizer's ``NorMuon``, with an exact polar factor in place of its bfloat16 one."""
    from pytorch_optimizer import NorMuon
    from pytorch_optimizer.optimizer.muon import normuon as module

    normuon: Any = module

    def exact(x, num_steps, weights):
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        return (u @ vh).to(x.dtype)

    out = adamw_oracle(start, steps)
    model = MixedShapes()
    model.load_state_dict(start)
    matrices = [model.get_parameter(name) for name in MATRICES]
    own = dict(lr=0.01, momentum=0.9, beta2=0.8, weight_decay=0.1, use_muon=True)
    optim = NorMuon([dict(params=matrices, **own)], foreach=False)
    original = normuon.zero_power_via_newton_schulz_5
    normuon.zero_power_via_newton_schulz_5 = exact
    try:
        for step in range(steps):
            set_lr(optim, step)
            grads = grads_at(step, model)
            for name, param in zip(MATRICES, matrices):
                param.grad = grads[name]
            optim.step()
    finally:
        normuon.zero_power_via_newton_schulz_5 = original
    return {**out, **{name: param.detach() for name, param in zip(MATRICES, matrices)}}


def _nor_muon(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """
    The authors' rule in float64 with an exact polar factor, written out for one step at a time, and
    :func:`_adamw` for the rest.
    """
    out = adamw_oracle(start, steps)
    for name in MATRICES:
        w = start[name].double()
        m, v = torch.zeros_like(w), torch.zeros(len(w), 1).double()
        for step in range(steps):
            lr = 0.01 * (1.0 - 0.01 * step)
            g = grads_at(step, MixedShapes())[name].double()
            m = 0.9 * m + 0.1 * g
            u, _, vh = torch.linalg.svd(0.9 * m + 0.1 * g, full_matrices=False)
            o = u @ vh
            v = 0.8 * v + 0.2 * (o * o).mean(dim=1, keepdim=True)
            o2 = o / (v.sqrt() + 1e-10)
            o2 = o2 * o.norm() / o2.norm()
            w = w - lr * 0.1 * w - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * o2
        out[name] = w
    return out


MUON: Dict[str, Any] = dict(lr=0.01, momentum=0.9, weight_decay=0.1, **ADAMW_REST)
NOR_MUON: Dict[str, Any] = dict(**MUON, beta2=0.8)
BAD_MUON: List[Dict[str, Any]] = [
    *BAD_ENGINE,
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
    {"polar_form": "square"},
]

CASES: Dict[str, Case] = {
    "ext_nor_muon": Case(
        config=NorMuonConfig(**NOR_MUON),
        oracles=[
            (NorMuonConfig(polar_method=PolarMethod.svd, **NOR_MUON), oracle, 1e-5)
            for oracle in (_nor_muon, _package_nor_muon)
        ],
        bad_fields=[
            *BAD_MUON,
            {"beta2": 1.0},
            {"row_eps": 0.0},
        ],
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"nor_muon": 4, "adamw": 8},
        factor_bytes=lambda n_out, n_in: 4 * n_out,
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
    ),
    "ext_muon": Case(
        config=MuonConfig(**MUON),
        oracles=[
            (
                MuonConfig(
                    polar_method=PolarMethod.svd, lr_scaling=ours, nesterov=nesterov, **MUON
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
        bad_fields=BAD_MUON,
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"muon": 4, "adamw": 8},
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
    ),
}
