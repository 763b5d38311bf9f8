import pytest
import torch

from olmo_optim_ext.linalg.structured import (
    orthonormal_columns,
    symmetric_product,
    upper_times,
    upper_times_upper,
)

SIZES = [1, 5, 128, 300, 1100]
"""One block, a few and all of them, of unlike sizes."""


def stack(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("m", SIZES)
def test_a_symmetric_product_is_the_product_and_symmetric(m: int):
    x, added = stack(m, 7), stack(m, m)
    added = added + added.mT
    torch.testing.assert_close(symmetric_product(x), x @ x.mT)
    got = symmetric_product(x, added, 0.9, 0.1)
    torch.testing.assert_close(got, 0.9 * added + 0.1 * x @ x.mT)
    torch.testing.assert_close(got, got.mT)
    torch.testing.assert_close(symmetric_product(x.mT), x.mT @ x)


@pytest.mark.parametrize("m", SIZES)
def test_products_with_triangles_are_the_products(m: int):
    q, x = stack(m, m).triu(), stack(m, 3)
    torch.testing.assert_close(upper_times(q, x), q @ x)
    torch.testing.assert_close(upper_times(q, x, transpose=True), q.mT @ x)
    a, added = stack(m, m).triu() + 1, stack(m, m).triu() - 2
    a, added = a.triu(), added.triu()
    got = upper_times_upper(a, q, added, -0.5)
    torch.testing.assert_close(got, added - 0.5 * a @ q)
    assert torch.equal(got, got.triu())


@pytest.mark.parametrize("m", [1, 6, 40])
def test_orthonormal_columns_span_what_the_columns_span(m: int):
    x = stack(m, m)
    q = orthonormal_columns(x)
    torch.testing.assert_close(q.mT @ q, torch.eye(m, dtype=q.dtype).expand(2, m, m))
    r = q.mT @ x
    torch.testing.assert_close(r, r.triu())
