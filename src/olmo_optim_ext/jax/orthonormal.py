"""
Orthonormal bases of the columns of tall matrices, under ``jit`` and of sharded rows.
"""

import math
from string import ascii_lowercase
from typing import Literal, Tuple

import jax
import jax.numpy as jnp

from .keys import Key, typed_key
from .sharded import contract, explicit_sharding, reshard

__all__ = ["METHODS", "Method", "orthonormalize", "sketch_rows"]

Method = Literal["rcqr", "cqr", "qr"]
METHODS = ("rcqr", "cqr", "qr")

OVERSAMPLING = 1.25
"""Rows of the sketch for each column, as in the authors' code of Dion."""

SKETCH_MULTIPLE = 128
"""They are rounded up to a multiple of this, as there."""


def sketch_rows(rank: int) -> int:
    """Rows of the sketch of a matrix with ``rank`` columns."""
    return math.ceil(OVERSAMPLING * rank / SKETCH_MULTIPLE) * SKETCH_MULTIPLE


def orthonormalize(x: jax.Array, method: Method = "rcqr", key: Key = 0) -> jax.Array:
    """The ``Q`` of ``x = Q R`` with a positive diagonal of ``R``, for each matrix of a stack.

    Columns that depend on those before them, up to rounding, become arbitrary ones orthonormal to
    these. A zero matrix gives zero, one that is not finite NaN.

    The Cholesky methods consist of products with ``x`` and of factorisations of small matrices, so
    that rows can be sharded. Where Cholesky fails, or the result is not orthonormal or does not
    span ``x`` to ``sqrt(eps) / 4``, the result is that of Householder QR. This brings rows
    together, of all matrices of the stack. It is in a ``lax.cond``, and does not run where no
    matrix needs it; but ``jax.vmap`` computes both sides: give it the stack as it is instead.

    Args:
      x: Shape ``(..., m, r)`` with ``m >= r``.
      method: ``"rcqr"``, randomised Cholesky QR: the triangle of the QR of a Gaussian sketch of
        ``x`` preconditions one Cholesky QR. Of matrices with no more rows than the sketch,
        Householder QR. ``"cqr"``, Cholesky QR, twice: for condition numbers up to about 1000, and
        never with a column of zeros. ``"qr"``, Householder QR.
      key: PRNG key, or seed, of the sketch, which the matrices of a stack share.

    Returns:
      Shape ``(..., m, r)``, in float64 if ``x`` is, else in float32.

    Raises:
      ValueError: If there are fewer rows than columns, or no columns, if the method is unknown, or
        if ``x`` is complex.

    References:
      Ahn et al., `Dion: Distributed Orthonormalized Updates
      <https://arxiv.org/abs/2504.05295>`_, 2025

      Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, ETNA 44, 2015
    """
    if method not in METHODS:
        raise ValueError(f"orthonormalize is {method!r}, and must be one of {', '.join(METHODS)}")
    if x.ndim < 2 or not x.shape[-2] >= x.shape[-1] > 0 or jnp.iscomplexobj(x):
        raise ValueError(
            f"x is {x.dtype} of shape {x.shape}, and must be real, with at least as many rows as "
            f"columns, and one column"
        )
    m, r = x.shape[-2:]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    finite = jnp.all(jnp.isfinite(top), axis=-1, keepdims=True)
    there = top > 0
    usable = finite & jnp.any(there, axis=-1, keepdims=True)
    # Per column, which changes no Q: squares neither overflow nor vanish, and what depends on what
    # shows whatever the scales are. A power of two divides without rounding.
    top = jnp.maximum(top, jnp.finfo(x.dtype).tiny)
    x = jnp.where(finite, x / (top / (2 * jnp.frexp(top)[0])), 0)

    rows = sketch_rows(r)
    if method == "qr" or (method == "rcqr" and rows >= m):
        q = _householder(x)
    else:
        if method == "rcqr":
            x, triangle = _sketched_triangle(x, there, typed_key(key), rows)
        else:
            triangle = _cholesky(x)
        y, error = _quotient(x, triangle)
        q = _times(y, _inverse(_cholesky(y)))
        good = (error <= _tolerance(x)) & (_distance(q) <= _tolerance(x))
        good = good[..., None, None] | ~usable
        q = jax.lax.cond(
            jnp.all(good),
            lambda q, x, good: q,
            lambda q, x, good: jnp.where(good, q, _householder(x)),
            *(q, x, good),
        )
    return jnp.where(finite, jnp.where(usable, q, 0), jnp.nan)


def _householder(x: jax.Array) -> jax.Array:
    sharding = explicit_sharding(x)
    if sharding is not None:
        x = reshard(x, sharding, [*sharding.spec[:-2], None, None])
    q, r = jnp.linalg.qr(x)
    q = q * _signs(r)[..., None, :]
    return q if sharding is None else reshard(q, sharding, sharding.spec)


def _sketched_triangle(
    x: jax.Array, there: jax.Array, key: jax.Array, rows: int
) -> Tuple[jax.Array, jax.Array]:
    """
    ``x`` with columns of zeros filled, and the triangle of the QR of a sketch of it, which makes
    ``x`` as well conditioned as the sketch is on a subspace.
    """
    m, r = x.shape[-2:]
    # From N(0, 1 / rows): keeps lengths, on average.
    sketch = jax.random.normal(key, (m, rows), x.dtype) * rows**-0.5
    # A column of zeros, of which the basis has one where the momentum lacks a direction, would make
    # every step fall back. Columns of the sketch are random and at hand; rows would be transposed
    # within the products, which the compiler does slowly.
    x = jnp.where(there, x, sketch[:, :r])
    batch = ascii_lowercase[: x.ndim - 2]
    triangle = jnp.linalg.qr(contract(f"MK,{batch}MR->{batch}KR", sketch, x), mode="r")
    return x, triangle * _signs(triangle)[..., None]


def _cholesky(x: jax.Array) -> jax.Array:
    """The upper triangle of ``x^T x``; NaN where Cholesky fails."""
    batch = ascii_lowercase[: x.ndim - 2]
    gram = contract(f"{batch}MR,{batch}MS->{batch}RS", x, x)
    return jnp.swapaxes(jnp.linalg.cholesky(gram), -1, -2)


def _inverse(triangle: jax.Array) -> jax.Array:
    """
    Rows are divided by a triangle by way of its inverse: the compiler does not divide those of a
    triangular solve over devices, and products are what accelerators are fast at.
    """
    eye = jnp.broadcast_to(jnp.eye(triangle.shape[-1], dtype=triangle.dtype), triangle.shape)
    sharding = explicit_sharding(triangle)
    if sharding is not None:
        eye = reshard(eye, sharding, sharding.spec)
    return jax.lax.linalg.triangular_solve(triangle, eye, left_side=True, lower=False)


def _times(x: jax.Array, small: jax.Array) -> jax.Array:
    batch = ascii_lowercase[: x.ndim - 2]
    return contract(f"{batch}MR,{batch}RS->{batch}MS", x, small)


def _quotient(x: jax.Array, triangle: jax.Array) -> Tuple[jax.Array, jax.Array]:
    """
    ``y = x triangle^-1``, and how far ``y triangle`` is from ``x``, relative to its columns:
    ``(...)``.
    """
    inverse = _inverse(triangle)
    y = _times(x, inverse)
    # A column of y has the rounding of a sum of columns of x, and goes into x by a row of triangle.
    growth = jnp.linalg.norm(inverse, axis=-2) * jnp.linalg.norm(triangle, axis=-1)
    bound = jnp.finfo(x.dtype).eps * jnp.max(growth, axis=-1)

    def refined(y: jax.Array) -> Tuple[jax.Array, jax.Array]:
        y = y + _times(x - _times(y, triangle), inverse)
        left = jnp.linalg.norm(x - _times(y, triangle), axis=-2)
        return y, jnp.max(left / jnp.linalg.norm(x, axis=-2), axis=-1)

    # Columns that are nearly dependent need it, as in the first steps of a training.
    return jax.lax.cond(jnp.all(bound <= _tolerance(x)), lambda y: (y, bound), refined, y)


def _tolerance(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps) ** 0.5 / 4


def _distance(q: jax.Array) -> jax.Array:
    """
    The distance of ``q^T q`` from the identity, estimated with one vector: in a fraction of the
    time of ``q^T q``; ``(...)``.
    """
    # No symmetry of q is likely to hide behind these.
    v = jnp.sin(jnp.arange(1, q.shape[-1] + 1, dtype=q.dtype))
    batch = ascii_lowercase[: q.ndim - 2]
    product = contract(f"{batch}MR,R->{batch}M", q, v)
    product = contract(f"{batch}MR,{batch}M->{batch}R", q, product)
    return jnp.linalg.norm(product - v, axis=-1) / jnp.linalg.norm(v)


def _signs(triangle: jax.Array) -> jax.Array:
    """Of the diagonal, with 1 for 0; shape ``(..., r)``."""
    diagonal = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    return jnp.where(diagonal < 0, -1, 1).astype(triangle.dtype)
