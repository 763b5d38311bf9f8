"""
The catalogue's rows of rules for single coordinates.
"""

from typing import Tuple

from ..optimizer_info import SETTING, SWEEP, OptimizerInfo, Preset
from .adamw import AdamWConfig
from .cautious_adamw import CautiousAdamWConfig
from .nadamw import NAdamWConfig

__all__ = ["ROWS"]

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
        exchange="8 bytes a parameter tensor, in one all-reduce",
        presets=(
            Preset(
                SETTING.format("1x"),
                {"lr": 0.008, "betas": (0.95, 0.98), "eps": 1e-15, "weight_decay": 0.1},
                SWEEP + ", which has no floor of the mask's mean",
            ),
        ),
    ),
)
