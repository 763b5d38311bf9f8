"""
The allowed values of every hyperparameter. A name means the same thing in every optimizer, so one
table serves all of them.
"""

import math
from enum import Enum
from types import MappingProxyType
from typing import Any, Callable, Dict, Mapping, Tuple, Type, TypeVar

import torch
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError

from .gate import CAPACITY

__all__ = ["POSITIVE", "Allowed", "check_hyperparameters", "to_choice", "to_flag"]

E = TypeVar("E", bound=Enum)

Allowed = Tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and what is, in words."""


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


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _share(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _damping(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _window(value: Any) -> bool:
    return _positive_int(value) and 2 <= value <= CAPACITY


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _float32_or_bfloat16(value: Any) -> bool:
    return value in (DType.float32, DType.bfloat16)


def _seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


POSITIVE: Allowed = (_positive, "a finite number > 0")
_NON_NEGATIVE = (_non_negative, "a finite number >= 0")
_LEARNING_RATE = (_learning_rate, "a finite number >= 0")
_DTYPE = (_float32_or_bfloat16, "float32 or bfloat16")
_BETAS = (_pair_of_fractions, "two numbers in [0, 1)")

_ALLOWED: Dict[str, Allowed] = {
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
    "beta2": (_fraction, "a number in [0, 1)"),
    "rank_fraction": (_share, "a number in (0, 1]"),
    "rank_multiple_of": (_positive_int, "an integer >= 1"),
    "basis_eps": (_positive, "a finite number > 0"),
    "row_eps": (_positive, "a finite number > 0"),
    "polar_steps": (_positive_int, "an integer >= 1"),
    "polar_dtype": _DTYPE,
    "rolling_interval_length": (_window, f"an integer from 2 to {CAPACITY}"),
    "sigma_factor": (_positive, "a finite number > 0"),
    "state_dtype": _DTYPE,
    "shampoo_beta": (_fraction, "a number in [0, 1)"),
    "precondition_frequency": (_positive_int, "an integer >= 1"),
    "max_precond_dim": (_positive_int, "an integer >= 1"),
    "block_size": (_positive_int, "an integer >= 1"),
    "precond_lr": (_share, "a number in (0, 1]"),
    "precond_init_scale": (_positive, "a finite number > 0"),
    "precond_update_prob_max": (_share, "a number in (0, 1]"),
    "precond_update_prob_min": (_share, "a number in (0, 1]"),
    "precond_update_prob_decay": _NON_NEGATIVE,
    "precond_update_prob_flat_start": (_natural, "an integer >= 0"),
    "balance_prob": (_damping, "a number in [0, 1]"),
    "max_size_triangular": (_positive_int, "an integer >= 1"),
    "min_ndim_triangular": (_positive_int, "an integer >= 1"),
    "seed": (_seed, "an integer from 0 to 2^63 - 1"),
    "mask_eps": (_positive, "a finite number > 0"),
    "alpha": (_positive, "a finite number > 0"),
    "alpha_end": (_positive, "a finite number > 0"),
    "anneal_steps": (_positive_int, "an integer >= 1"),
    "start_step": (_natural, "an integer >= 0"),
    "rank_threshold": (_share, "a number in (0, 1]"),
    "rank_interval": (_positive_int, "an integer >= 1"),
    "ns_reorthogonalize_steps": (_natural, "an integer >= 0"),
    "scale": (_damping, "a number in [0, 1]"),
    "radius": (_positive, "a finite number > 0"),
    "fan_in": (_positive_int, "an integer >= 1"),
    "spectral_scale": (_positive, "a finite number > 0"),
    "sign_scale": (_positive, "a finite number > 0"),
    "bias_rms_scale": (_positive, "a finite number > 0"),
    "column_scale": (_positive, "a finite number > 0"),
    "row_scale": (_positive, "a finite number > 0"),
    "rho": POSITIVE,
    "batch_tokens": (_positive_int, "an integer >= 1"),
    "hessian_update_interval": (_positive_int, "an integer >= 1"),
    "hessian_batch_fraction": (_share, "a number in (0, 1]"),
    "hutchinson_epsilon": POSITIVE,
}


def check_hyperparameters(
    values: Mapping[str, Any], owner: str, own: Mapping[str, Allowed] = MappingProxyType({})
) -> None:
    """
    Check values by name. Names without an entry are not checked here: enumerations check
    themselves when they are made.

    :param values: Hyperparameters by name. ``None`` stands for "take the default" and is allowed.
    :param owner: What the values belong to, for the message.
    :param own: What is allowed for names that mean something else to the owner than to others.

    :raises OLMoConfigurationError: Names the field, the value and what is allowed.
    """
    for name, value in values.items():
        if value is None or name not in {*_ALLOWED, *own}:
            continue
        holds, allowed = own.get(name) or _ALLOWED[name]
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
