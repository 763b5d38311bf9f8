"""
The contract table: Kron.
"""

from typing import Any, Dict, List, Sequence, Tuple

import torch

from olmo_optim_ext import KronConfig, KronFit, MemorySaveMode
from olmo_optim_ext.engine.random import generator

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
)

KRON: Dict[str, Any] = dict(lr=0.01, momentum=0.9, weight_decay=0.1, **ADAMW_REST)
SCHEDULE: Dict[str, Any] = dict(
    precond_update_prob_min=0.15,
    precond_update_prob_decay=0.1,
    precond_update_prob_flat_start=5,
)


def package_kron(
    names: Sequence[str],
    params: Sequence[torch.Tensor],
    grads_of: Any,
    steps: int,
    leaks: bool = True,
    **fields: Any,
) -> None:
    """
    Train with pytorch-optimizer's ``Kron``, given our probes, and damped as kron_torch is.

    :param names: Of the parameters.
    :param grads_of: From a step to the gradients of the parameters.
    :param leaks: Whether the noise stays in what is preconditioned, as in kron_torch.
    """
    from pytorch_optimizer import Kron as PackageKron
    from pytorch_optimizer.optimizer import psgd

    module: Any = psgd
    original = module.update_precondition
    order: List[str] = []

    def with_our_probe(qs, expressions, v, g, lr, eps):
        name = order.pop(0)
        v = torch.randn(v.shape, generator=generator(0, call, name, "probe", v.device))
        noise = 1.1920929e-07**0.5 * g.abs().mean() * v
        g = g.add_(noise) if leaks else g + noise
        return original(qs, expressions, v, g, lr, eps)

    optim = PackageKron(params, **fields)
    module.update_precondition = with_our_probe
    try:
        for step in range(steps):
            order[:], call = names, step + 1
            set_lr(optim, step)
            for param, grad in zip(params, grads_of(step)):
                param.grad = grad.clone()
            optim.step()
    finally:
        module.update_precondition = original


def _package(**fields: Any) -> Oracle:
    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        out = adamw_oracle(start, steps)
        model = MixedShapes()
        model.load_state_dict(start)
        matrices = [model.get_parameter(name) for name in MATRICES]
        own = {
            **dict(lr=0.01, momentum=0.9, weight_decay=0.1, balance_prob=0.0),
            "pre_conditioner_update_probability": 1.0,
        }
        package_kron(
            MATRICES,
            matrices,
            lambda step: [grads_at(step, MixedShapes())[name] for name in MATRICES],
            steps,
            **{**own, **fields},
        )
        return {**out, **{name: param.detach() for name, param in zip(MATRICES, matrices)}}

    return run


def _schedule(n: int) -> torch.Tensor:
    return torch.exp(torch.tensor(-0.1 * (n - 5))).clamp(0.15, 1.0)


ORACLES: List[Tuple[Dict[str, Any], Dict[str, Any]]] = [
    ({}, {"leaks": False}),
    ({"author_noise": True}, {}),
    ({"author_noise": True, **SCHEDULE}, {"pre_conditioner_update_probability": _schedule}),
    ({"author_noise": True, "balance_prob": 1.0}, {"balance_prob": 1.0}),
    (
        {"momentum_into_precond_update": False},
        {"momentum_into_precondition_update": False, "leaks": False},
    ),
    ({"author_noise": True, "max_size_triangular": 8}, {"max_size_triangular": 8}),
    ({"author_noise": True, "min_ndim_triangular": 3}, {"min_ndim_triangular": 3}),
    *(
        ({"author_noise": True, "memory_save_mode": mode}, {"memory_save_mode": str(mode)})
        for mode in (
            MemorySaveMode.one_diag,
            MemorySaveMode.smart_one_diag,
            MemorySaveMode.all_diag,
        )
    ),
]

CASES: Dict[str, Case] = {
    "kron": Case(
        config=KronConfig(**KRON, **SCHEDULE, balance_prob=0.5),
        oracles=[
            (KronConfig(**{**KRON, "balance_prob": 0.0, **ours}), _package(**theirs), 1e-5)
            for ours, theirs in ORACLES
        ],
        bad_fields=[
            *BAD_ENGINE,
            {"lr": -1.0},
            {"momentum": 1.0},
            {"weight_decay": -0.1},
            {"update": "eq"},
            {"precond_lr": 0.0},
            {"precond_lr": 1.5},
            {"precond_init_scale": 0.0},
            {"precond_update_prob_max": 0.0},
            {"precond_update_prob_min": 1.5},
            {"precond_update_prob_decay": -1.0},
            {"precond_update_prob_flat_start": -1},
            {"precond_update_prob_flat_start": 0.5},
            {"balance_prob": 1.5},
            {"max_size_triangular": 0},
            {"min_ndim_triangular": 0},
            {"memory_save_mode": "some"},
            {"momentum_into_precond_update": 1},
            {"trust_region": "norm"},
            {"author_noise": "yes"},
            {"block_size": 0},
            {"precondition_1d": 1},
            {"precondition_embeddings": "yes"},
            {"precondition_lm_head": 0},
            {"adamw_lr": -1.0},
            {"adamw_betas": (0.9,)},
            {"adamw_eps": -1.0},
            {"adamw_weight_decay": -1.0},
        ],
        bitwise=False,
        fast_lr=0.1,
        state_bytes={"kron": 4, "adamw": 8},
        factor_bytes=lambda n_out, n_in: 4 * (n_out**2 + n_in**2),
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
        without_randomness={"precond_update_prob_max": 0.2},
    ),
}

PRO = KronConfig(**KRON, **SCHEDULE, balance_prob=0.5, update=KronFit.pro)
