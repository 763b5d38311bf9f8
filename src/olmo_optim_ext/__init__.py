"""
Pretraining optimizers for OLMo-core, and schedules that it lacks. Importing this package registers
configs with OLMo-core's ``OptimConfig`` and schedulers with its ``Scheduler``, under names that
OLMo-core does not use.
"""

from .catalog import (
    OptimizerInfo,
    Preset,
    get_config_class,
    list_optimizers,
    optimizer_info,
)
from .elementwise.adafactor import Adafactor, AdafactorConfig
from .elementwise.adagrad import Adagrad, AdagradConfig
from .elementwise.adam import Adam, AdamConfig
from .elementwise.adam_mini import AdamMini, AdamMiniConfig
from .elementwise.adamw import AdamW, AdamWConfig
from .elementwise.adan import Adan, AdanConfig
from .elementwise.ademamix import AdEMAMix, AdEMAMixConfig
from .elementwise.adopt import Adopt, AdoptConfig
from .elementwise.cautious_adamw import CautiousAdamW, CautiousAdamWConfig
from .elementwise.eva import Eva, EvaConfig
from .elementwise.lamb import Lamb, LambConfig
from .elementwise.lars import Lars, LarsConfig
from .elementwise.lion import Lion, LionConfig
from .elementwise.mars import Mars, MarsConfig
from .elementwise.mars_rules import FirstStep, MarsForm
from .elementwise.nadamw import NAdamW, NAdamWConfig, NesterovForm
from .elementwise.prodigy import Prodigy, ProdigyConfig
from .elementwise.radam import RAdam, RAdamConfig
from .elementwise.rmsprop import RMSprop, RMSpropConfig
from .elementwise.sgd import SGD, SGDConfig
from .elementwise.sophia import HessianEstimator, Sophia, SophiaConfig
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
from .schedulers import (
    AnnealStrategy,
    CosWithRestarts,
    CyclicMode,
    CyclicScheduler,
    MultiStepScheduler,
    OneCycleScheduler,
    PolynomialScheduler,
)
from .wrappers.lookahead import Lookahead, LookaheadConfig
from .wrappers.ranger import RangerConfig
from .wrappers.sam import SAM, SAMConfig
from .wrappers.schedule_free import ScheduleFree, ScheduleFreeConfig

__all__ = [
    "Adafactor",
    "AdafactorConfig",
    "Adagrad",
    "AdagradConfig",
    "Adam",
    "AdamConfig",
    "AdamMini",
    "AdamMiniConfig",
    "AdamW",
    "AdamWConfig",
    "Adan",
    "AdanConfig",
    "AdEMAMix",
    "AdEMAMixConfig",
    "Adopt",
    "AdoptConfig",
    "AlphaAnnealing",
    "AnnealStrategy",
    "CautiousAdamW",
    "CautiousAdamWConfig",
    "CosWithRestarts",
    "CyclicMode",
    "CyclicScheduler",
    "Dion",
    "DionConfig",
    "Eva",
    "EvaConfig",
    "FirstStep",
    "GradientGate",
    "HessianEstimator",
    "Kron",
    "KronConfig",
    "KronFit",
    "Lamb",
    "LambConfig",
    "Lars",
    "LarsConfig",
    "Lion",
    "LionConfig",
    "LRScaling",
    "Lookahead",
    "LookaheadConfig",
    "Mars",
    "MarsConfig",
    "MarsForm",
    "MemorySaveMode",
    "MultiStepScheduler",
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
    "OneCycleScheduler",
    "OptimizerInfo",
    "Orthonormalization",
    "OrthonormalSide",
    "ParamRole",
    "PolarForm",
    "PolarMethod",
    "PolynomialScheduler",
    "Preset",
    "Prodigy",
    "ProdigyConfig",
    "RAdam",
    "RAdamConfig",
    "RangerConfig",
    "RMSprop",
    "RMSpropConfig",
    "Role",
    "SAM",
    "SAMConfig",
    "ScheduleFree",
    "ScheduleFreeConfig",
    "Scion",
    "ScionConfig",
    "ScionNorm",
    "SGD",
    "SGDConfig",
    "Soap",
    "SoapConfig",
    "Sophia",
    "SophiaConfig",
    "TrustRegion",
    "get_config_class",
    "list_optimizers",
    "optimizer_info",
]
