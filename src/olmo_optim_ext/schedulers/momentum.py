"""
The momentum of a parameter group, whatever its rule calls it: the decay of the average of
gradients.
"""

from typing import Any, Dict, Mapping

from olmo_core.exceptions import OLMoConfigurationError

from ..engine.base import ALGORITHM
from ..matrix.scion import LMO_RULES, Scion
from ..wrappers.base import PREFIX

__all__ = ["MOMENTUM_KEYS", "momentum_of", "set_momentum"]

MOMENTUM, BETAS = "momentum", "betas"

MOMENTUM_KEYS = frozenset({MOMENTUM, BETAS})
"""Keys of a parameter group of which :func:`set_momentum` sets one."""

WEIGHT_OF_NEW = frozenset({Scion.algorithm, *LMO_RULES})
"""Rules whose ``momentum`` is the weight of the new gradient, one less its decay."""


def _key(group: Mapping[str, Any], why: str) -> str:
    if PREFIX + MOMENTUM in group:
        raise OLMoConfigurationError(
            f"{why}, which is not allowed with schedule_free: its weights depend on a momentum "
            "that stays as it is"
        )
    # Groups that a matrix rule leaves to AdamW have its momentum, too, but no use for it.
    has_momentum = MOMENTUM in group and group.get(ALGORITHM) != "adamw"
    if not has_momentum and BETAS not in group:
        raise OLMoConfigurationError(
            f"{why}, which is not allowed, as a parameter group has neither 'momentum' nor 'betas'"
        )
    return MOMENTUM if has_momentum else BETAS


def momentum_of(group: Mapping[str, Any], why: str) -> float:
    """
    The momentum of a parameter group: ``momentum``, of Scion one less it, else the first of
    ``betas``.

    :param why: What asks for it, for messages.

    :raises OLMoConfigurationError: If it has none, or the optimizer is ``schedule_free``.
    """
    if _key(group, why) == BETAS:
        return group[BETAS][0]
    return 1 - group[MOMENTUM] if group.get(ALGORITHM) in WEIGHT_OF_NEW else group[MOMENTUM]


def set_momentum(group: Dict[str, Any], value: float, why: str) -> None:
    """
    Set what :func:`momentum_of` returns.

    :raises OLMoConfigurationError: As it.
    """
    if _key(group, why) == BETAS:
        group[BETAS] = (value, *group[BETAS][1:])
    else:
        group[MOMENTUM] = 1 - value if group.get(ALGORITHM) in WEIGHT_OF_NEW else value
