"""
Lookahead (Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back",
arXiv:1907.08610, algorithm 1), around any optimizer.
"""

from dataclasses import dataclass
from typing import Any, Sequence

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.optim import OptimConfig

from ..engine.base import GroupWork
from ..engine.hyperparameters import POSITIVE_INT, SHARE
from .base import Wrapper, WrapperConfig, gated, some_at_a_time

__all__ = ["Lookahead", "LookaheadConfig"]


class Lookahead(Wrapper):
    """
    After every ``k`` steps of the optimizer inside, ``p <- slow + alpha (p - slow)``, with the
    weights ``slow`` from before these steps. The state of the optimizer inside stays as it is.

    ``k`` counts the steps that a parameter has taken, so a step that is skipped shifts nothing.
    Before a step that is the first of ``k``, ``slow`` becomes the weights: the first time they are
    those of the start, whenever they were loaded, and later those of the last synchronisation.
    """

    own_buffers = ("slow",)
    exact_buffers = frozenset(own_buffers)
    own_allowed = {"k": POSITIVE_INT, "alpha": SHARE}

    def __init__(self, params: Any, k: int = 5, alpha: float = 0.5, **options: Any):
        super().__init__(params, {"k": k, "alpha": alpha}, **options)

    def update(self, work: Sequence[GroupWork]) -> None:
        k, alpha = self._wrapper["k"], self._wrapper["alpha"]
        for each in work:
            begins = gated((each.clock - 1) % k == 0, each).unbind()
            for member in each.members:
                param = get_local_tensor(member.param)
                for now, slow in some_at_a_time(param, member.local("slow")):
                    torch.where(begins[member.slot], now.to(slow.dtype), slow, out=slow)
        super().update(work)
        for each in work:
            ends = gated(each.clock % k == 0, each).unbind()
            for member in each.members:
                param = get_local_tensor(member.param)
                for fast, slow in some_at_a_time(param, member.local("slow")):
                    # In this form alpha = 1 is exactly the optimizer inside.
                    mean = fast + (1 - alpha) * (slow - fast)
                    torch.where(ends[member.slot], mean.to(fast.dtype), fast, out=fast)


@OptimConfig.register("lookahead")
@dataclass
class LookaheadConfig(WrapperConfig):
    """
    Config of :class:`Lookahead`.
    """

    k: int = 5
    """Steps between two synchronisations, >= 1. As in the authors' code and the paper."""

    alpha: float = 0.5
    """
    How far the weights go from the slow ones to the fast ones, in (0, 1]; 1 is the optimizer
    inside. As in pytorch-optimizer and timm; the authors' code has 0.8.
    """

    wrapper = Lookahead
