from typing import List, Tuple

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from olmo_optim_ext import PolarMethod
from olmo_optim_ext.linalg import polar as polar_module
from olmo_optim_ext.linalg.polar import newton_schulz_flops, polar, uses_gram_form

from ..optim.memory import peak_bytes

SHAPES = [(9, 4), (4, 9), (6, 6), (5, 6), (6, 5), (2, 30), (1, 5), (5, 1)]

SPECTRA = {
    "log": torch.logspace(0, -6, 12).tolist(),
    "one large": [1.0] + [1e-3] * 11,
    "rank 1": [1.0],
    "rank 6": [1.0] * 6,
}


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


# Rounding of a direction with little signal grows by 3.4445 a step, that of its square by 3.4445^2.
@pytest.mark.parametrize(
    "shape,tolerance", [((12, 16), 1e-4), ((12, 24), 1e-3), ((96, 12), 1e-3)], ids=str
)
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_newton_schulz_on_nearly_singular_matrices(
    values: List[float], shape: Tuple[int, int], tolerance: float
):
    x = with_singular_values(*shape, values)
    assert relative_error(polar(x.float().unsqueeze(0))[0], quintic_steps(x, 5)) < tolerance
    assert relative_error(polar(x.unsqueeze(0))[0], quintic_steps(x, 5)) < 1e-11


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_a_stack_gives_what_its_matrices_give(
    shape: Tuple[int, int], dtype: torch.dtype, tolerance: float
):
    x = random_stack(4, *shape, dtype)
    stacked = polar(x)
    for i in range(4):
        assert relative_error(stacked[i], polar(x[i : i + 1])[0]) < tolerance


# Both round each product to 8 bits; small matrices average less.
@pytest.mark.parametrize(
    "shape,tolerance", [((9, 4), 4e-2), ((4, 9), 4e-2), ((6, 6), 4e-2), ((64, 48), 2e-2)], ids=str
)
def test_newton_schulz_agrees_with_torch_in_bfloat16(shape: Tuple[int, int], tolerance: float):
    x = random_stack(1, *shape)
    got = polar(x, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    expected = _zeropower_via_newtonschulz(x[0], (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert relative_error(got[0], expected) < tolerance


@pytest.mark.parametrize("shape", [(12, 6), (6, 12), (8, 8)], ids=str)
def test_newton_schulz_brings_singular_values_near_one(shape: Tuple[int, int]):
    x = with_singular_values(*shape, values=[2.0, 1.5, 1.0, 0.8, 0.5, 0.3])
    got = torch.linalg.svdvals(polar(x.float().unsqueeze(0))[0].double())[:6]
    assert 0.6 < got.min() and got.max() < 1.2
    # Not because they were near one before.
    start = torch.linalg.svdvals(x / torch.linalg.matrix_norm(x))[:6]
    assert start.min() < 0.15


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(6, 4), (9, 4), (4, 9)], ids=str)
def test_newton_schulz_does_not_depend_on_the_scale(shape: Tuple[int, int], scale: float):
    x = random_stack(2, *shape)
    assert relative_error(polar(x * scale), polar(x)) < 1e-5


@pytest.mark.parametrize("shape", [(6, 4), (9, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_power_of_two_changes_no_bit(shape: Tuple[int, int], dtype: torch.dtype):
    x = random_stack(2, *shape, dtype)
    assert torch.equal(polar(x * 2.0**20), polar(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalising_rounds_no_element_twice(dtype: torch.dtype):
    x = random_stack(2, 9, 4, dtype)
    y, _, top, _ = polar_module._normalise(x, tall=True)
    assert torch.equal(y * top.to(dtype), x) and 1 <= y.abs().max() < 2


@pytest.mark.parametrize("shape", [(6, 4), (9, 4)], ids=str)
def test_huge_negative_matrices_are_scaled_too(shape: Tuple[int, int]):
    x = -random_stack(2, *shape).abs()
    assert relative_error(polar(x * 1e25), polar(x)) < 1e-5


def test_each_matrix_of_a_stack_has_its_own_scale():
    x = random_stack(3, 9, 4)
    scales = torch.tensor([1e-5, 1.0, 1e25]).view(3, 1, 1)
    for got, expected in zip(polar(x * scales), polar(x)):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("method", PolarMethod)
@pytest.mark.parametrize("shape", [(6, 4), (9, 4)], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-8, 1e25, 1e37])
def test_huge_and_tiny_matrices_stay_finite_and_bounded(
    scale: float, shape: Tuple[int, int], method: PolarMethod
):
    got = polar(random_stack(2, *shape) * scale, method)
    assert torch.isfinite(got).all()
    assert torch.linalg.matrix_norm(got, 2).max() < 1.2


@pytest.mark.parametrize("shape", [(6, 4), (9, 4)], ids=str)
def test_the_largest_floats_stay_finite_and_bounded(shape: Tuple[int, int]):
    got = polar(random_stack(1, *shape).sign() * torch.finfo(torch.float32).max)
    assert torch.isfinite(got).all()
    assert torch.linalg.matrix_norm(got, 2).max() < 1.2


@pytest.mark.parametrize("shape", [(6, 4), (9, 4)], ids=str)
def test_matrices_below_the_floor_are_not_blown_up(shape: Tuple[int, int]):
    # As in torch.optim.Muon: what divides is at least 1e-7, so this goes in with norm 1e-13.
    x = random_stack(1, *shape)
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


# Forms


def run_form(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, gram: bool) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(polar_module, "uses_gram_form", lambda *_: gram)
        return polar(x)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_are_the_same_iteration(shape: Tuple[int, int], k: int, monkeypatch):
    x = random_stack(k, *shape, torch.float64)
    plain, gram = (run_form(monkeypatch, x, form) for form in (False, True))
    assert relative_error(gram, plain) < 1e-11
    plain, gram = (run_form(monkeypatch, x.float(), form) for form in (False, True))
    assert relative_error(gram, plain) < 2e-4


def test_both_forms_agree_in_float32_on_large_random_matrices(monkeypatch):
    x = random_stack(1, 96, 256)
    plain, gram = (run_form(monkeypatch, x, form) for form in (False, True))
    assert relative_error(gram, plain) < 1e-5


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (5, 6)], ids=str)
def test_the_transpose_gives_the_transpose(shape: Tuple[int, int], gram: bool, monkeypatch):
    x = random_stack(2, *shape, torch.float64)
    got = run_form(monkeypatch, x.mT, gram)
    assert relative_error(got.mT, run_form(monkeypatch, x, gram)) < 1e-12
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 5, 9])
@pytest.mark.parametrize(
    "shape,gram",
    [((6, 6), False), ((4, 6), False), ((6, 4), False), ((4, 7), True), ((7, 4), True)],
    ids=str,
)
def test_the_gram_form_is_used_beyond_an_aspect_ratio_of_one_and_a_half(
    shape: Tuple[int, int], gram: bool, steps: int, dtype: torch.dtype
):
    assert uses_gram_form(*shape, steps, dtype) == gram


def test_one_step_has_no_gram_form_to_gain_from():
    assert not uses_gram_form(4, 400, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_plain(dtype: torch.dtype, monkeypatch):
    assert not uses_gram_form(4, 400, 5, dtype)
    x = random_stack(1, 4, 32, dtype)
    assert torch.equal(polar(x), run_form(monkeypatch, x, gram=False))
    assert not torch.equal(polar(x), run_form(monkeypatch, x, gram=True))


# Cost


def flops_done(x: torch.Tensor, steps: int) -> int:
    with FlopCounterMode(display=False) as counter:
        polar(x, steps=steps)
    return counter.get_total_flops()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_declared_flops_are_those_done(k: int, shape: Tuple[int, int], steps: int):
    done = flops_done(random_stack(k, *shape), steps)
    assert newton_schulz_flops(*shape, steps=steps) * k == done


def test_flops_are_those_of_the_better_form():
    m, n = 512, 2048
    assert newton_schulz_flops(m, n) == newton_schulz_flops(n, m) == 4 * m * m * n + 34 * m**3
    assert newton_schulz_flops(m, m) == 5 * (4 * m**3 + 2 * m**3)
    assert flops_done(random_stack(1, 4, 9, torch.bfloat16), 5) == 5 * (4 * 16 * 9 + 2 * 64)


def peak_of(x: torch.Tensor) -> int:
    polar(x)
    peak = peak_bytes(lambda: polar(x))
    assert peak >= x.nbytes
    return peak


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)], ids=str)
def test_the_plain_form_holds_old_and_new_iterate_and_one_factor(shape: Tuple[int, int]):
    m, n = min(shape), max(shape)
    most = max(2 * m * n + m * m, m * n + 2 * m * m)
    assert peak_of(random_stack(1, *shape)) <= 4 * most + 99


@pytest.mark.parametrize("shape", [(64, 128), (512, 64)], ids=str)
def test_the_gram_form_holds_no_second_iterate(shape: Tuple[int, int]):
    m, n = min(shape), max(shape)
    assert peak_of(random_stack(1, *shape)) <= 4 * max(m * n + m * m, 4 * m * m) + 99
