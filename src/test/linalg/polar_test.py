from typing import List, Tuple

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from olmo_optim_ext import PolarMethod
from olmo_optim_ext.linalg.polar import newton_schulz_flops, polar

SHAPES = [(9, 4), (4, 9), (6, 6), (2, 30), (1, 5), (5, 1)]


def random_stack(k: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rows + cols)
    return torch.randn(k, rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def with_singular_values(rows: int, cols: int, values: List[float]) -> torch.Tensor:
    """A float64 matrix with the given singular values."""
    left, _ = torch.linalg.qr(random_stack(1, rows, rows, torch.float64)[0])
    right, _ = torch.linalg.qr(random_stack(1, cols, cols, torch.float64)[0])
    n = len(values)
    return left[:, :n] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:, :n].T


def inverse_root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def polar_by_eigh(x: torch.Tensor) -> torch.Tensor:
    """``X (X^T X)^(-1/2)``, or ``(X X^T)^(-1/2) X`` of a wide matrix, of full rank."""
    x = x.double()
    if x.shape[0] < x.shape[1]:
        return inverse_root(x @ x.T) @ x
    return x @ inverse_root(x.T @ x)


def quintic_steps(x: torch.Tensor, steps: int) -> torch.Tensor:
    """
    Newton-Schulz as the scalar iteration that each singular value goes through. It knows no
    rounding: all else of the iteration leaves singular vectors as they are.
    """
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float(
        torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected)
    )


# Exact


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_gives_the_polar_factor(shape: Tuple[int, int]):
    x = random_stack(3, *shape)
    got = polar(x, PolarMethod.svd)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    for matrix, factor in zip(x, got):
        assert relative_error(factor, polar_by_eigh(matrix)) < 1e-5


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 5e-3)])
def test_svd_keeps_the_dtype_and_computes_no_worse_than_float32(
    dtype: torch.dtype, tolerance: float
):
    x = random_stack(1, 7, 5, dtype)
    got = polar(x, PolarMethod.svd)
    assert got.dtype == dtype
    assert relative_error(got[0], polar_by_eigh(x[0])) < tolerance


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_svd_leaves_directions_without_signal_alone(shape: Tuple[int, int]):
    x = with_singular_values(*shape, values=[3.0, 0.2])
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = polar(x.float().unsqueeze(0), PolarMethod.svd)[0]
    assert relative_error(got, u[:, :2] @ vh[:2]) < 1e-5
    assert torch.linalg.matrix_rank(got, rtol=1e-3) == 2


@pytest.mark.parametrize("method", PolarMethod)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gives_zero_and_does_not_spoil_the_stack(method: PolarMethod, dtype: torch.dtype):
    x = random_stack(3, 5, 4, dtype)
    x[1] = 0
    got = polar(x, method)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert torch.isfinite(got).all()
    assert (got[0] != 0).any() and (got[2] != 0).any()


# Newton-Schulz


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_is_the_quintic_on_singular_values(shape: Tuple[int, int], steps: int):
    x = random_stack(3, *shape)
    got = polar(x, steps=steps)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    for matrix, factor in zip(x, got):
        assert relative_error(factor, quintic_steps(matrix, steps)) < 1e-5


def test_newton_schulz_in_float64_is_the_quintic_to_float64():
    x = random_stack(2, 6, 8, torch.float64)
    for matrix, factor in zip(x, polar(x)):
        assert relative_error(factor, quintic_steps(matrix, 5)) < 1e-12


@pytest.mark.parametrize("values", [[1.0, 1e-2, 1e-5], [1.0]], ids=str)
def test_newton_schulz_on_nearly_singular_matrices(values: List[float]):
    x = with_singular_values(8, 5, values)
    got = polar(x.float().unsqueeze(0))[0]
    # float32 rounding of a direction without signal grows by 3.4445 a step.
    assert relative_error(got, quintic_steps(x, 5)) < 1e-4


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_a_stack_gives_what_its_matrices_give(
    shape: Tuple[int, int], dtype: torch.dtype, tolerance: float
):
    x = random_stack(4, *shape, dtype)
    stacked = polar(x)
    for i in range(4):
        assert relative_error(stacked[i], polar(x[i : i + 1])[0]) < tolerance


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6), (64, 48)], ids=str)
def test_newton_schulz_agrees_with_torch_in_bfloat16(shape: Tuple[int, int]):
    x = random_stack(1, *shape)
    got = polar(x, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    expected = _zeropower_via_newtonschulz(x[0], (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert relative_error(got[0], expected) < 2e-2


@pytest.mark.parametrize("shape", [(12, 6), (6, 12), (8, 8)], ids=str)
def test_newton_schulz_brings_singular_values_near_one(shape: Tuple[int, int]):
    x = with_singular_values(*shape, values=[2.0, 1.5, 1.0, 0.8, 0.5, 0.3])
    got = torch.linalg.svdvals(polar(x.float().unsqueeze(0))[0].double())[:6]
    assert 0.6 < got.min() and got.max() < 1.2
    # Not because they were near one before.
    start = torch.linalg.svdvals(x / torch.linalg.matrix_norm(x))[:6]
    assert start.min() < 0.15


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6, 1e15])
def test_newton_schulz_does_not_depend_on_the_scale(scale: float):
    x = random_stack(2, 6, 4)
    assert relative_error(polar(x * scale), polar(x)) < 1e-5


@pytest.mark.parametrize("method", PolarMethod)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-8, 1e25, 1e37])
def test_huge_and_tiny_matrices_stay_finite_and_bounded(scale: float, method: PolarMethod):
    got = polar(random_stack(2, 6, 4) * scale, method)
    assert torch.isfinite(got).all()
    assert torch.linalg.matrix_norm(got, 2).max() < 1.2


def test_matrices_below_the_floor_are_not_blown_up():
    # As in torch.optim.Muon: what divides is at least 1e-7, so this goes in with norm 1e-13.
    x = random_stack(1, 6, 4)
    x = x / torch.linalg.vector_norm(x)
    got = polar(x * 1e-20)
    assert torch.linalg.vector_norm(got) < 1e-9
    assert relative_error(got, x * 1e-13 * 3.4445**5) < 1e-5


@pytest.mark.parametrize("method", PolarMethod)
@pytest.mark.parametrize("k", [1, 2])
def test_the_input_is_left_as_it_was(method: PolarMethod, k: int):
    x = random_stack(k, 5, 4)
    before = x.clone()
    polar(x, method)
    assert torch.equal(x, before)


# Cost


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_declared_flops_are_those_done(k: int, shape: Tuple[int, int], steps: int):
    x = random_stack(k, *shape)
    with FlopCounterMode(display=False) as counter:
        polar(x, steps=steps)
    assert newton_schulz_flops(*shape, steps=steps) * k == counter.get_total_flops()
