"""
Orthonormal bases of the columns of tall matrices, under ``jit`` and of sharded rows.
"""

import math
from string import ascii_lowercase
from typing import Literal, Tuple, Union

import jax
import jax.numpy as jnp

from .sharded import contract, explicit_sharding, reshard

__all__ = ["METHODS", "Method", "orthonormalize", "sketch_rows"]

Method = Literal["rcqr", "cqr", "qr"]
METHODS = ("rcqr", "cqr", "qr")

SKETCH_MULTIPLE = 128
"""The rows of the sketch are a multiple of this, as in the authors' code of Dion."""


def sketch_rows(rank: int, oversampling: float = 1.25) -> int:
    """Rows of the sketch of a matrix with ``rank`` columns."""
    return math.ceil(oversampling * rank / SKETCH_MULTIPLE) * SKETCH_MULTIPLE


def orthonormalize(
    x: jax.Array,
    method: Method = "rcqr",
    key: Union[jax.Array, int] = 0,
    oversampling: float = 1.25,
) -> jax.Array:
    """The ``Q`` of ``x = Q R`` with a positive diagonal of ``R``, for each matrix of a stack.

    Columns that depend on those before them, up to rounding, become arbitrary ones orthonormal to
    these. A zero matrix gives zero, one that is not finite NaN.

    The Cholesky methods consist of products with ``x`` and of factorisations of small matrices, so
    that rows can be sharded. Where Cholesky fails, or the result is not orthonormal or does not
    span ``x`` to ``sqrt(eps) / 4``, the matrix is done again by Householder QR, which brings its
    rows together; this is a ``lax.cond``, and nothing of it runs in a step that does not need it
    (but under ``jax.vmap``, which computes both sides: give the stack as it is instead).

    Args:
      x: Shape ``(..., m, r)`` with ``m >= r``.
      method: ``"rcqr"``, randomised Cholesky QR: the triangle of the QR of a Gaussian sketch of
        ``x`` preconditions one Cholesky QR. Of matrices with no more rows than the sketch,
        Householder QR. ``"cqr"``, Cholesky QR, twice: for condition numbers up to about 1000.
        ``"qr"``, Householder QR.
      key: PRNG key, or seed, of the sketch, which the matrices of a stack share.
      oversampling: Rows of the sketch, relative to ``r``, before they are rounded up to a multiple
        of 128.

    Returns:
      Shape ``(..., m, r)``, in float64 if ``x`` is, else in float32.

    Raises:
      ValueError: If ``m < r`` or the method is unknown.

    References:
      Ahn et al., `Dion: Distributed Orthonormalized Updates
      <https://arxiv.org/abs/2504.05295>`_, 2025

      Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, ETNA 44, 2015
    """
    if method not in METHODS:
        raise ValueError(f"orthonormalize is {method!r}, and must be one of {', '.join(METHODS)}")
    m, r = x.shape[-2:]
    if m < r:
        raise ValueError(f"{m} rows have no {r} orthonormal columns")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    finite = jnp.all(jnp.isfinite(top), axis=-1, keepdims=True)
    there = top > 0
    usable = finite & jnp.any(there, axis=-1, keepdims=True)
    # Per column, which changes no Q: squares neither overflow nor vanish, and what depends on what
    # shows whatever the scales are. A power of two divides without rounding.
    top = jnp.maximum(top, jnp.finfo(x.dtype).tiny)
    x = jnp.where(finite, x / (top / (2 * jnp.frexp(top)[0])), 0)

    rows = sketch_rows(r, oversampling)
    if method == "qr" or (method == "rcqr" and rows >= m):
        q = _householder(x)
    else:
        if method == "rcqr":
            q, error = _sketched(x, there, key, rows)
        else:
            q, error = _cholesky(x)
            q, _ = _cholesky(q)
        tolerance = jnp.finfo(x.dtype).eps ** 0.5 / 4
        good = (error <= tolerance) & (_distance(q) <= tolerance)
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


def _sketched(
    x: jax.Array, there: jax.Array, key: Union[jax.Array, int], rows: int
) -> Tuple[jax.Array, jax.Array]:
    """Randomised Cholesky QR, and what of ``x`` it may not span."""
    key = jax.random.key(key) if isinstance(key, int) else key
    m, r = x.shape[-2:]
    # From N(0, 1 / rows): keeps lengths, on average.
    sketch = jax.random.normal(key, (m, rows), x.dtype) * rows**-0.5
    # A column of zeros, of which the basis has one where the momentum lacks a direction, would make
    # every step fall back. Columns of the sketch are random and at hand; rows would be transposed
    # within the products, which the compiler does slowly.
    x = jnp.where(there, x, sketch[:, :r])
    batch = ascii_lowercase[: x.ndim - 2]
    triangle = jnp.linalg.qr(contract(f"MK,{batch}MR->{batch}KR", sketch, x), mode="r")
    # Of a condition number near that of the sketch on a subspace, whatever that of x is.
    y, error = _divide(x, triangle * _signs(triangle)[..., None])
    return _cholesky(y)[0], error


def _cholesky(x: jax.Array) -> Tuple[jax.Array, jax.Array]:
    """
    ``x L^-T`` with ``x^T x = L L^T``, NaN where Cholesky fails; and what of ``x`` it may not span.
    """
    batch = ascii_lowercase[: x.ndim - 2]
    lower = jnp.linalg.cholesky(contract(f"{batch}MR,{batch}MS->{batch}RS", x, x))
    return _divide(x, jnp.swapaxes(lower, -1, -2))


def _divide(x: jax.Array, triangle: jax.Array) -> Tuple[jax.Array, jax.Array]:
    """
    ``y = x triangle^-1``, an upper triangle, and an estimate of how far ``y triangle`` is from
    ``x``, relative to its columns: ``(...)``.

    By the inverse: the compiler does not divide the rows of a triangular solve over devices, and a
    product is what accelerators are fast at. Both have errors of this size, which is large where a
    column depends on those before it, and others follow.
    """
    eye = jnp.broadcast_to(jnp.eye(triangle.shape[-1], dtype=x.dtype), triangle.shape)
    sharding = explicit_sharding(triangle)
    if sharding is not None:
        eye = reshard(eye, sharding, sharding.spec)
    inverse = jax.lax.linalg.triangular_solve(triangle, eye, left_side=True, lower=False)
    batch = ascii_lowercase[: x.ndim - 2]
    y = contract(f"{batch}MR,{batch}RS->{batch}MS", x, inverse)
    # A column of y has the rounding of a sum of columns of x, and goes into x by a row of triangle.
    growth = jnp.linalg.norm(inverse, axis=-2) * jnp.linalg.norm(triangle, axis=-1)
    return y, jnp.finfo(x.dtype).eps * jnp.max(growth, axis=-1)


def _distance(q: jax.Array) -> jax.Array:
    """
    Of ``q^T q`` from the identity, as a vector shows it, which finds what is not orthonormal in a
    fraction of the time of ``q^T q``; ``(...)``.
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
