"""
The catalogue's rows of rules for matrices.
"""

from typing import Any, Mapping, Tuple

from ..optimizer_info import SETTING, SWEEP, OptimizerInfo, Preset
from .dion import DionConfig
from .kron import KronConfig
from .muon import MuonConfig
from .muon_isotropic import MuonIsotropicConfig
from .muon_nolah import MuonNolahConfig
from .muon_orthonoise import MuonOrthoNoiseConfig
from .nor_muon import NorMuonConfig
from .scion import ScionConfig
from .soap import SoapConfig

__all__ = ["ROWS"]

_WHOLE_MATRICES = (
    "with sharded rows each matrix element once to its owner and once back: 2 x its share of the "
    "matrix bytes"
)

_ALL_ON_OWNERS = (
    "all state, also what is counted per parameter, is on the owner with sharded rows, else on "
    "each rank"
)

_NOISE: Mapping[str, Any] = dict(
    family="matrix",
    paper="project-muon-nolah (code, no paper)",
    state_bytes_per_param=4,
    factors=(
        "a count; with rank_threshold 8 KiB at most; with persist_noise 4 bytes an element; on "
        "the owner with sharded rows, else on each rank"
    ),
    exchange="8 bytes a matrix in an all-reduce, and "
    + _WHOLE_MATRICES
    + "; nothing under DDP, where each rank computes all",
)

ROWS: Tuple[OptimizerInfo, ...] = (
    OptimizerInfo(
        name="ext_muon",
        config_class=MuonConfig,
        family="matrix",
        summary="Orthogonalised momentum for matrices, AdamW for the rest",
        paper="kellerjordan.github.io/posts/muon; arXiv:2502.16982",
        state_bytes_per_param=4,
        exchange=_WHOLE_MATRICES + "; under DDP its share of the updates once",
        presets=(
            Preset(
                SETTING.format("8x"),
                {
                    "lr": 0.008,
                    "momentum": 0.98,
                    "lr_scaling": "original",
                    "weight_decay": 0.1,
                    "adamw_lr": 0.0024,
                    "adamw_betas": (0.8, 0.98),
                    "adamw_eps": 1e-15,
                },
                SWEEP + "; it clips the gradients of the AdamW half only",
            ),
        ),
    ),
    OptimizerInfo(
        name="ext_dion",
        config_class=DionConfig,
        family="matrix",
        summary="Momentum, orthonormalised in a subspace of a chosen rank that follows it",
        paper="arXiv:2504.05295",
        state_bytes_per_param=4,
        factors="4 r bytes for each unit of the side that is not orthonormalised",
        exchange="thin factors, never the matrix. In numbers, per matrix (out, in) with rows "
        "shared by W ranks: 2 r in where inputs are orthonormalised, else 3 r in + 2 r out / W; "
        "under DDP r (in + out) / W",
    ),
    OptimizerInfo(
        name="ext_nor_muon",
        config_class=NorMuonConfig,
        family="matrix",
        summary="Muon with rows of like size, by a second moment of each neuron",
        paper="arXiv:2510.05491",
        state_bytes_per_param=4,
        factors="4 bytes a row",
        exchange=_WHOLE_MATRICES + "; nothing under DDP, where each rank computes all",
    ),
    OptimizerInfo(
        name="scion",
        config_class=ScionConfig,
        family="matrix",
        summary="Steps to the border of a norm ball, with a norm for each role",
        paper="arXiv:2502.07529",
        state_bytes_per_param=4,
        exchange=_WHOLE_MATRICES
        + "; under DDP its share of the updates once; 8 bytes a vector, in one all-reduce",
        presets=(
            Preset(
                SETTING.format("1x"),
                {
                    "lr": 0.0016,
                    "momentum": 0.05,
                    "spectral_scale": 10.0,
                    "spectral_max": True,
                    "polar_steps": 10,
                    "group_overrides": [
                        {
                            "params": ["lm_head.w_out.weight"],
                            "opts": {"lr": 0.00032, "radius": 10.0, "fan_in": 1},
                        },
                        {
                            "params": ["embeddings.weight", "*norm.weight"],
                            "opts": {
                                "norm": "sign",
                                "lr": 0.0032,
                                "radius": 1.0,
                                "fan_in": 1,
                                "constrained": False,
                            },
                        },
                    ],
                },
                SWEEP
                + ": learning rate 0.016, a fifth of it for signs, weight decay 0.1, but none "
                "of embeddings and gains; it clips the gradients of the sign half only. Names are "
                "those of OLMo-core's Transformer, not tied",
            ),
        ),
    ),
    OptimizerInfo(
        name="soap",
        config_class=SoapConfig,
        family="matrix",
        summary="Adam in the eigenbasis of Shampoo's preconditioner",
        paper="arXiv:2409.11321",
        state_bytes_per_param=8,
        factors="8 (out^2 + in^2) bytes and 8 more, without a side that has no preconditioner; "
        + _ALL_ON_OWNERS,
        exchange=_WHOLE_MATRICES + "; nothing under DDP, where each rank computes all",
        presets=(
            Preset(
                SETTING.format("1x"),
                {
                    "lr": 0.016,
                    "betas": (0.95, 0.98),
                    "shampoo_beta": 0.95,
                    "eps": 1e-15,
                    "weight_decay": 0.1,
                    "precondition_frequency": 1,
                    "block_size": 256,
                },
                SWEEP + ", which keeps momentum in the original basis, and where embeddings, head "
                "and gains follow SOAP too",
            ),
        ),
    ),
    OptimizerInfo(
        name="kron",
        config_class=KronConfig,
        family="matrix",
        summary="Momentum, whitened by a preconditioner with Kronecker factors (PSGD)",
        paper="arXiv:1512.04202; kron_torch (code)",
        state_bytes_per_param=4,
        factors="4 (out^2 + in^2) bytes, of a side whose factor is diagonal 4 n, with "
        "update: pro 4 more for each side; " + _ALL_ON_OWNERS,
        exchange=_WHOLE_MATRICES + "; nothing under DDP, where each rank computes all",
    ),
    OptimizerInfo(
        name="muon_orthonoise",
        config_class=MuonOrthoNoiseConfig,
        summary="Muon with orthogonal noise on momentum of low rank; an experiment",
        **_NOISE,
    ),
    OptimizerInfo(
        name="muon_isotropic",
        config_class=MuonIsotropicConfig,
        summary="The control of muon_orthonoise: Gaussian noise of the same norm",
        **_NOISE,
    ),
    OptimizerInfo(
        name="muon_nolah",
        config_class=MuonNolahConfig,
        family="matrix",
        summary="Muon with gated gradients and damped momentum, a baseline for ablations",
        paper="project-muon-nolah (code, no paper)",
        state_bytes_per_param=4,
        exchange="16 KiB a matrix in four all-reduces, and "
        + _WHOLE_MATRICES
        + "; under DDP its share of the updates once",
    ),
)
