"""
The catalogue's rows of wrappers.
"""

from typing import Tuple

from ..optimizer_info import OptimizerInfo
from .lookahead import LookaheadConfig
from .ranger import RangerConfig
from .sam import SAMConfig
from .schedule_free import ScheduleFreeConfig

__all__ = ["ROWS"]

ROWS: Tuple[OptimizerInfo, ...] = (
    OptimizerInfo(
        name="lookahead",
        config_class=LookaheadConfig,
        family="wrapper",
        summary="Every k steps back to a mean with the weights before them, around any optimizer",
        paper="arXiv:1907.08610",
        state_bytes_per_param=12,
        exchange="what the optimizer inside sends",
    ),
    OptimizerInfo(
        name="ranger",
        config_class=RangerConfig,
        family="wrapper",
        summary="RAdam inside Lookahead",
        paper="lessw2020/Ranger (code); arXiv:1908.03265; arXiv:1907.08610",
        state_bytes_per_param=12,
        exchange="nothing",
    ),
    OptimizerInfo(
        name="schedule_free",
        config_class=ScheduleFreeConfig,
        family="wrapper",
        summary="An average of the weights in place of a decaying learning rate, around any "
        "optimizer",
        paper="arXiv:2405.15682",
        state_bytes_per_param=12,
        factors="8 bytes",
        exchange="what the optimizer inside sends",
        needs=("eval_swap",),
    ),
    OptimizerInfo(
        name="sam",
        config_class=SAMConfig,
        family="wrapper",
        summary="Steps with the gradient at the worst weights nearby, around any optimizer",
        paper="arXiv:2010.01412; arXiv:2102.11600",
        state_bytes_per_param=8,
        exchange="what the optimizer inside sends, and 8 bytes a tensor in one all-reduce",
        needs=("second_pass",),
    ),
)
