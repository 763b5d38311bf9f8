"""
The contract table: Dion.
"""

import math
from typing import Any, Dict, Tuple

import torch

from olmo_optim_ext import DionConfig, Orthonormalization, OrthonormalSide

from .case import (
    ADAMW_REST,
    BAD_ENGINE,
    MATRICES,
    Case,
    MixedShapes,
    Oracle,
    adamw_oracle,
    grads_at,
)

_DION: Dict[str, Any] = dict(
    lr=0.01, momentum=0.9, weight_decay=0.1, rank_fraction=0.5, **ADAMW_REST
)


def dion_step(
    w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, lr: float
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The authors' rule on one device, for a matrix that is not transposed. New ``W, M, V``."""
    m = m + g
    p, _ = torch.linalg.qr(m @ v)
    r = m.T @ p
    m = m - (1 - 0.9) * p @ r.T
    v = r / (r.norm(dim=0) + 1e-8)
    return w * (1 - lr * 0.1) - lr * math.sqrt(w.shape[0] / w.shape[1]) * p @ v.T, m, v


def _dion(config: DionConfig, transposes: Any) -> Oracle:
    """
    The authors' rule in float64 with Householder QR, from the basis that ours begins with.

    :param transposes: From rows and columns to whether the transpose is approximated.
    """

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        out = adamw_oracle(start, steps)
        model = MixedShapes()
        optim = config.build(model)
        for name in MATRICES:
            w = start[name].double()
            flip = transposes(*w.shape)
            b = w.shape[0] if flip else w.shape[1]
            v = optim.state[model.get_parameter(name)]["basis"].view(b, -1).double()
            m = torch.zeros_like(w)
            for step in range(steps):
                lr = 0.01 * (1.0 - 0.01 * step)
                g = grads_at(step, MixedShapes())[name].double()
                if flip:
                    # The scale is that of the matrix, not of its transpose.
                    rate = lr * w.shape[0] / w.shape[1]
                    new, mt, v = dion_step(w.T, m.T, v, g.T, rate)
                    w = (new - w.T * (1 - rate * 0.1) + w.T * (1 - lr * 0.1)).T
                    m = mt.T
                else:
                    w, m, v = dion_step(w, m, v, g, lr)
            out[name] = w
        return out

    return run


def _oracle(transposes: Any, **fields: Any) -> Tuple[DionConfig, Oracle, float]:
    config = DionConfig(**{**_DION, **fields})
    return config, _dion(config, transposes), 1e-5


CASES: Dict[str, Case] = {
    "ext_dion": Case(
        config=DionConfig(**_DION),
        oracles=[
            _oracle(lambda rows, cols: rows < cols),
            _oracle(lambda rows, cols: rows < cols, orthonormalization=Orthonormalization.qr),
            _oracle(lambda rows, cols: rows < cols, rank_fraction=1.0),
            _oracle(lambda rows, cols: rows < cols, rank_multiple_of=3),
            _oracle(lambda rows, cols: True, orthonormal_side=OrthonormalSide.inputs),
            _oracle(lambda rows, cols: False, orthonormal_side=OrthonormalSide.outputs),
        ],
        bad_fields=[
            *BAD_ENGINE,
            {"lr": -1.0},
            {"momentum": 1.0},
            {"weight_decay": -0.1},
            {"rank_fraction": 0.0},
            {"rank_fraction": 1.5},
            {"rank_multiple_of": 0},
            {"rank_multiple_of": 1.5},
            {"orthonormal_side": "rows"},
            {"orthonormalization": "cqr"},
            {"basis_eps": 0.0},
            {"scale_head_lr": "yes"},
            {"adamw_lr": -1.0},
            {"adamw_betas": (0.9,)},
        ],
        bitwise=False,
        fast_lr=0.3,
        state_bytes={"dion": 4, "adamw": 8},
        factor_bytes=lambda n_out, n_in: 4 * min(n_out, n_in) * math.ceil(min(n_out, n_in) / 2),
        without_decay={"weight_decay": 0.0, "adamw_weight_decay": 0.0},
    ),
}
