"""
Which callbacks an optimizer needs in OLMo-core's trainer.
"""

from typing import Dict, Optional

import torch
from olmo_core.train.callbacks import Callback

from ..elementwise.mars import Mars
from ..elementwise.sophia import Sophia
from ..engine.base import ExtOptimizer
from ..wrappers.sam import SAM
from ..wrappers.schedule_free import ScheduleFree
from .averaging import AveragingCallback
from .bad_batches import BadBatchCallback
from .hessian import SophiaCallback
from .last_weights import LastWeightsCallback
from .sharpness import SAMCallback

__all__ = ["needed_callbacks"]


def needed_callbacks(optim: Optional[torch.optim.Optimizer]) -> Dict[str, Callback]:
    """
    The callbacks without which an optimizer cannot step, or a run does not do what it is meant to,
    by a name for ``add_callback``. Experiments add these. None for optimizers of others.
    """
    out: Dict[str, Callback] = {}
    if isinstance(optim, ExtOptimizer):
        out["bad_batches"] = BadBatchCallback()
    if isinstance(optim, Sophia):
        out["sophia"] = SophiaCallback()
    if isinstance(optim, Mars) and optim.exact:
        out["last_weights"] = LastWeightsCallback()
    if isinstance(optim, SAM):
        out["sam"] = SAMCallback()
    if isinstance(optim, ScheduleFree):
        out["averaging"] = AveragingCallback()
    return out
