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

__all__ = [
    "FRACTION",
    "INSIDE",
    "NATURAL",
    "NON_NEGATIVE",
    "POSITIVE",
    "POSITIVE_INT",
    "SHARE",
    "THREE_BETAS",
    "Allowed",
    "check_hyperparameters",
    "to_choice",
    "to_flag",
]

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


def _fractions(value: Any, n: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == n and all(map(_fraction, value))


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


NON_NEGATIVE: Allowed = (_non_negative, "a finite number >= 0")
THREE_BETAS: Allowed = (lambda value: _fractions(value, 3), "three numbers in [0, 1)")
POSITIVE: Allowed = (_positive, "a finite number > 0")
POSITIVE_INT: Allowed = (_positive_int, "an integer >= 1")
NATURAL: Allowed = (_natural, "an integer >= 0")
FRACTION: Allowed = (_fraction, "a number in [0, 1)")
SHARE: Allowed = (_share, "a number in (0, 1]")
INSIDE: Allowed = (lambda value: _share(value) and value < 1, "a number in (0, 1)")
_LEARNING_RATE = (_learning_rate, "a finite number >= 0")
_DTYPE = (_float32_or_bfloat16, "float32 or bfloat16")
_BETAS = (lambda value: _fractions(value, 2), "two numbers in [0, 1)")

_ALLOWED: Dict[str, Allowed] = {
    "lr": _LEARNING_RATE,
    "initial_lr": _LEARNING_RATE,
    "adamw_lr": _LEARNING_RATE,
    "weight_decay": NON_NEGATIVE,
    "adamw_weight_decay": NON_NEGATIVE,
    "eps": NON_NEGATIVE,
    "adamw_eps": NON_NEGATIVE,
    "betas": _BETAS,
    "adamw_betas": _BETAS,
    "momentum": FRACTION,
    "momentum_decay": NON_NEGATIVE,
    "beta2": FRACTION,
    "rank_fraction": SHARE,
    "rank_multiple_of": POSITIVE_INT,
    "basis_eps": POSITIVE,
    "row_eps": POSITIVE,
    "polar_steps": POSITIVE_INT,
    "polar_dtype": _DTYPE,
    "rolling_interval_length": (_window, f"an integer from 2 to {CAPACITY}"),
    "sigma_factor": POSITIVE,
    "state_dtype": _DTYPE,
    "shampoo_beta": FRACTION,
    "precondition_frequency": POSITIVE_INT,
    "max_precond_dim": POSITIVE_INT,
    "block_size": POSITIVE_INT,
    "precond_lr": SHARE,
    "precond_init_scale": POSITIVE,
    "precond_update_prob_max": SHARE,
    "precond_update_prob_min": SHARE,
    "precond_update_prob_decay": NON_NEGATIVE,
    "precond_update_prob_flat_start": NATURAL,
    "balance_prob": (_damping, "a number in [0, 1]"),
    "max_size_triangular": POSITIVE_INT,
    "min_ndim_triangular": POSITIVE_INT,
    "seed": (_seed, "an integer from 0 to 2^63 - 1"),
    "mask_eps": POSITIVE,
    "alpha": POSITIVE,
    "alpha_end": POSITIVE,
    "anneal_steps": POSITIVE_INT,
    "start_step": NATURAL,
    "rank_threshold": SHARE,
    "rank_interval": POSITIVE_INT,
    "ns_reorthogonalize_steps": NATURAL,
    "scale": (_damping, "a number in [0, 1]"),
    "radius": POSITIVE,
    "fan_in": POSITIVE_INT,
    "spectral_scale": POSITIVE,
    "sign_scale": POSITIVE,
    "bias_rms_scale": POSITIVE,
    "column_scale": POSITIVE,
    "row_scale": POSITIVE,
    "dampening": (_damping, "a number in [0, 1]"),
    "lr_decay": NON_NEGATIVE,
    "initial_accumulator_value": NON_NEGATIVE,
    "clip_exp": NON_NEGATIVE,
    "alpha_warmup": POSITIVE_INT,
    "beta3_warmup": POSITIVE_INT,
    "trust_coefficient": POSITIVE,
    "adaptation_strength": NON_NEGATIVE,
    "gamma": NON_NEGATIVE,
    "lr_1d_factor": POSITIVE,
    "betas_1d": _BETAS,
    "weight_decay_1d": NON_NEGATIVE,
    "beta3": FRACTION,
    "d0": POSITIVE,
    "d_coef": POSITIVE,
    "growth_rate": (lambda value: _number(value) and value >= 1, "a finite number >= 1"),
    "beta2_decay": (lambda value: _number(value) and value < 0, "a finite number < 0"),
    "param_rms_eps": NON_NEGATIVE,
    "clip_threshold": POSITIVE,
    "rho": POSITIVE,
    "batch_tokens": POSITIVE_INT,
    "hessian_update_interval": POSITIVE_INT,
    "hessian_batch_fraction": SHARE,
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
