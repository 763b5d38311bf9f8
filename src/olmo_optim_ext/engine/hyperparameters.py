"""
The allowed values of every hyperparameter. A name means the same thing in every optimizer, so one
table serves all of them.
"""

import math
from enum import Enum
from typing import Any, Callable, Dict, Mapping, Tuple, Type, TypeVar

import torch
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError

from .gate import CAPACITY

__all__ = ["check_hyperparameters", "to_choice", "to_flag"]

E = TypeVar("E", bound=Enum)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _non_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _learning_rate(value: Any) -> bool:
    # A tensor lr lives on the device: reading it here would force a host-device sync.
    return isinstance(value, torch.Tensor) or _non_negative(value)


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _pair_of_fractions(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_fraction, value))


def _positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _window(value: Any) -> bool:
    return _positive_int(value) and 2 <= value <= CAPACITY


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _state_dtype(value: Any) -> bool:
    return value in (DType.float32, DType.bfloat16)


def _seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


_NON_NEGATIVE = (_non_negative, "a finite number >= 0")
_LEARNING_RATE = (_learning_rate, "a finite number >= 0")
_BETAS = (_pair_of_fractions, "two numbers in [0, 1)")

_ALLOWED: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "lr": _LEARNING_RATE,
    "initial_lr": _LEARNING_RATE,
    "adamw_lr": _LEARNING_RATE,
    "weight_decay": _NON_NEGATIVE,
    "adamw_weight_decay": _NON_NEGATIVE,
    "eps": _NON_NEGATIVE,
    "adamw_eps": _NON_NEGATIVE,
    "betas": _BETAS,
    "adamw_betas": _BETAS,
    "momentum": (_fraction, "a number in [0, 1)"),
    "momentum_decay": _NON_NEGATIVE,
    "polar_steps": (_positive_int, "an integer >= 1"),
    "rolling_interval_length": (_window, f"an integer from 2 to {CAPACITY}"),
    "sigma_factor": (_positive, "a finite number > 0"),
    "state_dtype": (_state_dtype, "float32 or bfloat16"),
    "seed": (_seed, "an integer from 0 to 2^63 - 1"),
    "mask_eps": (_positive, "a finite number > 0"),
}


def check_hyperparameters(values: Mapping[str, Any], owner: str) -> None:
    """
    Check values by name. Names without an entry are not checked here: enumerations check
    themselves when they are made.

    :param values: Hyperparameters by name. ``None`` stands for "take the default" and is allowed.
    :param owner: What the values belong to, for the message.

    :raises OLMoConfigurationError: Names the field, the value and what is allowed.
    """
    for name, value in values.items():
        if value is None or name not in _ALLOWED:
            continue
        holds, allowed = _ALLOWED[name]
        if not holds(value):
            raise OLMoConfigurationError(f"{owner}: '{name}' is {value!r}, allowed is {allowed}")


def to_choice(choices: Type[E], value: Any, field: str, owner: str) -> E:
    """
    Turn a value into a member of an enumeration.

    :raises OLMoConfigurationError: Names the field, the value and the choices.
    """
    try:
        return choices(value)
    except ValueError:
        names = ", ".join(str(choice.value) for choice in choices)
        raise OLMoConfigurationError(
            f"{owner}: '{field}' is {value!r}, allowed are {names}"
        ) from None


def to_flag(value: Any, field: str, owner: str) -> bool:
    """
    Accept true and false only: a string such as ``"false"`` counts as true in Python.

    :raises OLMoConfigurationError: Names the field and the value.
    """
    if not isinstance(value, bool):
        raise OLMoConfigurationError(f"{owner}: '{field}' is {value!r}, allowed are true and false")
    return value
