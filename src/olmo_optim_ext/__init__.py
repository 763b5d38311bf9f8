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
from .linalg.orthonormal import Orthonormalization
from .linalg.polar import PolarForm, PolarMethod
from .matrix.dion import Dion, DionConfig, OrthonormalSide
from .matrix.kron import Kron, KronConfig, KronFit, MemorySaveMode, TrustRegion
from .matrix.muon import Muon, MuonConfig
from .matrix.muon_family import LRScaling
from .matrix.muon_isotropic import MuonIsotropic, MuonIsotropicConfig
from .matrix.muon_nolah import GradientGate, MuonNolah, MuonNolahConfig
from .matrix.muon_orthonoise import MuonOrthoNoise, MuonOrthoNoiseConfig
from .matrix.noise import AlphaAnnealing
from .matrix.nor_muon import NorMuon, NorMuonConfig
from .matrix.scion import Scion, ScionConfig, ScionNorm
from .matrix.soap import Soap, SoapConfig
from .wrappers.lookahead import Lookahead, LookaheadConfig
from .wrappers.ranger import RangerConfig
from .wrappers.sam import SAM, SAMConfig
from .wrappers.schedule_free import ScheduleFree, ScheduleFreeConfig

__all__ = [
    "AdamW",
    "AdamWConfig",
    "AlphaAnnealing",
    "CautiousAdamW",
    "CautiousAdamWConfig",
    "GradientGate",
    "Dion",
    "DionConfig",
    "Kron",
    "KronConfig",
    "KronFit",
    "LRScaling",
    "Lookahead",
    "LookaheadConfig",
    "MemorySaveMode",
    "OrthonormalSide",
    "Orthonormalization",
    "Muon",
    "MuonConfig",
    "MuonIsotropic",
    "MuonIsotropicConfig",
    "MuonNolah",
    "MuonNolahConfig",
    "MuonOrthoNoise",
    "MuonOrthoNoiseConfig",
    "NAdamW",
    "NAdamWConfig",
    "NesterovForm",
    "NorMuon",
    "NorMuonConfig",
    "OptimizerInfo",
    "ParamRole",
    "PolarForm",
    "PolarMethod",
    "Preset",
    "RangerConfig",
    "Role",
    "SAM",
    "SAMConfig",
    "ScheduleFree",
    "ScheduleFreeConfig",
    "Scion",
    "ScionConfig",
    "ScionNorm",
    "Soap",
    "SoapConfig",
    "TrustRegion",
    "get_config_class",
    "list_optimizers",
    "optimizer_info",
]
