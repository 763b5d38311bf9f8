import pytest
import torch

from olmo_optim_ext.linalg.norms import (
    ScionNorm,
    fill_extreme,
    normalised_columns,
    normalised_rows,
    spectral_scale,
)

SHAPES = [(6, 4), (4, 6), (5, 5)]


def norm_of(x: torch.Tensor, norm: str, n_in: int) -> float:
    """The norms of which the LMOs are extreme points, from the paper's operator norms."""
    n_out = x.shape[0]
    if norm == "spectral":
        return float(torch.linalg.matrix_norm(x, 2)) * (n_in / n_out) ** 0.5
    if norm == "sign":
        return float(x.abs().max()) * n_in
    if norm == "column":
        return float(x.norm(dim=0).max()) / n_out**0.5 * n_in
    return float(x.norm(dim=1).max()) * n_in**0.5


def lmo(d: torch.Tensor, norm: str, n_in: int) -> torch.Tensor:
    if norm == "spectral":
        u, _, vh = torch.linalg.svd(d, full_matrices=False)
        return spectral_scale(d.shape[0], n_in, False) * u @ vh
    if norm == "sign":
        return d.sign() / n_in
    return {"column": normalised_columns, "row": normalised_rows}[norm](d, n_in)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["spectral", "sign", "column", "row"])
def test_no_point_of_the_ball_has_a_larger_product(norm, shape):
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(shape, generator=generator, dtype=torch.float64)
    best = lmo(d, norm, shape[1])
    assert norm_of(best, norm, shape[1]) == pytest.approx(1, rel=1e-6)
    for i in range(200):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x if i % 2 else best + 0.1 * x
        x = x / norm_of(x, norm, shape[1])
        assert (d * x).sum() < (d * best).sum()


@pytest.mark.parametrize("normalised", [normalised_columns, normalised_rows])
def test_what_is_zero_stays_zero_in_any_stack(normalised):
    d = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    d[0] = 0
    d[1, 2] = 0
    d[2, :, 3] = 0
    out = normalised(d, 5)
    assert torch.isfinite(out).all()
    assert torch.equal(out == 0, d == 0)
    for i in range(3):
        assert torch.equal(out[i], normalised(d[i], 5))


def test_the_spectral_scale_of_wide_matrices_is_raised_to_one_if_asked():
    assert spectral_scale(4, 16, at_least_one=False) == 0.5
    assert spectral_scale(4, 16, at_least_one=True) == 1.0
    assert spectral_scale(16, 4, at_least_one=True) == 2.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_in", [None, 1, 3])
@pytest.mark.parametrize("norm", ["spectral", "sign", "column", "row"])
def test_random_extreme_points_are_on_the_border(norm, n_in, shape):
    def draw(seed: int) -> torch.Tensor:
        x = torch.empty(shape[::-1], dtype=torch.float64).mT  # not contiguous
        generator = torch.Generator().manual_seed(seed)
        fill_extreme(x, ScionNorm(norm), n_in, False, generator)
        return x

    x = draw(0)
    assert norm_of(x, norm, n_in or shape[1]) == pytest.approx(1, rel=1e-6)
    # An LMO maps what is extreme in all of its columns, rows or singular values to itself.
    assert torch.allclose(lmo(x, norm, n_in or shape[1]), x, atol=1e-7)
    assert torch.equal(x, draw(0)) and not torch.equal(x, draw(1))


def test_random_signs_are_balanced():
    x = torch.empty(100, 100)
    fill_extreme(x, ScionNorm.sign, 1, False, torch.Generator().manual_seed(0))
    assert set(x.unique().tolist()) == {-1.0, 1.0} and x.mean().abs() < 0.05
