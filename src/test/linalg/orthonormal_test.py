import math
from typing import List, Tuple

import pytest
import torch

from olmo_optim_ext.linalg import orthonormal as orthonormal_module
from olmo_optim_ext.linalg.orthonormal import Orthonormalization, orthonormalize

# The sketch has 128 rows for up to 102 columns, 256 for up to 204.
SHAPES = [(300, 40), (200, 102), (400, 150), (129, 1), (129, 102)]

SMALL = [(1, 1), (7, 1), (9, 4), (6, 6), (128, 20), (150, 150)]

SYNCHRONISING = [
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "nonzero",
    "numpy",
    "tolist",
]


def random_stack(k: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rows + cols)
    return torch.randn(k, rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def ill_conditioned(rows: int, cols: int, condition: float) -> torch.Tensor:
    left = torch.linalg.qr(random_stack(1, rows, cols, torch.float64)).Q
    right = torch.linalg.qr(random_stack(1, cols, cols, torch.float64)).Q
    return left * condition ** -torch.linspace(0, 1, cols, dtype=torch.float64) @ right


def generators(k: int, seed: int = 0) -> List[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(k)]


def rcqr(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return orthonormalize(x, generators=generators(x.shape[0], seed))


def deviation(q: torch.Tensor) -> float:
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


def left_out(q: torch.Tensor, x: torch.Tensor) -> float:
    """The part of ``x`` outside of the span of ``q``, relative to ``x``."""
    q, x = q.double(), x.double()
    return float(torch.linalg.vector_norm(x - q @ (q.mT @ x)) / torch.linalg.vector_norm(x))


def rounding(shape: Tuple[int, int], method: Orthonormalization) -> float:
    """
    How far from orthonormal rounding may leave the result: the square of the condition number that
    a Cholesky decomposition gets, which for a Gaussian sketch of ``k`` rows is
    ``(1 + sqrt(r / k)) / (1 - sqrt(r / k))``.
    """
    rows, cols = shape
    sketch, eps = math.ceil(1.25 * cols / 128) * 128, torch.finfo(torch.float32).eps
    householder = 2 * eps * math.sqrt(rows)
    if method == Orthonormalization.qr or sketch >= rows:
        return householder
    root = math.sqrt(cols / sketch)
    return max(householder, eps / 2 * ((1 + root) / (1 - root)) ** 2)


def span_difference(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(p @ p.mT - q @ q.mT, 2).max())


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES + SMALL, ids=str)
def test_columns_are_orthonormal_and_span_the_same(
    shape: Tuple[int, int], dtype: torch.dtype, method: Orthonormalization
):
    x = random_stack(2, *shape, dtype)
    before = x.clone()
    q = orthonormalize(x, method, generators(2))
    assert q.shape == x.shape and q.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert deviation(q) < tolerance and left_out(q, x) < tolerance
    assert torch.equal(x, before)


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", SHAPES + SMALL, ids=str)
def test_the_triangular_factor_has_a_positive_diagonal(
    shape: Tuple[int, int], method: Orthonormalization
):
    x = random_stack(2, *shape, torch.float64)
    r = orthonormalize(x, method, generators(2)).mT @ x
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert r.tril(-1).abs().max() < 1e-12 * r.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_methods_agree_in_float64(shape: Tuple[int, int]):
    x = random_stack(2, *shape, torch.float64)
    expected = orthonormalize(x, Orthonormalization.qr)
    torch.testing.assert_close(rcqr(x), expected, rtol=0, atol=1e-10)
    assert not torch.equal(rcqr(x), expected)


@pytest.mark.parametrize("shape", [(6, 4), (128, 20), (256, 200), (150, 150)], ids=str)
def test_matrices_no_larger_than_a_sketch_take_householder_qr(shape: Tuple[int, int]):
    x = random_stack(1, *shape)
    assert torch.equal(orthonormalize(x), orthonormalize(x, Orthonormalization.qr))


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e6, 1e7, 1e9])
@pytest.mark.parametrize("shape", [(300, 40), (400, 150), (129, 102)], ids=str)
def test_ill_conditioned(shape: Tuple[int, int], condition: float):
    x = ill_conditioned(*shape, condition)
    assert deviation(rcqr(x.float())) < 1e-5
    assert left_out(rcqr(x.float()), x) < 1e-5
    q = rcqr(x)
    assert deviation(q) < 1e-12
    if condition <= 1e7:
        assert span_difference(q, orthonormalize(x, Orthonormalization.qr)) < 1e-14 * condition


def test_every_column_above_rounding_is_kept():
    # 1e-5 is left of each column but the first, less of the last.
    x = ill_conditioned(300, 40, 1e5).float()
    expected = orthonormalize(x.double(), Orthonormalization.qr)
    assert span_difference(rcqr(x).double(), expected) < 3e-2


def deficient(name: str, rows: int, cols: int) -> torch.Tensor:
    x = random_stack(1, rows, cols)
    if name == "rank 1":
        return x[..., :1] @ x[:, :1]
    if name == "rank 7":
        return x[..., :7] @ x[:, :7]
    if name == "low rank and little noise":
        return x[..., :7] @ x[:, :7] + 1e-7 * x
    if name == "duplicates":
        x[..., 2:8] = x[..., 1:2]
    elif name == "multiples":
        x[..., 5] = -1e6 * x[..., 1]
    elif name == "zero columns":
        x[..., [0, 3, -1]] = 0
    elif name == "one element":
        x = torch.zeros_like(x)
        x[0, 4, 2] = -3
    elif name == "coordinates":
        x = torch.eye(rows, cols).unsqueeze(0)
        x[..., cols // 2 :] = 0
    elif name == "sums":
        x[..., 9] = x[..., :9].sum(-1)
    return x


DEFICIENT = [
    "rank 1",
    "rank 7",
    "low rank and little noise",
    "duplicates",
    "multiples",
    "zero columns",
    "one element",
    "coordinates",
    "sums",
]


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", [(300, 40), (400, 150), (129, 102), (50, 20)], ids=str)
@pytest.mark.parametrize("name", DEFICIENT)
def test_rank_deficient(name: str, shape: Tuple[int, int], method: Orthonormalization):
    x = deficient(name, *shape)
    q = orthonormalize(x, method, generators(1))
    assert deviation(q) < rounding(shape, method)
    assert left_out(q, x) < 1e-5


def test_a_dependent_column_disturbs_no_other():
    x = random_stack(1, 300, 40, torch.float64)
    expected = rcqr(torch.cat([x[..., :10], x[..., 11:]], -1))
    x[..., 10] = x[..., 3]
    got = rcqr(x)
    assert deviation(got) < 1e-13
    torch.testing.assert_close(
        torch.cat([got[..., :10], got[..., 11:]], -1), expected, rtol=0, atol=1e-12
    )


def test_what_a_nearly_dependent_column_hides_is_kept():
    # Rounding of column 5 points to column 6: without column 5's direction little is left of 6.
    x = random_stack(1, 300, 40)
    x[..., 5] = x[..., 4] + 2e-7 * x[..., 6]
    assert left_out(rcqr(x), x) < 1e-5


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", [(300, 40), (9, 4)], ids=str)
def test_zero_gives_zero_and_does_not_spoil_the_stack(
    shape: Tuple[int, int], method: Orthonormalization
):
    x = random_stack(3, *shape)
    x[1] = 0
    q = orthonormalize(x, method, generators(3))
    assert torch.equal(q[1], torch.zeros_like(q[1]))
    assert deviation(q[[0, 2]]) < 1e-5


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(300, 40), (9, 4)], ids=str)
def test_what_is_not_finite_gives_nan(
    shape: Tuple[int, int], value: float, method: Orthonormalization
):
    x = random_stack(3, *shape)
    x[1, 2, 3] = value
    q = orthonormalize(x, method, generators(3))
    assert q[1].isnan().all()
    assert deviation(q[[0, 2]]) < 1e-5


def test_what_is_not_orthonormal_gives_zero(monkeypatch):
    cholesky = orthonormal_module._cholesky

    def spoilt(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        q = cholesky(y, order)
        q[0, :, 7] = q[0, :, 8]
        q[1] *= 1.001
        return q

    monkeypatch.setattr(orthonormal_module, "_cholesky", spoilt)
    q = rcqr(random_stack(3, 300, 40))
    assert not q[:2].any() and deviation(q[2:]) < 1e-5


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", [(300, 40), (9, 4)], ids=str)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e-8, 1e15, 1e25, 1e37])
def test_the_scale_does_not_matter(
    scale: float, shape: Tuple[int, int], method: Orthonormalization
):
    x = random_stack(2, *shape)
    q = orthonormalize(x * scale, method, generators(2))
    assert deviation(q) < 1e-5
    if scale > 1e-40:  # else few bits are left
        expected = orthonormalize(x, method, generators(2))
        torch.testing.assert_close(q, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", [(300, 40), (9, 4)], ids=str)
def test_columns_may_differ_in_scale(shape: Tuple[int, int], method: Orthonormalization):
    x = random_stack(2, *shape)
    scales = 2.0 ** torch.linspace(-100, 100, shape[1]).round()
    expected = orthonormalize(x, method, generators(2))
    assert torch.equal(orthonormalize(x * scales, method, generators(2)), expected)


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", [(300, 40), (9, 4)], ids=str)
def test_a_stack_gives_what_its_matrices_give(shape: Tuple[int, int], method: Orthonormalization):
    x = random_stack(3, *shape, torch.float64)
    x[1, :, 2] = x[1, :, 0]
    stacked = orthonormalize(x, method, generators(3))
    for i, generator in enumerate(generators(3)):
        alone = orthonormalize(x[i : i + 1], method, [generator])
        torch.testing.assert_close(stacked[i : i + 1], alone, rtol=0, atol=1e-12)


def test_generators_decide_rounding_and_no_more():
    x = random_stack(2, 300, 40)
    assert torch.equal(rcqr(x), rcqr(x))
    assert not torch.equal(rcqr(x), rcqr(x, seed=5))
    torch.testing.assert_close(rcqr(x), rcqr(x, seed=5), rtol=0, atol=1e-5)
    state = torch.get_rng_state()
    rcqr(x)
    assert torch.equal(torch.get_rng_state(), state)
    orthonormalize(x)
    assert not torch.equal(torch.get_rng_state(), state)


def test_more_rows_in_the_sketch():
    x = random_stack(1, 600, 60)
    wide = orthonormalize(x, generators=generators(1), oversampling=6.0)
    assert not torch.equal(wide, rcqr(x))
    torch.testing.assert_close(wide, rcqr(x), rtol=0, atol=1e-5)


def test_the_sketch_makes_the_condition_number_small():
    x = ill_conditioned(400, 150, 1e4)
    sketch = orthonormal_module._sketch(x, 256, generators(1))
    fill = orthonormal_module._fill(x, generators(1))
    torch.testing.assert_close(sketch.std() * 16, torch.ones(()).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(fill.std() * 20, torch.ones(()).double(), rtol=0.02, atol=0)
    y, order = orthonormal_module._precondition(x, sketch, fill)
    assert torch.linalg.cond(y) < 10 and torch.equal(order[0], torch.arange(150))


@pytest.mark.parametrize("method", Orthonormalization)
@pytest.mark.parametrize("shape", [(300, 40), (9, 4)], ids=str)
def test_it_does_not_synchronise(shape: Tuple[int, int], method: Orthonormalization, monkeypatch):
    x = random_stack(3, *shape)
    x[1] = 0
    x[2, :, 2] = x[2, :, 1]

    def synchronise(*_: object, **__: object) -> None:
        raise AssertionError("host-device synchronisation")

    with monkeypatch.context() as patch:
        for name in SYNCHRONISING:
            patch.setattr(torch.Tensor, name, synchronise)
        orthonormalize(x, method, generators(3))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="4 rows have no 5"):
        orthonormalize(random_stack(1, 4, 5))
    with pytest.raises(ValueError, match="1 generators for 2 matrices"):
        orthonormalize(random_stack(2, 5, 4), generators=generators(1))
