"""
The model of a spec: a factory of OLMo-core's, or a full config.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Dict, List

from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.attention.flash_attn_api import has_flash_attn_2
from olmo_core.nn.transformer import TransformerConfig

from olmo_optim_ext.catalog import closest

from .decoding import require

__all__ = ["NO_FLOAT16", "model_config", "words"]

NO_FLOAT16 = (
    "which is not allowed, as OLMo-core has no gradient scaler; allowed is float32 or bfloat16"
)


def model_config(model: Any, seed: int, vocab_size: int) -> TransformerConfig:
    """
    The config of a model.

    :param model: The name of a factory of OLMo-core's, a mapping with ``factory`` and its
        arguments, or a full config.
    :param seed: Of its first weights.
    :param vocab_size: Of the tokenizer. A factory gets it padded to a multiple of 128.
    """
    if isinstance(model, str):
        config = _from_factory(model, {}, vocab_size)
    elif isinstance(model, Mapping) and "factory" in model:
        arguments = {k: v for k, v in model.items() if k != "factory"}
        config = _from_factory(str(model["factory"]), arguments, vocab_size)
    elif isinstance(model, Mapping):
        try:
            config = TransformerConfig.from_dict(dict(model))
        except Exception as error:  # OLMo-core's decoding raises many types
            raise OLMoConfigurationError(
                f"model: it is no TransformerConfig of OLMo-core: {error}"
            ) from None
    else:
        allowed = "a factory's name or a mapping"
        raise OLMoConfigurationError(f"model: {model!r} is not allowed, allowed is {allowed}")
    require(
        config.vocab_size >= vocab_size,
        "model.vocab_size",
        config.vocab_size,
        f"at least the tokenizer's {vocab_size}",
    )
    if DType.float16 in _dtypes(config.as_dict()):
        raise OLMoConfigurationError(f"model: a dtype is 'float16', {NO_FLOAT16}")
    config.init_seed = seed
    return config


def _dtypes(value: Any) -> List[Any]:
    """All values of keys ``dtype``, at any depth."""
    if isinstance(value, Mapping):
        nested = [each for v in value.values() for each in _dtypes(v)]
        return [v for k, v in value.items() if k == "dtype"] + nested
    if isinstance(value, (list, tuple)):
        return [each for v in value for each in _dtypes(v)]
    return []


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _factories() -> List[str]:
    found = []
    for name, member in inspect.getmembers(TransformerConfig, inspect.ismethod):
        if not name.startswith("_") and "vocab_size" in inspect.signature(member).parameters:
            found.append(name)
    return found


def _from_factory(name: str, arguments: Dict[str, Any], vocab_size: int) -> TransformerConfig:
    known = _factories()
    if name not in known:
        raise OLMoConfigurationError(
            f"model: OLMo-core has no model {name!r}, allowed are {closest(name, known)}"
        )
    arguments = {"vocab_size": 128 * -(-vocab_size // 128), **arguments}
    backend = arguments.get("attn_backend")
    if backend is not None:
        backends = [str(b.value) for b in AttentionBackendName]
        require(backend in backends, "model.attn_backend", backend, closest(backend, backends))
        arguments["attn_backend"] = AttentionBackendName(backend)
    elif not has_flash_attn_2():
        # The factories of OLMo 3 ask for flash attention, which runs on GPUs only.
        arguments["attn_backend"] = AttentionBackendName.torch
    if isinstance(dtype := arguments.get("dtype"), str):
        dtypes = [str(d.value) for d in DType]
        require(dtype in dtypes, "model.dtype", dtype, closest(dtype, dtypes))
        arguments["dtype"] = DType(dtype)
    try:
        return getattr(TransformerConfig, name)(**arguments)
    except Exception as error:  # whatever arithmetic makes of wrong arguments
        raise OLMoConfigurationError(
            f"model: {name} refuses its arguments: {words(error)}"
        ) from None
