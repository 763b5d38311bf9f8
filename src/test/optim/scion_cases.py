"""
The contract table: Scion.
"""

from typing import Any, Dict, List

import torch

from olmo_optim_ext import PolarMethod, ScionConfig, ScionNorm

from .case import BAD_ENGINE, MATRICES, Case, MixedShapes, Oracle, grads_at, set_lr, weights

LR = 0.01
ROLE_OF = {
    **{name: "matrix" for name in MATRICES},
    "embeddings.weight": "embedding",
    "lm_head.weight": "head",
}
"""Of the parameters of :class:`MixedShapes` that are no vectors."""


def norm_of(config: ScionConfig, role: str) -> str:
    return getattr(config, f"{role}_norm")


def radius_of(config: ScionConfig, role: str) -> float:
    norm = norm_of(config, role)
    of_rms = role == "vector" or norm == "rms"
    return getattr(config, "bias_rms_scale" if of_rms else f"{norm}_scale")


def lmo(d: torch.Tensor, norm: str, role: str, spectral_max: bool) -> torch.Tensor:
    """The paper's table of norms, matrix by matrix."""
    if norm == "rms":
        return d / ((d**2).mean() ** 0.5 + 1e-8)
    if role == "vector":
        return torch.sign(d)
    if norm == "sign":
        return torch.sign(d) / d.shape[1]
    if role == "embedding":  # columns are tokens, one-hot, so nothing is divided by their number
        return lmo_of_map(d.T, norm, spectral_max, divide=False).T
    return lmo_of_map(d, norm, spectral_max, divide=True)


def lmo_of_map(d: torch.Tensor, norm: str, spectral_max: bool, divide: bool) -> torch.Tensor:
    n_out, n_in = d.shape
    if norm == "spectral":
        u, _, vh = torch.linalg.svd(d, full_matrices=False)
        scale = (n_out / n_in) ** 0.5
        return (max(1.0, scale) if spectral_max else scale) * (u @ vh)
    out = torch.zeros_like(d)
    if norm == "column":
        for j in range(n_in):
            length = d[:, j].norm() / n_out**0.5 * (n_in if divide else 1)
            out[:, j] = d[:, j] / (length + 1e-8)
    else:
        for i in range(n_out):
            length = d[i].norm() * (n_in**0.5 if divide else 1)
            out[i] = d[i] / (length + 1e-8)
    return out


def _written_out(config: ScionConfig) -> Oracle:
    """The paper's SCG and uSCG in float64, with an exact polar factor."""

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        out = {}
        for name, initial in start.items():
            role = ROLE_OF.get(name, "vector")
            norm, radius = norm_of(config, role), radius_of(config, role)
            x, d = initial.double(), torch.zeros_like(initial).double()
            for step in range(steps):
                lr = LR * (1.0 - 0.01 * step)
                g = grads_at(step, MixedShapes())[name].double()
                d = (1 - config.momentum) * d + config.momentum * g
                to = -radius * lmo(d, norm, role, config.spectral_max)
                x = (1 - lr) * x + lr * to if config.constrained else x + lr * to
            out[name] = x
        return out

    return run


def _pytorch_optimizer(config: ScionConfig) -> Oracle:
    """The ``SCION`` of pytorch-optimizer, with an exact polar factor in place of a bfloat16 one."""

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        from pytorch_optimizer.optimizer import scion as their_module

        theirs: Any = their_module  # its function is replaced below

        kinds = {
            "spectral": theirs.LMONorm.SPECTRAL,
            "sign": theirs.LMONorm.SIGN,
            "column": theirs.LMONorm.COL,
            "row": theirs.LMONorm.ROW,
            "rms": theirs.LMONorm.BIAS,
        }

        def exact(grad: torch.Tensor, num_steps: int) -> torch.Tensor:
            u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
            return (u @ vh).to(grad.dtype)

        model = MixedShapes()
        model.load_state_dict(start)
        groups: List[Dict[str, Any]] = []
        for name, param in model.named_parameters():
            role = ROLE_OF.get(name, "vector")
            norm = norm_of(config, role)
            options: Dict[str, Any] = {}
            if norm in ("column", "row"):
                of_embedding = role == "embedding"
                options = {"normalized": not of_embedding, "transpose": of_embedding}
            if norm == "spectral":
                options = {"max_scale": config.spectral_max}
            groups.append(
                {
                    # Its RMS is over the first dimension, ours over the whole parameter.
                    "params": [param if role != "vector" else _flat(param)],
                    "norm_type": kinds[norm],
                    "norm_kwargs": options,
                    "scale": radius_of(config, role),
                }
            )
        params = {name: group["params"][0] for name, group in zip(start, groups)}
        optim = theirs.SCION(
            groups, lr=LR, momentum=config.momentum, constraint=config.constrained, foreach=False
        )
        original = theirs.zero_power_via_newton_schulz_5
        theirs.zero_power_via_newton_schulz_5 = exact
        try:
            for step in range(steps):
                grads = grads_at(step, model)
                for name, param in params.items():
                    param.grad = grads[name].view(param.shape)
                set_lr(optim, step)
                optim.step()
        finally:
            theirs.zero_power_via_newton_schulz_5 = original
        return weights(model)

    return run


def _flat(param: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(param.detach().view(-1))


RADII: Dict[str, Any] = dict(
    spectral_scale=2.0, sign_scale=16.0, bias_rms_scale=1.5, column_scale=9.0, row_scale=7.0
)
SCION: Dict[str, Any] = dict(lr=LR, momentum=0.2, **RADII)

spectral, sign, rms, column, row = (
    *(ScionNorm.spectral, ScionNorm.sign, ScionNorm.rms),
    *(ScionNorm.column, ScionNorm.row),
)


def _config(matrix: str, embedding: str, head: str, vector: str, **fields: Any) -> ScionConfig:
    norms: Dict[str, Any] = dict(
        matrix_norm=matrix, embedding_norm=embedding, head_norm=head, vector_norm=vector
    )
    return ScionConfig(polar_method=PolarMethod.svd, **{**SCION, **norms, **fields})


WRITTEN_OUT: List[ScionConfig] = [
    _config(spectral, sign, sign, rms),
    _config(spectral, sign, sign, rms, constrained=False),
    _config(column, column, row, sign),
    _config(row, row, column, rms, constrained=False),
    _config(sign, rms, spectral, sign, momentum=1.0),
    _config(rms, spectral, spectral, sign, spectral_max=True, constrained=False),
    _config(spectral, column, rms, rms, spectral_max=True),
]
THEIRS: List[ScionConfig] = [
    _config(spectral, sign, sign, rms),
    _config(spectral, column, sign, rms, spectral_max=True, constrained=False),
    _config(column, row, row, rms, momentum=1.0),
    _config(sign, sign, column, rms, constrained=False),
]

CASES: Dict[str, Case] = {
    "scion": Case(
        config=ScionConfig(**SCION),
        oracles=[
            *((config, _written_out(config), 2e-6) for config in WRITTEN_OUT),
            *((config, _pytorch_optimizer(config), 2e-6) for config in THEIRS),
        ],
        bad_fields=[
            *BAD_ENGINE,
            {"cautious_weight_decay": True},
            {"lr": -1.0},
            {"momentum": 0.0},
            {"momentum": 1.1},
            {"momentum": True},
            {"constrained": "no"},
            {"spectral_max": 1},
            {"matrix_norm": "frobenius"},
            {"embedding_norm": "auto"},
            {"head_norm": None},
            {"vector_norm": "column"},
            {"vector_norm": "spectral"},
            {"spectral_scale": 0.0},
            {"sign_scale": -1.0},
            {"bias_rms_scale": float("inf")},
            {"column_scale": "wide"},
            {"row_scale": 0},
            {"polar_method": "qr"},
            {"polar_steps": 0},
            {"polar_dtype": "float16"},
            {"polar_form": "square"},
        ],
        bitwise=False,
        fast_lr=0.1,
        state_bytes={"scion": 4, "sign": 4, "rms": 4},
        without_decay={"constrained": False},
        other_values={"lr": 0.02, "momentum": 0.3, "constrained": False},
    )
}

INITIALIZED = _config(spectral, column, sign, sign, seed=3)
"""Which the initialisation is tested with."""
