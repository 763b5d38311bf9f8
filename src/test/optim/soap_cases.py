"""
The contract table: SOAP.
"""

from typing import Any, Dict, List, Sequence

import torch

from olmo_optim_ext import SoapConfig
from olmo_optim_ext.linalg.eigenbasis import eigenbasis, gram_average

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

SOAP: Dict[str, Any] = dict(
    lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, precondition_frequency=3, **ADAMW_REST
)


def first_basis(grad: torch.Tensor, side: int, beta: float) -> torch.Tensor:
    """
    Of a first gradient. Of the Gram matrix of a longer side the null space has any basis: a package
    needs to be given this one, in columns.
    """
    grad = grad.view(len(grad), -1)
    n, x = grad.shape[side], grad.mT if side else grad
    (basis,), _ = eigenbasis(gram_average(torch.zeros(1, n, n), x[None], beta))
    return basis.mT


def package_soap(
    params: Sequence[torch.Tensor],
    grads_of: Any,
    steps: int,
    beta: float,
    same_first_basis: bool = True,
    **fields: Any,
) -> None:
    """
    Train with pytorch-optimizer's ``SOAP``.

    :param grads_of: From a step to the gradients of the parameters.
    :param beta: Of the Gram matrices.
    """
    from pytorch_optimizer import SOAP as PackageSoap

    optim = PackageSoap(params, shampoo_beta=beta, **fields)
    for step in range(steps):
        set_lr(optim, step)
        for param, grad in zip(params, grads_of(step)):
            param.grad = grad.clone()
        optim.step()
        if step == 0 and same_first_basis:
            for param, grad in zip(params, grads_of(0)):
                state: Any = optim.state[param]
                state["Q"] = [
                    first_basis(grad, side, beta) if len(basis) else []
                    for side, basis in enumerate(state["Q"])
                ]


def _package(beta: float = 0.95, **fields: Any) -> Oracle:
    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        out = adamw_oracle(start, steps)
        model = MixedShapes()
        model.load_state_dict(start)
        matrices = [model.get_parameter(name) for name in MATRICES]
        own = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "precondition_frequency": 3}
        package_soap(
            matrices,
            lambda step: [grads_at(step, MixedShapes())[name] for name in MATRICES],
            steps,
            beta,
            **{**own, **fields},
        )
        return {**out, **{name: param.detach() for name, param in zip(MATRICES, matrices)}}

    return run


BAD_SOAP: List[Dict[str, Any]] = [
    *BAD_ENGINE,
    {"lr": -1.0},
    {"betas": (0.9,)},
    {"betas": (0.9, 1.0)},
    {"shampoo_beta": 1.0},
    {"shampoo_beta": -1},
    {"eps": -1.0},
    {"weight_decay": -0.1},
    {"precondition_frequency": 0},
    {"precondition_frequency": 2.5},
    {"max_precond_dim": 0},
    {"one_sided": 1},
    {"normalize_grads": "yes"},
    {"correct_bias": 0},
    {"stagger": "no"},
    {"float64_on_failure": 1},
    {"block_size": 0},
    {"precondition_1d": 1},
    {"precondition_embeddings": "yes"},
    {"precondition_lm_head": 0},
    {"adamw_lr": -1.0},
    {"adamw_betas": (0.9,)},
    {"adamw_eps": -1.0},
    {"adamw_weight_decay": -1.0},
]

CASES: Dict[str, Case] = {
    "soap": Case(
        config=SoapConfig(**SOAP),
        oracles=[
            (SoapConfig(**SOAP), _package(), 5e-6),
            (
                SoapConfig(**{**SOAP, "precondition_frequency": 10}),
                _package(precondition_frequency=10),
                5e-6,
            ),
            (SoapConfig(**SOAP, shampoo_beta=0.8), _package(0.8), 5e-6),
            (SoapConfig(**SOAP, correct_bias=False), _package(correct_bias=False), 5e-6),
            (SoapConfig(**SOAP, normalize_grads=True), _package(normalize_gradient=True), 5e-6),
            (SoapConfig(**SOAP, max_precond_dim=8), _package(max_precondition_dim=8), 5e-6),
        ],
        bad_fields=BAD_SOAP,
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"soap": 8, "adamw": 8},
        factor_bytes=lambda n_out, n_in: 8 * (n_out**2 + n_in**2) + 8,
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
    ),
}
