"""
PRNG keys in the forms that JAX has for them.
"""

import zlib
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Key", "impl_of", "stream", "typed_key"]

Key = Union[jax.Array, np.ndarray, int]
"""A key of ``jax.random.key``, one of ``jax.random.PRNGKey``, or a seed."""


def impl_of(key: Key) -> Any:
    """
    How a key draws; ``None`` is the default. Makes no array, which would start up devices.

    :raises ValueError: If it is no key.
    """
    if isinstance(key, (int, np.integer)):
        return None
    dtype: Any = getattr(key, "dtype", None)
    ndim = len(getattr(key, "shape", ()))
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0:
        return jax.random.key_impl(key)
    is_seed = dtype is not None and jnp.issubdtype(dtype, jnp.integer) and ndim == 0
    if is_seed or (dtype == jnp.uint32 and ndim == 1):
        return None
    raise ValueError(f"key is {key!r}, and must be a PRNG key or an integer")


def typed_key(key: Key) -> jax.Array:
    """
    As ``jax.random.key`` makes it.

    :raises ValueError: If it is no key.
    """
    if impl_of(key) is not None:
        return jnp.asarray(key)
    if isinstance(key, (int, np.integer)) or key.ndim == 0:
        return jax.random.key(key)
    return jax.random.wrap_key_data(jnp.asarray(key))


def stream(key: jax.Array, count: Union[jax.Array, int], name: str) -> jax.Array:
    """The key of one parameter in one step."""
    return jax.random.fold_in(jax.random.fold_in(key, count), zlib.crc32(name.encode()))
