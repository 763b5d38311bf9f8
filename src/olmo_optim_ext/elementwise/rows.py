"""
The catalogue's rows of rules for single coordinates.
"""

from typing import Tuple

from ..optimizer_info import SETTING, SWEEP, OptimizerInfo, Preset
from .adafactor import AdafactorConfig
from .adagrad import AdagradConfig
from .adam import AdamConfig
from .adam_mini import AdamMiniConfig
from .adamw import AdamWConfig
from .adan import AdanConfig
from .ademamix import AdEMAMixConfig
from .adopt import AdoptConfig
from .cautious_adamw import CautiousAdamWConfig
from .eva import EvaConfig
from .lamb import LambConfig
from .lars import LarsConfig
from .lion import LionConfig
from .mars import MarsConfig
from .nadamw import NAdamWConfig
from .prodigy import ProdigyConfig
from .radam import RAdamConfig
from .rmsprop import RMSpropConfig
from .sgd import SGDConfig
from .sophia import SophiaConfig

__all__ = ["ROWS"]

_SUMS = "{} bytes a parameter tensor, in one all-reduce"

ROWS: Tuple[OptimizerInfo, ...] = (
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
                SETTING.format("1x"),
                {"lr": 0.008, "betas": (0.9, 0.98), "eps": 1e-20, "weight_decay": 0.1},
                SWEEP,
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
                SETTING.format("1x"),
                {
                    "lr": 0.008,
                    "betas": (0.95, 0.98),
                    "eps": 1e-25,
                    "weight_decay": 0.1,
                    "nesterov": "dozat",
                },
                SWEEP,
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
        exchange=_SUMS.format(8),
        presets=(
            Preset(
                SETTING.format("1x"),
                {"lr": 0.008, "betas": (0.95, 0.98), "eps": 1e-15, "weight_decay": 0.1},
                SWEEP + ", which has no floor of the mask's mean",
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
                SETTING.format("1x"),
                {
                    "lr": 0.004,
                    "betas": (0.95, 0.9),
                    "rho": 0.0125,
                    "eps": 1e-7,
                    "weight_decay": 0.0,
                    "estimator": "hutchinson",
                },
                SWEEP + ", which corrects the momentum's bias and draws probes from the normal "
                "distribution; 4000 steps of warm-up, without which it diverged",
            ),
        ),
    ),
    OptimizerInfo(
        name="mars",
        config_class=MarsConfig,
        family="elementwise",
        summary="AdamW, or Lion, on gradients corrected by how they changed",
        paper="arXiv:2411.10438",
        state_bytes_per_param=12,
        exchange=_SUMS.format(8),
        presets=(
            Preset(
                SETTING.format("1x"),
                {
                    "lr": 0.016,
                    "betas": (0.9, 0.95),
                    "eps": 1e-25,
                    "weight_decay": 0.1,
                    "gamma": 0.025,
                    "optimize_1d": True,
                },
                SWEEP + ", which clips the norm of all corrected gradients together",
            ),
        ),
    ),
    OptimizerInfo(
        name="ext_lion",
        config_class=LionConfig,
        family="elementwise",
        summary="The sign of averaged gradients",
        paper="arXiv:2302.06675",
        state_bytes_per_param=4,
        exchange="nothing",
        presets=(
            Preset(
                SETTING.format("1x"),
                {"lr": 0.002, "betas": (0.9, 0.95), "weight_decay": 0.7},
                SWEEP,
            ),
        ),
    ),
    OptimizerInfo(
        name="adan",
        config_class=AdanConfig,
        family="elementwise",
        summary="Adam with averaged differences of gradients as Nesterov momentum",
        paper="arXiv:2208.06677",
        state_bytes_per_param=16,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="adopt",
        config_class=AdoptConfig,
        family="elementwise",
        summary="Adam that divides by the second moment of the gradients before",
        paper="arXiv:2411.02853",
        state_bytes_per_param=8,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="ademamix",
        config_class=AdEMAMixConfig,
        family="elementwise",
        summary="AdamW with a second, much slower average of gradients",
        paper="arXiv:2409.03137",
        state_bytes_per_param=12,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="lamb",
        config_class=LambConfig,
        family="elementwise",
        summary="Adam with steps in proportion to the norm of each parameter",
        paper="arXiv:1904.00962",
        state_bytes_per_param=8,
        exchange=_SUMS.format(16),
    ),
    OptimizerInfo(
        name="lars",
        config_class=LarsConfig,
        family="elementwise",
        summary="SGD with steps in proportion to the norm of each parameter",
        paper="arXiv:1708.03888",
        state_bytes_per_param=4,
        exchange=_SUMS.format(16),
    ),
    OptimizerInfo(
        name="radam",
        config_class=RAdamConfig,
        family="elementwise",
        summary="Adam that waits until its second moment is known",
        paper="arXiv:1908.03265",
        state_bytes_per_param=8,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="eva",
        config_class=EvaConfig,
        family="elementwise",
        summary="Adam with a factor by the spread of each gradient; not Eva of ICLR 2023",
        paper="trustformers-optim (code, no paper)",
        state_bytes_per_param=8,
        exchange=_SUMS.format(16),
    ),
    OptimizerInfo(
        name="prodigy",
        config_class=ProdigyConfig,
        family="elementwise",
        summary="Adam with a learning rate from an estimate of the distance to go",
        paper="arXiv:2306.06101",
        state_bytes_per_param=16,
        exchange=_SUMS.format(16),
    ),
    OptimizerInfo(
        name="sgd",
        config_class=SGDConfig,
        family="elementwise",
        summary="Gradient descent with momentum",
        paper="torch.optim.SGD",
        state_bytes_per_param=4,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="adagrad",
        config_class=AdagradConfig,
        family="elementwise",
        summary="Gradients over the root of the sum of their squares",
        paper="JMLR 12, 2011; torch.optim.Adagrad",
        state_bytes_per_param=4,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="rmsprop",
        config_class=RMSpropConfig,
        family="elementwise",
        summary="Gradients over the root of their second moment",
        paper="Hinton 2012; torch.optim.RMSprop",
        state_bytes_per_param=4,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="ext_adam",
        config_class=AdamConfig,
        family="elementwise",
        summary="Adam with L2 weight decay",
        paper="arXiv:1412.6980",
        state_bytes_per_param=8,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="adam_mini",
        config_class=AdamMiniConfig,
        family="elementwise",
        summary="AdamW with one second moment for a head, a row or an expert's row",
        paper="arXiv:2406.16793",
        state_bytes_per_param=4,
        exchange="8 bytes a row, in one all-reduce",
        factors="4 bytes a block: a head of q or k, another output, an entry of a table, a gain",
        presets=(
            Preset(
                SETTING.format("1x"),
                {"lr": 0.008, "betas": (0.9, 0.98), "eps": 1e-15, "weight_decay": 0.1},
                SWEEP,
            ),
        ),
    ),
    OptimizerInfo(
        name="adafactor",
        config_class=AdafactorConfig,
        family="elementwise",
        summary="Adam with a factored second moment, no first one, and relative steps",
        paper="arXiv:1804.04235",
        state_bytes_per_param=0,
        exchange="8 bytes a row and a column, and 16 a parameter tensor, in two all-reduces",
        factors="4 (out + in) bytes a matrix; a vector 4 bytes an element",
    ),
)
