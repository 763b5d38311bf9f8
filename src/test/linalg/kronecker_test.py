"""
Against the same with the Kronecker products written out.
"""

from typing import List, Optional, Tuple

import pytest
import torch

from olmo_optim_ext.linalg.kronecker import (
    balanced,
    fit_by_division,
    fit_by_products,
    precondition,
    spectral_norm_bound,
)

M, N = 4, 3
KINDS = ["full", "diagonal", "none"]
ALIVE = torch.ones(1, dtype=torch.bool)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def factor(kind: str, n: int, seed: int, triangular: bool = True) -> Optional[torch.Tensor]:
    if kind == "none":
        return None
    q = torch.eye(n, dtype=torch.float64) + 0.3 * randn(1, n, n, seed=seed)
    if kind == "diagonal":
        return q.diagonal(dim1=-2, dim2=-1).clone()
    return q.triu() if triangular else q


def dense(q: Optional[torch.Tensor], n: int) -> torch.Tensor:
    if q is None:
        return torch.eye(n, dtype=torch.float64)
    return torch.diag(q[0]) if q.ndim == 2 else q[0]


def kron(factors: List[Optional[torch.Tensor]]) -> torch.Tensor:
    # Row-major vec: vec(A x B^T) = (A (x) B) vec(x).
    return torch.kron(dense(factors[0], M), dense(factors[1], N))


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("triangular", [True, False])
def test_preconditioning_is_with_the_kronecker_product(left: str, right: str, triangular: bool):
    factors = [factor(left, M, 1, triangular), factor(right, N, 2, triangular)]
    x, q = randn(1, M, N), kron(factors)
    got = precondition(factors, x, triangular)
    torch.testing.assert_close(got[0], (q.T @ q @ x.flatten()).view(M, N))


def contracted(h: torch.Tensor, side: int) -> torch.Tensor:
    return h.T @ h if side else h @ h.T


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_a_fit_by_division_is_the_formula(left: str, right: str):
    factors = [factor(left, M, 1), factor(right, N, 2)]
    grad, probe, q = randn(1, M, N, seed=3), randn(1, M, N, seed=4), kron(factors)
    a = (q @ grad.flatten()).view(M, N)
    b = (torch.linalg.inv(q).T @ probe.flatten()).view(M, N)
    new = fit_by_division(factors, grad, probe, 0.1, ALIVE)
    for side, (old, got) in enumerate(zip(factors, new)):
        if old is None:
            assert got is None
            continue
        assert got is not None
        total, difference = (contracted(a, side) + s * contracted(b, side) for s in (1, -1))
        if old.ndim == 2:
            step = difference.diag() * old[0] / total.diag().max()
        else:
            step = difference.triu() @ old[0] / spectral_norm_bound(total[None])
        torch.testing.assert_close(got[0], old[0] - 0.1 * step)


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_a_fit_by_products_is_the_formula_but_for_a_rotation(left: str, right: str):
    factors = [factor(left, M, 1, False), factor(right, N, 2, False)]
    bounds = [None if q is None else torch.full((1, 1), 2.0).double() for q in factors]
    grad, q = randn(1, M, N, seed=3), kron(factors)
    h = (q.T @ q @ grad.flatten()).view(M, N)
    new, new_bounds = fit_by_products(factors, bounds, grad, 0.1, ALIVE)
    for side, (old, got, n) in enumerate(zip(factors, new, (M, N))):
        if old is None:
            assert got is None
            continue
        bound = new_bounds[side]
        assert got is not None and bound is not None
        moment, target = contracted(h, side), M * N / n
        norm = moment.diag().max() if old.ndim == 2 else spectral_norm_bound(moment[None])
        least = float(norm) + target
        assert float(bound) == pytest.approx(max(0.9 * 2 + 0.1 * least, least))
        old_, got_ = dense(old, n), dense(got, n)
        moment = moment.diag().diag() if old.ndim == 2 else moment
        expected = old_ - 0.1 / float(bound) * (moment @ old_ - target * old_)
        if old.ndim == 2:
            torch.testing.assert_close(got_, expected)
        else:
            # Q -> U Q leaves Q^T Q, to third order of a step of at most 1/8.
            torch.testing.assert_close(got_.T @ got_, expected.T @ expected, rtol=0, atol=1e-2)
            assert (got_ - got_.T).norm() < (expected - expected.T).norm()


def condition_after(fit: str, steps: int) -> Tuple[float, float]:
    """Of the covariance of gradients, before and after preconditioning."""
    left = torch.linalg.qr(randn(8, 8, seed=1)).Q * torch.logspace(0, -0.75, 8).double()
    right = torch.linalg.qr(randn(6, 6, seed=2)).Q * torch.logspace(0, -0.75, 6).double()
    factors: List[Optional[torch.Tensor]] = [torch.eye(n)[None].double() for n in (8, 6)]
    bounds: List[Optional[torch.Tensor]] = [torch.zeros(1, 1).double() for _ in factors]
    for step in range(steps):
        rate = 0.1 if step < steps // 2 else 0.01
        grad = (left @ randn(8, 6, seed=10 + step) @ right.T)[None]
        probe = randn(1, 8, 6, seed=100_000 + step)
        if fit == "division":
            factors = fit_by_division(factors, grad, probe, rate, ALIVE)
        else:
            factors, bounds = fit_by_products(factors, bounds, grad, rate, ALIVE)
    q_left, q_right = (q[0] for q in factors if q is not None)
    covariance = torch.kron(left @ left.T, right @ right.T)
    p = torch.kron(q_left.T @ q_left, q_right.T @ q_right)
    return float(torch.linalg.cond(covariance)), float(torch.linalg.cond(p @ covariance @ p))


@pytest.mark.parametrize("fit", ["division", "products"])
def test_gradients_are_whitened(fit: str):
    before, after = condition_after(fit, 2000)
    assert before == pytest.approx(1000, rel=1e-2)
    assert after < 10


def test_what_is_not_fitted_and_what_is_not_finite_is_left_alone():
    left = torch.eye(M).expand(3, M, M) + 0.1
    factors = [left.triu(), torch.ones(3, N)]
    bounds: List[Optional[torch.Tensor]] = [torch.ones(3, 1), torch.ones(3, 1)]
    grad = torch.randn(3, M, N, generator=torch.Generator().manual_seed(0))
    grad[2, 0, 0] = torch.inf
    alive = torch.tensor([True, False, True])
    by_division = fit_by_division(factors, grad, torch.ones_like(grad), 0.1, alive)
    by_products, new_bounds = fit_by_products(factors, bounds, grad, 0.1, alive)
    for new in (by_division, by_products):
        for q, old in zip(new, factors):
            assert q is not None and torch.equal(q[1:], old[1:])
            assert not torch.equal(q[0], old[0]) and q.isfinite().all()
    for bound in new_bounds:
        assert bound is not None and bound[0] != 1 and torch.equal(bound[1:], torch.ones(2, 1))


def test_balancing_changes_no_preconditioner():
    factors = [1e3 * randn(1, M, M, seed=1).triu(), 1e-2 * randn(1, N, seed=2)]
    x = randn(1, M, N)
    new = balanced(factors)
    torch.testing.assert_close(precondition(new, x, True), precondition(factors, x, True))
    sizes = [float(q.abs().max()) for q in new if q is not None]
    assert sizes[0] == pytest.approx(sizes[1])
    assert balanced([factors[0], None])[0] is factors[0]


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_bound_of_the_norm_is_below_and_close(scale: float):
    x = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    a = x @ x.mT * scale
    a[2] = 0
    bound, norm = spectral_norm_bound(a), torch.linalg.matrix_norm(a.double(), 2)
    assert (bound <= norm * (1 + 1e-5)).all()
    assert (bound[:2] >= 0.7 * norm[:2]).all() and bound[2] == 0
