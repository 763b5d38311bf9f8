"""
Pretraining optimizers for OLMo-core. Importing this package registers their configs with
OLMo-core's ``OptimConfig``, under names that OLMo-core does not use.
"""

from .catalog import (
    OptimizerInfo,
    Preset,
    get_config_class,
    list_optimizers,
    optimizer_info,
)
from .elementwise.adamw import AdamW, AdamWConfig
from .elementwise.cautious_adamw import CautiousAdamW, CautiousAdamWConfig
from .elementwise.nadamw import NAdamW, NAdamWConfig, NesterovForm
from .engine.roles import ParamRole, Role
from .linalg.polar import PolarMethod
from .matrix.muon import LRScaling, Muon, MuonConfig

__all__ = [
    "AdamW",
    "AdamWConfig",
    "CautiousAdamW",
    "CautiousAdamWConfig",
    "LRScaling",
    "Muon",
    "MuonConfig",
    "NAdamW",
    "NAdamWConfig",
    "NesterovForm",
    "OptimizerInfo",
    "ParamRole",
    "PolarMethod",
    "Preset",
    "Role",
    "get_config_class",
    "list_optimizers",
    "optimizer_info",
]
