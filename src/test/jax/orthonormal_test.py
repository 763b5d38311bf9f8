"""
Orthonormal bases, and what happens where the fast ways to them fail.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import olmo_optim_ext.jax.orthonormal as orthonormal
from olmo_optim_ext.jax.orthonormal import METHODS, orthonormalize, sketch_rows

SHAPES = [(20, 8), (8, 8), (20, 1), (1, 1), (300, 24), (300, 1), (3, 300, 24)]


def matrix(shape, condition: float = 10.0, seed: int = 0) -> np.ndarray:
    """Float64, with singular values that fall evenly to ``1 / condition``."""
    *batch, m, r = shape
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((*batch, m, r)))[0]
    v = np.linalg.qr(rng.standard_normal((*batch, r, r)))[0]
    return (u * np.geomspace(1, 1 / condition, r)) @ np.swapaxes(v, -1, -2)


def expected(x: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(np.asarray(x, np.float64))
    return q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)[..., None, :]


def off(q: Any) -> float:
    """How far ``q`` is from orthonormal."""
    q = np.asarray(q, np.float64)
    return np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(q.shape[-1])).max()


def fallbacks(monkeypatch) -> list:
    """Shapes of what Householder QR is run for, seen at run time and not when compiling."""
    seen: list = []
    householder = orthonormal._householder

    def watched(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: seen.append(x.shape))
        return householder(x)

    monkeypatch.setattr(orthonormal, "_householder", watched)
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_q_of_x_with_a_positive_diagonal(shape, method):
    x = matrix(shape)
    q = jax.jit(orthonormalize, static_argnums=1)(jnp.asarray(x, jnp.float32), method)
    assert q.shape == shape and q.dtype == jnp.float32
    assert off(q) < 1e-5
    np.testing.assert_allclose(q, expected(x), atol=2e-5)


@pytest.mark.parametrize("method", ["rcqr", "cqr"])
def test_well_conditioned_matrices_need_no_fallback(method, monkeypatch):
    seen = fallbacks(monkeypatch)
    q = orthonormalize(jnp.asarray(matrix((300, 24), 100.0), jnp.float32), method)
    jax.effects_barrier()
    assert off(q) < 1e-5 and not seen


def test_the_sketch_takes_what_cholesky_alone_cannot(monkeypatch):
    """A condition number of 1e5, whose square float32 does not hold."""
    seen = fallbacks(monkeypatch)
    x = jnp.asarray(matrix((300, 24), 1e5), jnp.float32)
    assert off(orthonormalize(x, "rcqr")) < 1e-5
    jax.effects_barrier()
    assert not seen
    assert off(orthonormalize(x, "cqr")) < 1e-5
    jax.effects_barrier()
    assert len(seen) == 1


@pytest.mark.parametrize("method", ["rcqr", "cqr"])
@pytest.mark.parametrize("how", ["equal", "combination", "all equal"])
def test_where_columns_depend_on_others_it_falls_back_inside_of_jit(method, how, monkeypatch):
    x = matrix((300, 24))
    if how == "equal":
        x[:, 5] = x[:, 2]
    elif how == "combination":
        x[:, 23] = x[:, :8].sum(1)
    else:
        x[:] = x[:, :1]
    q = jax.jit(orthonormalize, static_argnums=1)(jnp.asarray(x, jnp.float32), method)
    tolerance = float(jnp.finfo(jnp.float32).eps) ** 0.5 / 4
    assert off(q) < tolerance
    # All that x spans is spanned.
    x = np.asarray(x / np.linalg.norm(x, axis=0), np.float32)
    q = np.asarray(q, np.float64)
    assert np.abs(q @ (q.T @ x) - x).max() < tolerance


@pytest.mark.parametrize("method", METHODS)
def test_columns_of_zeros_become_orthonormal_to_those_before(method, monkeypatch):
    seen = fallbacks(monkeypatch)
    x = matrix((300, 24))
    x[:, 20:] = 0
    q = orthonormalize(jnp.asarray(x, jnp.float32), method)
    assert off(q) < 1e-5
    np.testing.assert_allclose(q[:, :20], expected(x[:, :20]), atol=2e-5)
    jax.effects_barrier()
    assert method != "rcqr" or not seen  # the basis has such columns for many steps


def test_one_matrix_of_a_stack_that_falls_back_leaves_the_others_alone():
    x = np.stack([matrix((300, 24), seed=i) for i in range(3)])
    x[1, :, 5] = x[1, :, 2]
    alone = orthonormalize(jnp.asarray(x[[0, 2]], jnp.float32))
    stack = orthonormalize(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(stack[jnp.array([0, 2])], alone, atol=1e-6)
    assert off(stack) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 8), (300, 24)])
def test_zero_gives_zero_and_what_is_not_finite_nan(shape, method):
    x = np.stack([matrix(shape), np.zeros(shape), matrix(shape), matrix(shape)])
    x[2, 1, 1], x[3, 0, 0] = np.inf, np.nan
    q = orthonormalize(jnp.asarray(x, jnp.float32), method)
    assert off(q[0]) < 1e-5 and (q[1] == 0).all() and jnp.isnan(q[2:]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e37])
def test_scales_of_columns_change_nothing(scale, method):
    x = matrix((300, 24))
    usual = orthonormalize(jnp.asarray(x, jnp.float32), method)
    x[:, ::2] *= scale
    q = orthonormalize(jnp.asarray(x, jnp.float32), method)
    np.testing.assert_allclose(q, usual, atol=1e-5)


def test_float64_stays_so():
    jax.config.update("jax_enable_x64", True)
    try:
        q = orthonormalize(jnp.asarray(matrix((300, 24))))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert q.dtype == jnp.float64 and off(q) < 1e-13


def test_a_matrix_that_is_not_tall_is_refused():
    with pytest.raises(ValueError, match="3 rows have no 4"):
        orthonormalize(jnp.ones((3, 4)))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="orthonormalize is 'svd', .* rcqr, cqr, qr"):
        orthonormalize(jnp.ones((4, 3)), "svd")  # type: ignore[arg-type]


def test_the_sketch_has_a_multiple_of_128_rows():
    assert [sketch_rows(r) for r in (1, 102, 103, 256)] == [128, 128, 256, 384]
