from typing import Dict, List, Tuple

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from olmo_optim_ext.linalg import polar as polar_module
from olmo_optim_ext.linalg.polar import (
    PolarForm,
    PolarMethod,
    cubic_steps,
    newton_schulz_flops,
    polar,
    uses_gram_form,
)

from ..optim.memory import peak_bytes

SHAPES = [(9, 4), (4, 9), (6, 6), (5, 6), (6, 5), (2, 30), (1, 5), (5, 1)]

SPECTRA = {
    "log": torch.logspace(0, -6, 12).tolist(),
    "one large": [1.0] + [1e-3] * 11,
    "rank 1": [1.0],
    "rank 6": [1.0] * 6,
}

ITERATIVE = [method for method in PolarMethod if method != PolarMethod.svd]

POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]

POLYNOMIALS: Dict[PolarMethod, List[Tuple[float, float, float]]] = {
    PolarMethod.newton_schulz: 10 * [(3.4445, -4.7750, 2.0315)],
    PolarMethod.newton_schulz_tuned: [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
    ]
    + 6 * [(2.8366, -3.0525, 1.2012)],
    PolarMethod.polar_express: [
        (a / 1.01, b / 1.0303010, c / 1.0510100501) for a, b, c in POLAR_EXPRESS
    ]
    + 3 * [(1.875, -1.25, 0.375)],
    PolarMethod.cubic: 10 * [(1.5, -0.5, 0.0)],
}
"""``(a, b, c)`` of ``a s + b s^3 + c s^5`` in each of ten steps."""

FORMS = ["plain", "gram"]


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


def scalar_steps(
    x: torch.Tensor, steps: int, method: PolarMethod = PolarMethod.newton_schulz
) -> torch.Tensor:
    """
    The iteration as the scalar one that each singular value goes through. It knows no rounding:
    all else of the iteration leaves singular vectors as they are.
    """
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    if method == PolarMethod.polar_express:
        s = s / 1.01
    for a, b, c in POLYNOMIALS[method][:steps]:
        s = a * s + b * s**3 + c * s**5
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
        assert relative_error(factor, scalar_steps(matrix, steps)) < 1e-5


@pytest.mark.parametrize("form", PolarForm)
@pytest.mark.parametrize("steps", [1, 3, 5, 7, 10])
@pytest.mark.parametrize("method", ITERATIVE)
def test_each_method_in_float64_is_its_polynomials_on_singular_values(
    method: PolarMethod, steps: int, form: PolarForm
):
    for shape in ((6, 8), (4, 9), (9, 4)):
        x = random_stack(2, *shape, torch.float64)
        for matrix, factor in zip(x, polar(x, method, steps, form=form)):
            assert relative_error(factor, scalar_steps(matrix, steps, method)) < 1e-12


# Rounding of a direction with little signal grows by the slope at zero in each step, 500 to 1000
# times in five.
@pytest.mark.parametrize("form", [PolarForm.plain, PolarForm.gram])
@pytest.mark.parametrize("shape", [(12, 16), (12, 24), (96, 12)], ids=str)
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("method", ITERATIVE)
def test_nearly_singular_matrices(
    method: PolarMethod, values: List[float], shape: Tuple[int, int], form: PolarForm
):
    x = with_singular_values(*shape, values)
    expected = scalar_steps(x, 5, method)
    assert relative_error(polar(x.float().unsqueeze(0), method, form=form)[0], expected) < 1e-4
    assert relative_error(polar(x.unsqueeze(0), method, form=form)[0], expected) < 1e-12


@pytest.mark.parametrize("method,steps", [("polar_express", 8), ("cubic", 20)])
@pytest.mark.parametrize("values", [SPECTRA["one large"], SPECTRA["rank 6"]], ids=str)
def test_many_steps_in_gram_form_stay_as_exact(method: str, steps: int, values: List[float]):
    x = with_singular_values(12, 24, values).float().unsqueeze(0)
    plain, gram = (polar(x, PolarMethod(method), steps, form=PolarForm(f)) for f in FORMS)
    assert relative_error(gram, plain) < 2e-4


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
    y, _, top, _ = polar_module._normalise(x, margin=1.0, tall=True)
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
@pytest.mark.parametrize("form", PolarForm)
@pytest.mark.parametrize("k", [1, 2])
def test_the_input_is_left_as_it_was(method: PolarMethod, form: PolarForm, k: int):
    x = random_stack(k, 5, 4)
    before = x.clone()
    polar(x, method, form=form)
    assert torch.equal(x, before)


# Methods


def bands(method: PolarMethod, steps: int) -> Tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 512, generator=generator)
    values = torch.linalg.svdvals(polar(x, method, steps)[0].double())
    return float(values.min()), float(values.max())


@pytest.mark.parametrize(
    "method,steps,low,high",
    [
        ("newton_schulz", 5, 0.68, 1.14),
        ("newton_schulz_tuned", 5, 0.97, 1.04),
        ("polar_express", 5, 0.86, 1.13),
        ("polar_express", 8, 1 - 1e-5, 1 + 1e-5),
        ("cubic", 12, 1 - 1e-5, 1 + 1e-5),
    ],
)
def test_singular_values_of_a_random_matrix_end_in_the_known_band(
    method: str, steps: int, low: float, high: float
):
    got = bands(PolarMethod(method), steps)
    assert low < got[0] and got[1] < high
    # And reach near both ends of it.
    width = high - low
    assert got[0] < low + 0.2 * width or width < 1e-4
    assert got[1] > high - 0.2 * width or width < 1e-4


@pytest.mark.parametrize("method,steps", [("polar_express", 8), ("svd", 5)])
@pytest.mark.parametrize("shape", [(20, 12), (12, 60), (12, 12)], ids=str)
def test_exact_methods_give_the_polar_factor_of_an_ill_conditioned_matrix(
    shape: Tuple[int, int], method: str, steps: int
):
    x = with_singular_values(*shape, torch.logspace(0, -3, 12, dtype=torch.float64).tolist())
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = polar(x.unsqueeze(0), PolarMethod(method), steps)[0]
    assert relative_error(got, u @ vh) < 1e-9
    values = torch.linalg.svdvals(polar(x.float().unsqueeze(0), PolarMethod(method), steps)[0])
    assert (values - 1).abs().max() < 2e-5


def test_polar_express_is_best_on_its_interval():
    # The best polynomial of an interval deviates as far to both sides (section 3.2 of the paper).
    coefficients = polar_module.COEFFICIENTS[PolarMethod.polar_express]
    s = torch.linspace(1e-3, 1, 500_001, dtype=torch.float64)
    deviations = []
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
        assert float(1 - s.min()) == pytest.approx(float(s.max() - 1), abs=1e-9)
        deviations.append(float((s - 1).abs().max()))
    # As the paper's table of their composition goes down: ever faster.
    ratios = [after / before for before, after in zip(deviations[:7], deviations[1:7])]
    assert ratios == sorted(ratios, reverse=True)
    assert deviations[4] < 0.13 and deviations[5] < 1.3e-3 and deviations[6] < 1.1e-9


def test_polar_express_leaves_room_for_rounding():
    # The composed polynomials grow beyond 1.02, so rounding must not push the largest value there.
    x = with_singular_values(4, 9, [1.0])
    one_step = polar(x.unsqueeze(0), PolarMethod.polar_express, 1)[0]
    s = 1 / 1.01**2
    expected = sum(k * s**p for k, p in zip(POLAR_EXPRESS[0], (1, 3, 5)))
    assert torch.linalg.matrix_norm(one_step, 2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)], ids=str)
def test_three_cubic_steps_are_the_cubic_three_times(shape: Tuple[int, int]):
    x = random_stack(2, *shape, torch.float64)
    for matrix, got in zip(x, cubic_steps(x, 3)):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        s = s / torch.linalg.vector_norm(matrix)
        for _ in range(3):
            s = 1.5 * s - 0.5 * s**3
        assert relative_error(got, u @ torch.diag(s) @ vh) < 1e-12


def test_cubic_steps_converge_where_the_bare_iteration_diverges():
    x = with_singular_values(6, 6, [2.3, 1.0, 0.5, 0.4, 0.3, 0.2])
    y = x
    for _ in range(8):
        y = 1.5 * y - 0.5 * y @ y.T @ y
    assert not torch.linalg.vector_norm(y) < 1e6
    values = torch.linalg.svdvals(cubic_steps(x.unsqueeze(0), 20)[0])
    assert (values - 1).abs().max() < 1e-9


def test_no_cubic_step_normalises():
    x = random_stack(2, 5, 7)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    assert relative_error(cubic_steps(x, 0), x / norm) < 1e-6
    assert torch.equal(cubic_steps(torch.zeros(1, 3, 4), 3), torch.zeros(1, 3, 4))


# Forms


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_are_the_same_iteration(shape: Tuple[int, int], k: int, method: PolarMethod):
    x = random_stack(k, *shape, torch.float64)
    plain, gram = (polar(x, method, form=PolarForm(form)) for form in FORMS)
    assert relative_error(gram, plain) < 1e-12
    plain, gram = (polar(x.float(), method, form=PolarForm(form)) for form in FORMS)
    assert relative_error(gram, plain) < 2e-5


@pytest.mark.parametrize("method", ITERATIVE)
def test_both_forms_agree_in_float32_on_large_random_matrices(method: PolarMethod):
    x = random_stack(1, 96, 256)
    plain, gram = (polar(x, method, form=PolarForm(form)) for form in FORMS)
    assert relative_error(gram, plain) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("method", ITERATIVE)
def test_in_half_precision_the_gram_form_is_as_exact_as_the_plain_one(
    method: PolarMethod, values: List[float], dtype: torch.dtype
):
    x = with_singular_values(24, 64, values).to(dtype)
    plain, gram = (
        relative_error(
            polar(x.unsqueeze(0), method, form=PolarForm(form))[0], scalar_steps(x, 5, method)
        )
        for form in FORMS
    )
    assert gram < 2 * plain + 2 * torch.finfo(dtype).eps


def test_in_bfloat16_the_gram_form_stays_stable_for_many_steps():
    for cols in range(20, 60):
        x = with_singular_values(12, cols, torch.logspace(0, -3, 12).tolist()).bfloat16()
        got = polar(x.unsqueeze(0), steps=10, form=PolarForm.gram)[0]
        assert relative_error(got, scalar_steps(x, 10)) < 0.4


@pytest.mark.parametrize("scale", [1e-2, 1.0, 6e4])
def test_the_gram_form_does_not_leave_the_range_of_float16(scale: float):
    x = random_stack(1, 16, 400).sign() * scale
    got = polar(x, dtype=torch.float16, form=PolarForm.gram)
    assert relative_error(got, polar(x)) < 5e-3


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 9), (5, 6)], ids=str)
def test_the_transpose_gives_the_transpose(shape: Tuple[int, int], form: str, method: PolarMethod):
    x = random_stack(2, *shape, torch.float64)
    got = polar(x.mT, method, form=PolarForm(form))
    assert relative_error(got.mT, polar(x, method, form=PolarForm(form))) < 1e-12
    assert got.is_contiguous()


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("form", PolarForm)
def test_a_stack_gives_what_its_matrices_give_in_each_form(method: PolarMethod, form: PolarForm):
    x = random_stack(3, 9, 4)
    stacked = polar(x, method, form=form)
    for i in range(3):
        assert relative_error(stacked[i], polar(x[i : i + 1], method, form=form)[0]) < 1e-5


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 5, 9])
@pytest.mark.parametrize(
    "shape,gram",
    [((6, 6), False), ((4, 6), False), ((6, 4), False), ((4, 7), True), ((7, 4), True)],
    ids=str,
)
def test_the_gram_form_is_used_beyond_an_aspect_ratio_of_one_and_a_half(
    shape: Tuple[int, int], gram: bool, steps: int, dtype: torch.dtype, method: PolarMethod
):
    assert uses_gram_form(*shape, steps, dtype, method) == gram
    assert uses_gram_form(*shape, steps, dtype, method, PolarForm.gram)
    assert not uses_gram_form(*shape, steps, dtype, method, PolarForm.plain)


def test_one_step_has_no_gram_form_to_gain_from():
    assert not uses_gram_form(4, 400, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_plain_unless_asked(dtype: torch.dtype):
    assert not uses_gram_form(4, 400, 5, dtype)
    x = random_stack(1, 4, 32, dtype)
    assert torch.equal(polar(x), polar(x, form=PolarForm.plain))
    assert not torch.equal(polar(x), polar(x, form=PolarForm.gram))


def test_no_form_changes_what_is_exact():
    x = random_stack(2, 4, 9)
    for form in PolarForm:
        assert not uses_gram_form(4, 9, 5, torch.float32, PolarMethod.svd, form)
        assert torch.equal(polar(x, PolarMethod.svd, form=form), polar(x, PolarMethod.svd))


# Cost


def flops_done(
    x: torch.Tensor,
    steps: int,
    method: PolarMethod = PolarMethod.newton_schulz,
    form: PolarForm = PolarForm.auto,
) -> int:
    with FlopCounterMode(display=False) as counter:
        polar(x, method, steps, form=form)
    return counter.get_total_flops()


@pytest.mark.parametrize("form", PolarForm)
@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("k", [1, 3])
def test_declared_flops_are_those_done(k: int, steps: int, method: PolarMethod, form: PolarForm):
    for shape in SHAPES:
        done = flops_done(random_stack(k, *shape), steps, method, form)
        assert newton_schulz_flops(*shape, steps, method, form) * k == done


def test_flops_are_those_of_the_better_form():
    m, n = 512, 2048
    assert newton_schulz_flops(m, n) == newton_schulz_flops(n, m) == 8 * m * m * n + 28 * m**3
    assert newton_schulz_flops(m, n, 3) == 8 * m * m * n + 12 * m**3
    assert newton_schulz_flops(m, n, 6) == 12 * m * m * n + 30 * m**3
    assert newton_schulz_flops(m, m) == 5 * (4 * m**3 + 2 * m**3)
    assert newton_schulz_flops(m, m, method=PolarMethod.cubic) == 5 * 4 * m**3
    assert newton_schulz_flops(m, n, method=PolarMethod.cubic) == 4 * m * m * n + 24 * m**3
    for steps in range(1, 10):
        for method in ITERATIVE:
            auto, plain, gram = (newton_schulz_flops(m, n, steps, method, f) for f in PolarForm)
            assert auto == min(plain, gram)
    # In bfloat16 plain, or with more restarts.
    x = random_stack(1, 4, 9, torch.bfloat16)
    assert flops_done(x, 5) == 5 * (4 * 16 * 9 + 2 * 64)
    assert flops_done(x, 5, form=PolarForm.gram) == 12 * 16 * 9 + 22 * 64


def test_exact_costs_more_than_a_few_steps():
    for shape in ((64, 64), (64, 512), (512, 64)):
        assert newton_schulz_flops(*shape, method=PolarMethod.svd) > newton_schulz_flops(*shape, 2)


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
def test_the_gram_form_holds_old_and_new_iterate_or_four_factors(
    shape: Tuple[int, int],
):
    m, n = min(shape), max(shape)
    most = max(2 * m * n + m * m, m * n + 4 * m * m)
    assert peak_of(random_stack(1, *shape)) <= 4 * most + 99


@pytest.mark.parametrize("shape", [(64, 128), (512, 64)], ids=str)
def test_the_gram_form_without_restart_holds_one_iterate(shape: Tuple[int, int]):
    m, n = min(shape), max(shape)
    x = random_stack(1, *shape)
    polar(x, steps=2)
    assert peak_bytes(lambda: polar(x, steps=2)) <= 4 * max(m * n + m * m, 4 * m * m) + 99
