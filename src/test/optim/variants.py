"""
What is run on every mesh: all names, and besides what options and other models change.
"""

from dataclasses import replace
from typing import Any, List, NamedTuple

from cases import CASES, MixedShapes
from models import ExpertShapes
from olmo_core.optim import OptimGroupOverride
from toys import PerShardMaskConfig, ShardLocalMuonConfig, WhiteningConfig

from olmo_optim_ext import list_optimizers
from olmo_optim_ext.config import ExtOptimConfig, MatrixOptimConfig


class Variant(NamedTuple):
    name: str
    model: Any
    """From a seed to a model."""
    config: ExtOptimConfig
    bitwise: bool
    resumes: bool = False
    """Whether it is also saved on some ranks and continued on others."""


def _variants() -> List[Variant]:
    out = []
    for name in list_optimizers():
        case = CASES[name]
        config, bitwise = case.config, case.bitwise
        rounded = replace(config, state_dtype="bfloat16")
        out += [
            Variant(name, MixedShapes, config, bitwise, resumes=True),
            Variant(f"{name}_bfloat16_state", MixedShapes, rounded, bitwise),
            Variant(f"{name}_experts", ExpertShapes, config, bitwise),
        ]
        if isinstance(config, MatrixOptimConfig):
            # Of 14 rows 4, 3 and 7: shards of 7 or 4 rows cut them.
            blocks = OptimGroupOverride(["tall.*"], {"row_blocks": [4, 3, 7]})
            split = replace(config, group_overrides=[blocks])
            alone = replace(config, share_replicas=False)
            out += [
                Variant(f"{name}_row_blocks", MixedShapes, split, bitwise),
                Variant(f"{name}_redundant", MixedShapes, alone, bitwise),
            ]
    out += [
        Variant("whitening", MixedShapes, WhiteningConfig(), False, resumes=True),
        Variant("whitening_experts", ExpertShapes, WhiteningConfig(), False, resumes=True),
    ]
    return out


VARIANTS = _variants()

BROKEN = [
    Variant("shard_local_polar", MixedShapes, ShardLocalMuonConfig(), False),
    Variant("per_shard_mask", MixedShapes, PerShardMaskConfig(), False),
]
