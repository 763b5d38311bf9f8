"""
Ranger (Wright, github.com/lessw2020/Ranger-Deep-Learning-Optimizer): RAdam inside Lookahead.
"""

from dataclasses import dataclass

from olmo_core.optim import OptimConfig

from ..elementwise.radam import RAdamConfig
from .lookahead import LookaheadConfig

__all__ = ["RangerConfig"]


@OptimConfig.register("ranger")
@dataclass
class RangerConfig(LookaheadConfig):
    """
    Config of :class:`~olmo_optim_ext.wrappers.lookahead.Lookahead` around RAdam, with the defaults
    of the author's ``Ranger``, but without its centralisation of gradients.
    """

    k: int = 6
    """Steps between two synchronisations, >= 1. As in the author's code."""

    default_inner = str(RAdamConfig.registered_name)

    tuned = {
        default_inner: {
            "lr": 1e-3,
            "betas": (0.95, 0.999),
            "eps": 1e-5,
            "weight_decay": 0.0,
            "decoupled_weight_decay": True,
        }
    }
    """As in the author's code."""
