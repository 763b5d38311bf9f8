"""
What a row of the catalogue says.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Tuple, Type

from .config import ExtOptimConfig

__all__ = ["SETTING", "SWEEP", "OptimizerInfo", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Tuned values from the literature."""

    setting: str
    """Model, tokens and batch that the values were tuned for."""

    fields: Mapping[str, Any]
    """Config fields that differ from the defaults."""

    source: str
    """Where the values are from, and how that implementation differs."""


@dataclass(frozen=True)
class OptimizerInfo:
    """A row of the catalogue."""

    name: str
    """The name with which the config is registered."""

    config_class: Type[ExtOptimConfig]

    family: str
    """``elementwise``, ``matrix`` or ``wrapper``."""

    summary: str

    paper: str
    """Where the rule is defined."""

    state_bytes_per_param: float
    """
    Bytes of state per parameter that follows the optimizer's own rule, float32 state. What a
    matrix rule leaves to AdamW has 8. Of a wrapper, with its default inside.
    """

    exchange: str
    """What a rank sends in a step, beside what the data parallelism itself sends."""

    factors: str = ""
    """State of a matrix beside these, in words; empty if there is none."""

    needs: Tuple[str, ...] = ()
    """
    What must drive it beside gradients: ``hessian``, estimates of the Hessian's diagonal;
    ``second_pass``, the gradient of the batch at weights that it has moved; ``eval_swap``, other
    weights for evaluation. An option may need more, as ``exact`` of ``mars`` does.
    """

    presets: Tuple[Preset, ...] = ()


SWEEP = (
    "arXiv:2509.02046, C4, learning rate decayed to 0, clip 1.0; tuned with Levanter's JAX "
    "implementation"
)
SETTING = "130M, {} Chinchilla, batch 128 x 4096 tokens"
