import pytest
import torch

from olmo_optim_ext.linalg.eigenbasis import eigenbasis, gram_average, power_step


def grams(n: int = 6, seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, n, 2 * n, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


def off_diagonal(basis: torch.Tensor, gram: torch.Tensor) -> float:
    rotated = basis @ gram @ basis.mT
    return float((rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).abs().max())


def test_the_eigenbasis_diagonalises_from_the_largest_down():
    gram = grams()
    basis, found = eigenbasis(gram)
    assert found.all()
    assert off_diagonal(basis, gram) < 1e-4
    values = (basis @ gram @ basis.mT).diagonal(dim1=-2, dim2=-1)
    assert (values.diff(dim=-1) < 0).all()
    torch.testing.assert_close(values.flip(-1), torch.linalg.eigvalsh(gram))


def test_power_steps_from_any_basis_find_it_in_order():
    gram = grams()
    start = torch.linalg.qr(torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(5))).Q
    basis = start
    for _ in range(300):
        basis, order, found = power_step(gram, basis)
        assert found.all()
    assert off_diagonal(basis, gram) < 1e-3 * float(gram.abs().max()) < off_diagonal(start, gram)
    expected, _ = eigenbasis(gram)
    torch.testing.assert_close((basis * expected).sum(-1).abs(), torch.ones(2, 6))
    assert torch.equal(order, torch.arange(6).expand(2, 6))


def test_the_order_says_where_vectors_came_from():
    gram = torch.diag_embed(torch.tensor([[3.0, 1.0, 2.0]]))
    basis, order, _ = power_step(gram, torch.eye(3).unsqueeze(0))
    assert order.tolist() == [[0, 2, 1]]
    assert torch.equal(basis[0].abs(), torch.eye(3)[[0, 2, 1]])


def test_what_is_not_found_in_float32_is_found_in_float64(monkeypatch: pytest.MonkeyPatch):
    original, asked = torch.linalg.eigh, []

    def fails_in_float32(gram: torch.Tensor):
        asked.append(gram.dtype)
        if gram.dtype == torch.float32:
            raise torch.linalg.LinAlgError("does not converge")
        return original(gram)

    expected, _ = eigenbasis(grams())
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    basis, found = eigenbasis(grams())
    assert found.all() and basis.dtype == torch.float32
    torch.testing.assert_close((basis * expected).sum(-1).abs(), torch.ones(2, 6))
    asked.clear()
    basis, found = eigenbasis(grams(), float64_on_failure=False)
    assert asked == [torch.float32] * 2
    assert not found.any() and torch.equal(basis, torch.eye(6).expand(2, 6, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_keeps_its_basis_alone(bad: float):
    gram, old = grams(), eigenbasis(grams(seed=1))[0]
    gram[1, 2, 3] = gram[1, 3, 2] = bad
    expected = power_step(gram[:1], old[:1])[0]
    basis, order, found = power_step(gram, old)
    assert found.tolist() == [True, False]
    torch.testing.assert_close(basis[0], expected[0])
    assert torch.equal(basis[1], old[1]) and torch.equal(order[1], torch.arange(6))
    assert eigenbasis(gram)[1].tolist() == [True, False]


def test_an_average_of_grams():
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        gram_average(grams(), x, 0.9), 0.9 * grams() + 0.1 * x @ x.mT, rtol=1e-6, atol=1e-6
    )
