"""
The catalogue: one row per optimizer.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Tuple, Type

from olmo_core.exceptions import OLMoConfigurationError

from .config import ExtOptimConfig
from .elementwise.adamw import AdamWConfig
from .elementwise.cautious_adamw import CautiousAdamWConfig
from .elementwise.nadamw import NAdamWConfig
from .elementwise.sophia import SophiaConfig
from .matrix.dion import DionConfig
from .matrix.kron import KronConfig
from .matrix.muon import MuonConfig
from .matrix.muon_isotropic import MuonIsotropicConfig
from .matrix.muon_nolah import MuonNolahConfig
from .matrix.muon_orthonoise import MuonOrthoNoiseConfig
from .matrix.nor_muon import NorMuonConfig
from .matrix.scion import ScionConfig
from .matrix.soap import SoapConfig

__all__ = [
    "OptimizerInfo",
    "Preset",
    "closest",
    "get_config_class",
    "list_optimizers",
    "markdown_table",
    "optimizer_info",
]


@dataclass(frozen=True)
class Preset:
    """Tuned values from the literature."""

    setting: str
    """Model, tokens and batch that the values were tuned for."""

    fields: Mapping[str, Any]
    """Config fields that differ from the defaults."""

    source: str
    """Where the values are from, and how that implementation differs."""


@dataclass(frozen=True)
class OptimizerInfo:
    """A row of the catalogue."""

    name: str
    """The name with which the config is registered."""

    config_class: Type[ExtOptimConfig]

    family: str
    """``elementwise`` or ``matrix``."""

    summary: str

    paper: str
    """Where the rule is defined."""

    state_bytes_per_param: float
    """
    Bytes of state per parameter that follows the optimizer's own rule, float32 state. What a
    matrix rule leaves to AdamW has 8.
    """

    exchange: str
    """What a rank sends in a step, beside what the data parallelism itself sends."""

    factors: str = ""
    """State of a matrix beside these, in words; empty if there is none."""

    needs: Tuple[str, ...] = ()
    """What must drive it beside gradients."""

    presets: Tuple[Preset, ...] = ()


_SWEEP = (
    "arXiv:2509.02046, C4, learning rate decayed to 0, clip 1.0; tuned with Levanter's JAX "
    "implementation"
)
_SETTING = "130M, {} Chinchilla, batch 128 x 4096 tokens"

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

_ROWS = (
    OptimizerInfo(
        name="ext_adamw",
        config_class=AdamWConfig,
        family="elementwise",
        summary="AdamW with decoupled weight decay",
        paper="arXiv:1711.05101",
        state_bytes_per_param=8,
        exchange="nothing",
        presets=(
            Preset(
                _SETTING.format("1x"),
                {"lr": 0.008, "betas": (0.9, 0.98), "eps": 1e-20, "weight_decay": 0.1},
                _SWEEP,
            ),
        ),
    ),
    OptimizerInfo(
        name="nadamw",
        config_class=NAdamWConfig,
        family="elementwise",
        summary="AdamW with Nesterov momentum, in three forms",
        paper="Dozat 2016; arXiv:1711.05101",
        state_bytes_per_param=8,
        exchange="nothing",
        presets=(
            Preset(
                _SETTING.format("1x"),
                {
                    "lr": 0.008,
                    "betas": (0.95, 0.98),
                    "eps": 1e-25,
                    "weight_decay": 0.1,
                    "nesterov": "dozat",
                },
                _SWEEP,
            ),
        ),
    ),
    OptimizerInfo(
        name="cautious_adamw",
        config_class=CautiousAdamWConfig,
        family="elementwise",
        summary="AdamW that leaves coordinates alone in which momentum and gradient differ in sign",
        paper="arXiv:2411.16085",
        state_bytes_per_param=8,
        exchange="8 bytes a parameter tensor, in one all-reduce",
        presets=(
            Preset(
                _SETTING.format("1x"),
                {"lr": 0.008, "betas": (0.95, 0.98), "eps": 1e-15, "weight_decay": 0.1},
                _SWEEP + ", which has no floor of the mask's mean",
            ),
        ),
    ),
    OptimizerInfo(
        name="sophia",
        config_class=SophiaConfig,
        family="elementwise",
        summary="Momentum over an estimate of the Hessian's diagonal, clipped in each coordinate",
        paper="arXiv:2305.14342",
        state_bytes_per_param=8,
        exchange="nothing; with an estimate of the Hessian also what its passes send",
        needs=("hessian",),
        presets=(
            Preset(
                _SETTING.format("1x"),
                {
                    "lr": 0.004,
                    "betas": (0.95, 0.9),
                    "rho": 0.0125,
                    "eps": 1e-7,
                    "weight_decay": 0.0,
                    "estimator": "hutchinson",
                },
                _SWEEP + ", which corrects the momentum's bias and draws probes from the normal "
                "distribution; 4000 steps of warm-up, without which it diverged",
            ),
        ),
    ),
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
                _SETTING.format("8x"),
                {
                    "lr": 0.008,
                    "momentum": 0.98,
                    "lr_scaling": "original",
                    "weight_decay": 0.1,
                    "adamw_lr": 0.0024,
                    "adamw_betas": (0.8, 0.98),
                    "adamw_eps": 1e-15,
                },
                _SWEEP + "; it clips the gradients of the AdamW half only",
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
                _SETTING.format("1x"),
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
                _SWEEP
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
                _SETTING.format("1x"),
                {
                    "lr": 0.016,
                    "betas": (0.95, 0.98),
                    "shampoo_beta": 0.95,
                    "eps": 1e-15,
                    "weight_decay": 0.1,
                    "precondition_frequency": 1,
                    "block_size": 256,
                },
                _SWEEP + ", which keeps momentum in the original basis, and where embeddings, head "
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

_BY_NAME: Dict[str, OptimizerInfo] = {row.name: row for row in _ROWS}


def closest(name: str, allowed: Iterable[str]) -> str:
    """For messages: the allowed names, and those most like ``name``."""
    names = list(allowed)
    known = {
        **{each.removeprefix("ext_"): each for each in names},
        **{each: each for each in names},
    }
    matches = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    near = dict.fromkeys(known[match] for match in matches)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"{', '.join(names)}{hint}"


def list_optimizers() -> List[str]:
    """The names of all optimizers of this package."""
    return list(_BY_NAME)


def markdown_table() -> str:
    """The catalogue as a Markdown table, for the README."""
    lines = ["| name | what it is | state, bytes per parameter | source |", "|---|---|---|---|"]
    for row in _ROWS:
        lines.append(
            f"| `{row.name}` | {row.summary} | {row.state_bytes_per_param:g} | {row.paper} |"
        )
    return "\n".join(lines) + "\n"


def optimizer_info(name: str) -> OptimizerInfo:
    """
    The catalogue's row of an optimizer. A bare ``muon`` means ``ext_muon``.

    :raises OLMoConfigurationError: If there is no such optimizer; gives the closest names.
    """
    for candidate in (name, f"ext_{name}"):
        if candidate in _BY_NAME:
            return _BY_NAME[candidate]
    raise OLMoConfigurationError(
        f"there is no optimizer {name!r}, allowed are {closest(name, _BY_NAME)}"
    )


def get_config_class(name: str) -> Type[ExtOptimConfig]:
    """
    The config class of an optimizer.

    :raises OLMoConfigurationError: If there is no such optimizer; gives the closest names.
    """
    return optimizer_info(name).config_class
