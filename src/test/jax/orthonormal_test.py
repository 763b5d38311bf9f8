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

TOLERANCE = float(jnp.finfo(jnp.float32).eps) ** 0.5 / 4
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


def spanned(x: np.ndarray, q: Any) -> float:
    """How far columns of ``x`` are from the span of ``q``, relative to their lengths."""
    x = np.asarray(x / np.linalg.norm(x, axis=0), np.float32)
    q = np.asarray(q, np.float64)
    return np.linalg.norm(q @ (q.T @ x) - x, axis=0).max()


@pytest.mark.parametrize("method", ["rcqr", "cqr"])
def test_columns_that_depend_on_others_leave_it_orthonormal_and_spanning(method):
    """From well apart to the same, where it falls back."""
    jitted = jax.jit(orthonormalize, static_argnums=1)
    apart = np.random.default_rng(1).standard_normal(300) / 300**0.5
    for distance in (*np.geomspace(1e-1, 1e-8, 15), 0.0):
        x = matrix((300, 24))
        x[:, 5] = x[:, 2] + distance * np.linalg.norm(x[:, 2]) * apart
        q = jitted(jnp.asarray(x, jnp.float32), method)
        assert off(q) < TOLERANCE and spanned(x, q) < TOLERANCE, distance
    x[:] = x[:, :1]
    q = jitted(jnp.asarray(x, jnp.float32), method)
    assert off(q) < TOLERANCE and spanned(x, q) < TOLERANCE


def test_nearly_dependent_columns_are_refined_and_need_no_fallback(monkeypatch):
    seen = fallbacks(monkeypatch)
    apart = np.random.default_rng(1).standard_normal(300) / 300**0.5
    for distance in (1e-4, 1e-5, 1e-6):
        x = matrix((300, 24))
        x[:, 5] = x[:, 2] + distance * np.linalg.norm(x[:, 2]) * apart
        q = orthonormalize(jnp.asarray(x, jnp.float32))
        assert off(q) < TOLERANCE and spanned(x, q) < TOLERANCE
    jax.effects_barrier()
    assert not seen


def test_no_step_of_decaying_spectra_falls_back(monkeypatch):
    """At full rank and from a random basis: what refining the quotient is for."""
    seen = fallbacks(monkeypatch)
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 48)))[0] for n in (300, 48))
    for values in (np.arange(1.0, 49) ** -2, np.arange(1.0, 49) ** -4, np.geomspace(1, 1e-6, 48)):
        b, basis = (u * values) @ v.T, rng.standard_normal((48, 48))
        for _ in range(4):
            x = b @ basis
            q = orthonormalize(jnp.asarray(x, jnp.float32))
            assert off(q) < 2e-5 and spanned(x, q) < TOLERANCE
            r = b.T @ np.asarray(q, np.float64)
            basis = r / np.linalg.norm(r, axis=0)
    jax.effects_barrier()
    assert not seen


def test_what_is_not_orthonormal_is_done_again(monkeypatch):
    x = jnp.asarray(matrix((300, 24)), jnp.float32)
    good = orthonormalize(x)
    cholesky = orthonormal._cholesky
    for wrong in (1.001, jnp.ones(24).at[3].set(1.001), jnp.nan):
        monkeypatch.setattr(orthonormal, "_cholesky", lambda y, wrong=wrong: wrong * cholesky(y))
        q = orthonormalize(x)
        assert off(q) < 1e-5
        np.testing.assert_allclose(q, good, atol=2e-5)


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


@pytest.mark.parametrize(
    "x", [np.ones((3, 4)), np.ones((3, 0)), np.ones(3), np.ones((4, 3), np.complex64)]
)
def test_what_is_no_tall_matrix_is_refused(x):
    x = jnp.asarray(x)
    with pytest.raises(ValueError, match="must be real, with at least as many rows as columns"):
        orthonormalize(x)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="orthonormalize is 'svd', .* rcqr, cqr, qr"):
        orthonormalize(jnp.ones((4, 3)), "svd")  # type: ignore[arg-type]


def test_a_seed_may_be_of_any_kind():
    x = jnp.asarray(matrix((300, 24)), jnp.float32)
    expected = orthonormalize(x, key=3)
    for key in (np.int64(3), jnp.int32(3), jax.random.key(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(orthonormalize(x, key=key), expected)
    assert not (orthonormalize(x, key=4) == expected).all()


def test_the_sketch_has_a_multiple_of_128_rows():
    assert [sketch_rows(r) for r in (1, 102, 103, 256)] == [128, 128, 256, 384]
