"""
From plain data to dataclasses, strictly: a key that no field takes and a value of another type
are errors that name the key, the value and what is allowed.

OLMo-core's own decoding drops surplus tuple elements and takes ``"3"`` and ``true`` for numbers.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Dict, Type, TypeVar, Union

from olmo_core.config import Registrable
from olmo_core.exceptions import OLMoConfigurationError

from olmo_optim_ext.catalog import closest

__all__ = [
    "decode",
    "decode_fields",
    "decode_registered",
    "refuse",
    "require",
    "to_plain",
]

T = TypeVar("T")


def decode(hint: Any, value: Any, where: str) -> Any:
    """
    Turn plain data into a value of a type: ``None``, numbers, strings, enumerations, lists,
    tuples, dicts, dataclasses and unions of these. ``Any`` takes everything.

    :param where: The dotted key, for messages.

    :raises OLMoConfigurationError: Names the key, the value and what is allowed.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, where)
    if hint is None or hint is type(None):
        return value if value is None else refuse(where, value, "null")
    if origin in (list, tuple):
        return _decode_sequence(origin, args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            refuse(where, value, "a mapping")
        return {
            decode(args[0], k, f"{where} key"): decode(args[1], v, f"{where}.{k}")
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            refuse(where, value, "a mapping")
        if isinstance(hint, type) and issubclass(hint, Registrable) and "type" in value:
            return decode_registered(hint, value, where)
        return decode_fields(hint, value, where)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            refuse(where, value, closest(value, [str(choice.value) for choice in hint]))
    return _decode_scalar(hint, value, where)


def decode_fields(cls: Type[T], fields: Mapping[str, Any], where: str) -> T:
    """
    Make a dataclass from its fields.

    :param where: The dotted key of the mapping, for messages; empty at the top.

    :raises OLMoConfigurationError: Also for a field that the class does not have or that is
        missing, and for what the class itself refuses.
    """
    dot = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}  # type: ignore[arg-type]
    for key in fields:
        if key not in known:
            raise OLMoConfigurationError(
                f"{dot}{key}: there is no such key, allowed are {closest(str(key), known)}"
            )
    for name, field in known.items():
        required = field.default is dataclasses.MISSING is field.default_factory
        if required and name not in fields:
            raise OLMoConfigurationError(f"{dot}{name}: this key is required")
    values = {key: decode(hints[key], value, f"{dot}{key}") for key, value in fields.items()}
    try:
        return cls(**values)
    except Exception as error:  # also what the checks of OLMo-core's classes raise
        raise OLMoConfigurationError(f"{where}: {error}" if where else str(error)) from None


def decode_registered(base: Type[Registrable], value: Mapping[str, Any], where: str) -> Any:
    """
    Make an instance of the class that OLMo-core has registered under ``type``.

    :raises OLMoConfigurationError: As :func:`decode_fields`, and if there is no such class.
    """
    fields = dict(value)
    kind, known = fields.pop("type", None), base.get_registered_names()
    if kind not in known:
        refuse(f"{where}.type", kind, closest(str(kind), known))
    return decode_fields(base.get_registered_class(kind), fields, where)


def _decode_union(args: Any, value: Any, where: str) -> Any:
    errors = []
    for arg in args:
        try:
            return decode(arg, value, where)
        except OLMoConfigurationError as error:
            errors.append((arg, error))
    # With one alternative beside null its message is the better one.
    real = [error for arg, error in errors if arg is not type(None)]
    if len(real) == 1:
        raise real[0]
    refuse(where, value, " or ".join(_describe(arg) for arg in args))


def _decode_sequence(origin: Any, args: Any, value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        refuse(where, value, "a list")
    if origin is tuple and Ellipsis not in args and len(args) != len(value):
        refuse(where, value, f"a list of {len(args)}")
    hints = args if origin is tuple and Ellipsis not in args else [args[0]] * len(value)
    return origin(decode(h, v, f"{where}.{i}") for i, (h, v) in enumerate(zip(hints, value)))


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value == int(value):
            return int(value)
    elif isinstance(hint, type) and isinstance(value, hint) and hint is not float:
        return value
    refuse(where, value, _describe(hint))


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "null"
    names = {float: "a number", int: "an integer", str: "a text", bool: "true or false"}
    if hint in names:
        return names[hint]
    return "a mapping" if dataclasses.is_dataclass(hint) else str(getattr(hint, "__name__", hint))


def require(holds: bool, where: str, value: Any, allowed: str) -> None:
    """
    :raises OLMoConfigurationError: Unless it holds; names the key, the value and what is allowed.
    """
    if not holds:
        refuse(where, value, allowed)


def refuse(where: str, value: Any, allowed: str) -> typing.NoReturn:
    """
    :raises OLMoConfigurationError: Names the key, the value and what is allowed.
    """
    raise OLMoConfigurationError(f"{where}: {value!r} is not allowed, allowed is {allowed}")


def to_plain(value: Any) -> Any:
    """The inverse of :func:`decode`: dataclasses to dicts, enumerations to their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: Dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if field.init and not field.name.startswith("_"):
                out[field.name] = to_plain(getattr(value, field.name))
        return out
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value
