"""
What is run on every mesh: all names, and besides what options and other models change.
"""

from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Sequence

from olmo_core.config import DType
from olmo_core.optim import OptimGroupOverride

from olmo_optim_ext import (
    DionConfig,
    KronConfig,
    KronFit,
    OrthonormalSide,
    SoapConfig,
    get_config_class,
    list_optimizers,
    optimizer_info,
)
from olmo_optim_ext.config import ExtOptimConfig, MatrixOptimConfig
from olmo_optim_ext.engine.elementwise import ElementwiseOptimizer
from olmo_optim_ext.matrix.orthogonal import PolarConfig
from olmo_optim_ext.matrix.preconditioned import PreconditionedConfig

from .case import MixedShapes
from .cases import CASES
from .models import ExpertShapes, SketchShapes
from .noise_cases import TRIGGERED
from .toys import PerShardMaskConfig, ShardLocalMuonConfig, WhiteningConfig


class Variant(NamedTuple):
    name: str
    model: Any
    """From a seed to a model."""
    config: ExtOptimConfig
    bitwise: bool
    routes: Sequence[str] = ()
    """On which numbers of ranks it is saved, and on which meshes continued."""
    everywhere: bool = True
    """Whether it runs on all meshes, or on one of each kind."""


ROUTES = ("1tofsdp2", "2tofsdp4", "2tohsdp2x2", "4to1")
ONE_ROUTE = ("2tofsdp4",)

ONE_OF_A_LOOP = (
    *("ext_adamw", "cautious_adamw", "lamb", "adam_mini", "adafactor"),
    *("ext_muon", "ext_nor_muon", "ext_dion"),
)
"""
Names for coordinates, with sums over parameters, for rows and columns; for whole matrices, these
with factors, and thin factors.
"""


def runs_everywhere(name: str) -> bool:
    """Whether a name runs on all meshes: rules for matrices, and one of each loop."""
    return name in ONE_OF_A_LOOP or _family(name) == "matrix"


def routes_of(name: str) -> Sequence[str]:
    """
    One is enough for a rule that has nothing but tensors of coordinates, as AdamW has, and for
    another form of what has them all.
    """
    update = CASES[name].config.optimizer().update
    plain = update is ElementwiseOptimizer.update and name not in ONE_OF_A_LOOP
    return ONE_ROUTE if plain or name == "ranger" or name not in list_optimizers() else ROUTES


def depends_on_layout(name: str) -> bool:
    """Whether a stack of matrices is to a rule anything else than so many coordinates."""
    return name in (*ONE_OF_A_LOOP, "mars") or _family(name) != "elementwise"


def tolerance(name: str) -> float:
    """How far meshes may be apart where they do not agree bitwise, in terms of the motion."""
    case = CASES.get(name)
    by_sums = case is not None and not isinstance(case.config.rule_config, MatrixOptimConfig)
    return 1e-6 if by_sums else 1e-5


def _family(name: str) -> str:
    return optimizer_info(str(type(CASES[name].config).registered_name)).family


ONE_OF_EACH = ("fsdp2", "ddp2", "ep2", "hsdp2x2", "tp2xfsdp2", "ep2xfsdp2")
"""Meshes of each kind, with the fewest ranks that it needs."""


def _variants() -> List[Variant]:
    out = []
    for name, case in CASES.items():
        config, bitwise = case.config, case.bitwise
        rounded = replace(config, state_dtype=DType.bfloat16)
        routes = routes_of(name)
        out.append(Variant(name, MixedShapes, config, bitwise, routes, runs_everywhere(name)))
        if routes != ONE_ROUTE:
            rounding = f"{name}_bfloat16_state"
            out.append(Variant(rounding, MixedShapes, rounded, bitwise, everywhere=False))
        if depends_on_layout(name):
            everywhere = name in ONE_OF_A_LOOP
            experts = Variant(f"{name}_experts", ExpertShapes, config, bitwise, (), everywhere)
            out.append(experts)
        if isinstance(config, MatrixOptimConfig):
            # Of 14 rows 4, 3 and 7: shards of 7 or 4 rows cut them.
            blocks = OptimGroupOverride(["tall.*"], {"row_blocks": [4, 3, 7]})
            split = replace(config, group_overrides=[blocks])
            out.append(Variant(f"{name}_row_blocks", MixedShapes, split, bitwise, everywhere=False))
            if name in ("ext_muon", "ext_dion"):  # one of each loop that shares
                alone = replace(config, share_replicas=False)
                out.append(Variant(f"{name}_redundant", MixedShapes, alone, bitwise))
    # The other side is orthonormal: rows of the basis are with the rows of the parameter, or not.
    dion = CASES["ext_dion"].config
    assert isinstance(dion, DionConfig)
    for side in (OrthonormalSide.inputs, OrthonormalSide.outputs):
        other = replace(dion, orthonormal_side=side)
        out += [
            Variant(f"ext_dion_{side}", MixedShapes, other, False, routes=ROUTES),
            Variant(
                f"ext_dion_{side}_experts", ExpertShapes, other, False, ROUTES, everywhere=False
            ),
        ]
    # One matrix of the parameter is transposed, the other not; a border of shards cuts each.
    blocks = OptimGroupOverride(["tall.*"], {"row_blocks": [5, 9]})
    unlike = replace(dion, group_overrides=[blocks])
    out.append(
        Variant("ext_dion_unlike_blocks", MixedShapes, unlike, False, ROUTES, everywhere=False)
    )
    # Large enough for the sketch of randomised Cholesky QR.
    out.append(Variant("ext_dion_sketched", SketchShapes, dion, False, everywhere=False))
    # Noise that follows from what was measured, and that stays.
    orthogonal, isotropic = (CASES[f"muon_{name}"].config for name in ("orthonoise", "isotropic"))
    triggered = replace(isotropic, **TRIGGERED)
    persistent = replace(orthogonal, **{**TRIGGERED, "persist_noise": True})
    out += [
        Variant("muon_orthonoise_persistent", MixedShapes, persistent, False, routes=ROUTES),
        Variant(
            "muon_orthonoise_persistent_experts", ExpertShapes, persistent, False, everywhere=False
        ),
        Variant("muon_isotropic_triggered", MixedShapes, triggered, False, everywhere=False),
    ]
    # All that the role table knows, in blocks that shards cut, and refreshes that are spread.
    soap, kron = CASES["soap"].config, CASES["kron"].config
    everything: Dict[str, Any] = dict(
        block_size=5,
        precondition_1d=True,
        precondition_embeddings=True,
        precondition_lm_head=True,
    )
    out += [
        Variant(
            "soap_everything",
            *(MixedShapes, soap.replace(stagger=True, **everything), False),
            routes=ROUTES,
        ),
        Variant("kron_everything", MixedShapes, kron.replace(**everything), False, routes=ROUTES),
        Variant("kron_pro", MixedShapes, kron.replace(update=KronFit.pro), False, routes=ROUTES),
    ]
    out += [
        Variant("whitening", MixedShapes, WhiteningConfig(), False, routes=ROUTES),
        Variant("whitening_experts", ExpertShapes, WhiteningConfig(), False, routes=ROUTES),
    ]
    return out


VARIANTS = _variants()

PRECONDITIONED = [
    name for name in list_optimizers() if isinstance(CASES[name].config, PreconditionedConfig)
]
"""Names whose state is on owners."""

MUON_LIKE = [
    name for name in list_optimizers() if isinstance(CASES[name].config, PolarConfig)
] + PRECONDITIONED
"""Names whose matrices travel to their owners and back."""

BROKEN = [
    Variant("shard_local_polar", MixedShapes, ShardLocalMuonConfig(), False),
    Variant("per_shard_mask", MixedShapes, PerShardMaskConfig(), False),
]

COUNTED: Dict[str, ExtOptimConfig] = {
    **{name: get_config_class(name)() for name in MUON_LIKE},
    "ext_dion": DionConfig(rank_fraction=0.25),
    "ext_dion_inputs": DionConfig(rank_fraction=0.25, orthonormal_side=OrthonormalSide.inputs),
}
"""Of which the bytes that a rank sends are counted."""

WITH_WORK_SPACE: Dict[str, ExtOptimConfig] = {
    "soap": SoapConfig(precondition_frequency=1),
    "kron": KronConfig(),
    "kron_pro": KronConfig(update=KronFit.pro),
}
"""Of which the memory of a step that updates all factors is measured."""
