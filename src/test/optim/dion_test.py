"""
What Dion promises beside the contracts.
"""

import math
from typing import Any, Tuple

import pytest
import torch
import torch.nn as nn

from olmo_optim_ext import DionConfig, Orthonormalization, OrthonormalSide

from .case import MixedShapes

SHAPES = [(12, 12), (20, 8), (8, 20)]
SIDES = list(OrthonormalSide)


def linear(n_out: int, n_in: int, seed: int = 0) -> nn.Linear:
    model = nn.Linear(n_in, n_out, bias=False)
    with torch.no_grad():
        model.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    return model


def gradient(shape: Tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values."""
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(n_out + n_in)
    u, _ = torch.linalg.qr(torch.randn(n_out, len(values), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(n_in, len(values), generator=generator))
    return (u * values) @ v.T


def moved(model: nn.Linear, optim: torch.optim.Optimizer, grad: torch.Tensor) -> torch.Tensor:
    """What a step subtracts, over lr and scale."""
    before = model.weight.detach().clone()
    model.weight.grad = grad.clone()
    optim.step()
    n_out, n_in = grad.shape
    scale = optim.param_groups[0]["lr"] * math.sqrt(n_out / n_in)
    return (before - model.weight.detach()) / scale


def build(model: nn.Module, **fields: Any) -> Any:
    return DionConfig(lr=1.0, weight_decay=0.0, momentum=0.8, **fields).build(model)


def flipped(side: OrthonormalSide, n_out: int, n_in: int) -> bool:
    return {"longer": n_out < n_in, "inputs": True, "outputs": False}[side]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_momentum_keeps_what_was_not_applied(shape, side):
    """``M = B - (1 - mu) P R^T`` with ``R = B^T P``, to float32 precision."""
    model = linear(*shape)
    optim = build(model, rank_fraction=0.5, orthonormal_side=side)
    state = optim.state[model.weight]
    for step in range(5):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        b = (state["momentum"] + grad).double()
        a = b.T if flipped(side, *shape) else b
        basis = state["basis"].view(a.shape[1], -1).double()
        p = torch.linalg.qr(a @ basis).Q
        expected = a - (1 - 0.8) * p @ (p.T @ a)
        moved(model, optim, grad)
        kept = state["momentum"].double()
        kept = kept.T if flipped(side, *shape) else kept
        assert torch.linalg.norm(kept - expected) < 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_the_update_becomes_the_polar_factor(shape, side):
    k = 8
    grad = gradient(shape, 1.6 ** -torch.arange(float(k)))
    model = linear(*shape)
    optim = build(model, orthonormal_side=side)
    for _ in range(60):
        update = moved(model, optim, grad)
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    captured = u[:, :k].T @ update.double() @ vh[:k].T
    torch.testing.assert_close(captured, torch.eye(k).double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_low_rank_it_follows_the_leading_singular_vectors(shape, side):
    grad = gradient(shape, 2.0 ** -torch.arange(8.0))
    model = linear(*shape)
    optim = build(model, rank_fraction=0.25, orthonormal_side=side)
    rank = optim.state[model.weight]["basis"].numel()
    rank //= shape[0] if flipped(side, *shape) else shape[1]
    assert rank == math.ceil(min(shape) / 4)
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    state = optim.state[model.weight]
    for _ in range(30):
        state["momentum"].zero_()  # or what is not applied piles up there until it leads
        update = moved(model, optim, grad)
    expected = u[:, :rank] @ vh[:rank]
    assert torch.linalg.norm(update.double() - expected) < 1e-4 * math.sqrt(rank)


@pytest.mark.parametrize("side", SIDES)
def test_a_zero_momentum_keeps_the_basis(side):
    model = linear(20, 8)
    optim = build(model, rank_fraction=0.5, orthonormal_side=side)
    before = optim.state[model.weight]["basis"].clone()
    assert (moved(model, optim, torch.zeros(20, 8)) == 0).all()
    assert torch.equal(optim.state[model.weight]["basis"], before)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (200, 200)])
def test_how_it_is_orthonormalised_changes_nothing(shape):
    """Large enough for a sketch."""

    def run(method: Orthonormalization) -> torch.Tensor:
        model = linear(*shape)
        optim = build(model, rank_fraction=0.5, orthonormalization=method)
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            moved(model, optim, torch.randn(shape, generator=generator))
        return model.weight.detach()

    start = linear(*shape).weight.detach()
    qr = run(Orthonormalization.qr)
    error = torch.linalg.norm(run(Orthonormalization.rcqr) - qr) / torch.linalg.norm(qr - start)
    assert error < 1e-5


def test_basis_and_sketch_depend_on_seed_and_name():
    def basis(seed: int, name: str) -> torch.Tensor:
        model = nn.ModuleDict({name: linear(20, 8)})
        optim = DionConfig(rank_fraction=0.5, seed=seed).build(model)
        return optim.state[next(iter(model.parameters()))]["basis"]

    assert torch.equal(basis(0, "a"), basis(0, "a"))
    assert not torch.equal(basis(0, "a"), basis(1, "a"))
    assert not torch.equal(basis(0, "a"), basis(0, "b"))


@pytest.mark.parametrize(
    "fraction,multiple_of,rank",
    [(0.25, 1, 5), (0.25, 4, 8), (0.1, 1, 2), (1.0, 7, 20), (0.9, 16, 20)],
)
def test_the_rank_is_rounded_up_and_never_above_the_smaller_side(fraction, multiple_of, rank):
    model = linear(30, 20)
    optim = build(model, rank_fraction=fraction, rank_multiple_of=multiple_of)
    assert optim.state[model.weight]["basis"].numel() == 20 * rank


def test_the_head_may_have_a_smaller_learning_rate():
    def lr_of(name: str, **fields: Any) -> float:
        model = MixedShapes()
        optim = DionConfig(scale_head_lr=True, **fields).build(model)
        param = model.get_parameter(name)
        return next(g["lr"] for g in optim.param_groups if any(p is param for p in g["params"]))

    assert lr_of("lm_head.weight") == pytest.approx(0.01 / math.sqrt(8))
    assert lr_of("lm_head.weight", adamw_lr=0.002) == pytest.approx(0.002 / math.sqrt(8))
    assert lr_of("embeddings.weight") == lr_of("square.weight") == 0.01


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e30])
def test_one_gradient_of_any_size_costs_no_later_step(scale):
    """Squares of float32 overflow at 1e19, and vanish at 1e-23."""
    grads = [torch.randn(20, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    usual = torch.linalg.norm(
        moved(model := linear(20, 8), build(model, rank_fraction=0.5), grads[0])
    )
    model = linear(20, 8)
    optim = build(model, rank_fraction=0.5, skip_step=False)
    update = moved(model, optim, grads[0] * scale)
    assert torch.linalg.norm(update) < 1.01 * usual
    optim.state[model.weight]["momentum"].zero_()
    for grad in grads[1:]:
        update = moved(model, optim, grad)
    assert torch.linalg.norm(update) == pytest.approx(float(usual), rel=1e-3)


def test_directions_that_the_momentum_does_not_have_are_not_taken():
    """At full rank, with momentum of rank 3: the rest of ``R`` is rounding."""
    grad = gradient((40, 30), torch.ones(3))
    model = linear(40, 30)
    update = moved(model, build(model), grad)
    values = torch.linalg.svdvals(update.double())
    assert (values[3:] < 1e-5).all() and values[0] > 0.5


def test_what_is_not_finite_shows():
    model = linear(20, 8)
    optim = build(model, skip_step=False)
    moved(model, optim, torch.full((20, 8), math.nan))
    assert model.weight.isnan().all()


def test_meshes_test_sketches(monkeypatch):
    """The variant for them is large enough."""
    from olmo_optim_ext.linalg import orthonormal

    from .models import SketchShapes

    shapes = []
    cholesky = orthonormal._cholesky

    def noting(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        shapes.append(y.shape)
        return cholesky(y, order)

    monkeypatch.setattr(orthonormal, "_cholesky", noting)
    model = SketchShapes()
    optim = DionConfig(rank_fraction=0.5).build(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optim.step()
    assert shapes == [(1, 151, 4), (1, 160, 3)]
