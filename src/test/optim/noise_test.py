"""
Properties of Muon with noise and of NOLAH that the contracts do not know.
"""

import copy
import math
from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pytest
import torch
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.optim import OptimGroupOverride

from olmo_optim_ext import (
    AlphaAnnealing,
    GradientGate,
    MuonIsotropicConfig,
    MuonNolahConfig,
    MuonOrthoNoiseConfig,
    PolarMethod,
)
from olmo_optim_ext.engine.matrix import Owned
from olmo_optim_ext.linalg.polar import cubic_steps, newton_schulz_flops
from olmo_optim_ext.linalg.spectrum import effective_rank_of, lanczos, lanczos_flops
from olmo_optim_ext.matrix import muon_orthonoise
from olmo_optim_ext.matrix.muon_nolah import gated
from olmo_optim_ext.matrix.muon_orthonoise import orthonormal_factor
from olmo_optim_ext.matrix.noise import PROBES, STEPS, alpha_at

from .case import MixedShapes, grads_at, train, weights
from .noise_cases import ALWAYS, CASES, TRIGGERED, effective_rank

NOISY = ("muon_orthonoise", "muon_isotropic")


def noisy_config(name: str, **fields: Any) -> Any:
    return replace(CASES[name].config, **fields)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    left = torch.linalg.qr(draw(rows, len(values), seed=1).double()).Q
    right = torch.linalg.qr(draw(cols, len(values), seed=2).double()).Q
    return ((left * values) @ right.T).float()


def equal(a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


# What the noise is


@pytest.mark.parametrize("shape", [(3, 9, 4), (2, 4, 9), (1, 6, 6), (1, 1, 5)])
def test_orthonormal_noise_is_orthonormal_and_its_triangle_positive(shape):
    z = draw(*shape)
    q = orthonormal_factor(z)
    tall, of = (q, z) if shape[1] >= shape[2] else (q.mT, z.mT)
    eye = torch.eye(tall.shape[-1]).expand(shape[0], -1, -1)
    torch.testing.assert_close(tall.mT @ tall, eye, atol=1e-6, rtol=0)
    r = tall.mT @ of
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(r.tril(-1), torch.zeros_like(r), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_the_control_has_the_norm_of_orthonormal_noise(shape):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))

    z = draw(2, *shape)
    norms = []
    for config in (MuonOrthoNoiseConfig(), MuonIsotropicConfig()):
        norms.append(torch.linalg.matrix_norm(config.build(Two()).directions(z)))
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(norms[0], torch.full((2,), 2.0))


def test_raw_cubic_steps_diverge_and_normalised_ones_do_not():
    x = with_spectrum(torch.linspace(2.5, 6.0, 8), 20, 8)  # all beyond sqrt(5)
    y, norms = x, []
    for _ in range(3):
        y = 1.5 * y - 0.5 * y @ y.mT @ y
        norms.append(torch.linalg.matrix_norm(y, 2).item())
    assert norms[0] > 2 * 6 and norms[1] > 100 * norms[0] and norms[2] > 1e6 * norms[1]
    values = torch.linalg.svdvals(cubic_steps(x.unsqueeze(0), 3))
    assert values.max() <= 1 + 1e-6 and values.min() > 0.5


@pytest.mark.parametrize("kind", list(AlphaAnnealing))
def test_the_strength_is_annealed_and_then_stays(kind):
    group = dict(alpha=1e-2, alpha_end=1e-3, annealing=str(kind), anneal_steps=1000)
    middle = {"none": 1e-2, "linear": 5.5e-3, "exponential": 10**-2.5}[kind]
    end = 1e-2 if kind == AlphaAnnealing.none else 1e-3
    assert alpha_at(group, 0) == 1e-2
    assert math.isclose(alpha_at(group, 500), middle)
    assert math.isclose(alpha_at(group, 1000), end) and math.isclose(alpha_at(group, 9999), end)


def owned_by(optim: Any, x: torch.Tensor, call: int = 5, phase: bool = True) -> Owned:
    k = len(x)
    group = optim.param_groups[0]
    shapes = optim.factor_shapes(group, *x.shape[1:])
    return Owned(
        x,
        {name: torch.zeros(k, *shape) for name, shape in shapes.items()},
        torch.full((k,), float(call)),
        call,
        tuple(f"w{i}" for i in range(k)),
        torch.arange(1.0, k + 1, dtype=torch.float64).unsqueeze(-1),
        phase,
    )


def noise_of(optim: Any, owned: Owned) -> torch.Tensor:
    return optim._noise(optim.param_groups[0], owned)


def test_noise_follows_from_seed_step_and_name():
    model = nn.Linear(6, 4, bias=False)
    optim = MuonOrthoNoiseConfig(rank_threshold=None).build(model)
    other = MuonOrthoNoiseConfig(rank_threshold=None, seed=1).build(model)
    zeros = torch.zeros(2, 4, 6)
    here = noise_of(optim, owned_by(optim, zeros))
    norm = torch.tensor([1.0, 2.0]).sqrt() * alpha_at(optim.param_groups[0], 4) * 2
    torch.testing.assert_close(torch.linalg.matrix_norm(here), norm)
    assert torch.equal(here, noise_of(optim, owned_by(optim, zeros)))
    directions = [
        noise[i] / torch.linalg.matrix_norm(noise[i])
        for noise in (
            here,
            noise_of(optim, owned_by(optim, zeros, call=6)),
            noise_of(other, owned_by(other, zeros)),
        )
        for i in (0, 1)
    ]
    for i, first in enumerate(directions):
        for second in directions[:i]:
            assert (first - second).norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_drawn_and_factorised_in_float32(dtype, monkeypatch):
    seen: List[torch.dtype] = []
    qr = torch.linalg.qr

    def noting(z: torch.Tensor) -> Any:
        seen.append(z.dtype)
        return qr(z)

    model = nn.Linear(6, 4, bias=False).to(dtype)
    config = MuonOrthoNoiseConfig(rank_threshold=None, polar_dtype=DType.bfloat16)
    optim = config.build(model)
    monkeypatch.setattr(muon_orthonoise.torch.linalg, "qr", noting)
    model.weight.grad = draw(4, 6).to(dtype)
    optim.step()
    assert seen == [torch.float32] and model.weight.isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e15])
@pytest.mark.parametrize("name", NOISY)
def test_noise_from_the_first_step_keeps_updates_bounded(name, scale):
    config = noisy_config(name, start_step=0, alpha=1.0, alpha_end=1.0, persist_noise=True)
    model = MixedShapes()
    optim = config.build(model)
    start = weights(model)
    for step in range(5):
        train(model, optim, step, step + 1, scale)
    for key, weight in weights(model).items():
        assert (weight - start[key]).abs().max() < 25 * 0.01, key


# When there is noise


def low_rank_grads(model: nn.Module, step: int) -> None:
    """Of rank one for ``tall``; of others as ever."""
    grads = grads_at(step, model)
    grads["tall.weight"] = grads["tall.weight"][:, :1] * grads["tall.weight"][:1]
    for key, param in model.named_parameters():
        param.grad = grads[key]


def fired(optim: Any, model: nn.Module, name: str) -> float:
    return optim.state[model.get_parameter(name)]["fired"].item()


def test_low_rank_counts_from_the_step_after_it_was_measured():
    model = MixedShapes()
    optim = MuonOrthoNoiseConfig(rank_interval=3).build(model)
    counts, measured = [], []
    before = optim.state[model.tall.weight]["spectrum"].clone()
    for step in range(8):
        if step < 5:
            low_rank_grads(model, 0)
        else:
            train(model, optim, step, step + 1, 100.0)  # of full rank from here on
        if step < 5:
            optim.step()
        counts.append(fired(optim, model, "tall.weight"))
        now = optim.state[model.tall.weight]["spectrum"].clone()
        measured.append(not torch.equal(now, before))
        before = now
    assert counts == [0, 1, 2, 3, 4, 5, 6, 6]
    assert measured[0] and measured[6] and not any(measured[i] for i in (1, 2, 4, 5, 7))
    assert fired(optim, model, "wide.weight") == 0


def test_steps_without_noise_pay_for_none(monkeypatch):
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step without noise drew some")

    model = MixedShapes()
    optim = MuonOrthoNoiseConfig(rank_threshold=0.01).build(model)
    monkeypatch.setattr(muon_orthonoise, "orthonormal_factor", forbidden)
    train(model, optim, 0, 3)
    late = MuonOrthoNoiseConfig(rank_threshold=None, start_step=3).build(model)
    train(model, late, 0, 3)
    with pytest.raises(AssertionError, match="drew some"):
        train(model, late, 3, 4)


@pytest.mark.parametrize("rows,cols", [(96, 96), (256, 256), (160, 640), (640, 160)])
def test_the_measure_agrees_with_the_exact_effective_rank(rows, cols):
    short = min(rows, cols)
    i = torch.arange(1.0, short + 1)
    spectra = [i**-p for p in (0.3, 0.6, 0.8, 1.0, 1.5)]
    spectra += [torch.exp(-c * i / short) for c in (2.0, 4.0, 6.0)]
    spectra += [torch.where(i <= short * share, 1.0, 1e-4) for share in (0.1, 0.45, 0.55)]
    for values in spectra:
        x = with_spectrum(values.double(), rows, cols).unsqueeze(0)
        probes = torch.where(draw(1, short, PROBES) > 0, 1.0, -1.0)
        got = effective_rank_of(lanczos(x, probes, STEPS).numpy())[0] / short
        assert abs(got - effective_rank(x[0].double().numpy()) / short) < 0.03


def test_measuring_costs_less_than_orthogonalising():
    for rows, cols in ((512, 2048), (1024, 1024), (2048, 512), (4096, 4096)):
        assert lanczos_flops(rows, cols, PROBES, STEPS) < newton_schulz_flops(rows, cols) / 2


def test_what_is_not_finite_gives_no_noise():
    model = nn.Linear(6, 4, bias=False)
    optim = MuonOrthoNoiseConfig(skip_step=False, rank_interval=1).build(model)
    for value in (math.nan, 1.0):
        model.weight.grad = torch.full((4, 6), value)
        optim.step()
    assert optim.state[model.weight]["fired"] == 0


def low_rank_and_others() -> Tuple[torch.Tensor, np.ndarray]:
    """Three matrices, the second of rank one, and their spectra."""
    x = torch.stack([draw(4, 6), draw(4, 1) @ draw(1, 6, seed=3), draw(4, 6, seed=4)])
    return x, lanczos(x, torch.ones(3, 4, PROBES).tril(), STEPS).numpy()


def test_each_matrix_decides_for_itself():
    optim = MuonOrthoNoiseConfig(start_step=3).build(nn.Linear(6, 4, bias=False))
    _, spectra = low_rank_and_others()

    def phases(call: int) -> List[bool]:
        group = {**optim.param_groups[0], "calls": call}
        return [
            optim.phase(group, f"w{i}", (4, 6), {"spectrum": each})
            for i, each in enumerate(spectra)
        ]

    assert phases(11) == [False, True, False]
    assert phases(3) == [False] * 3


@pytest.mark.parametrize("phase", [False, True])
def test_a_stack_is_what_each_of_it_is_alone(phase: bool):
    model = nn.Linear(6, 4, bias=False)
    config = MuonOrthoNoiseConfig(polar_method=PolarMethod.svd, persist_noise=True, alpha=0.3)
    optim = config.build(model)
    x, _ = low_rank_and_others()
    owned = owned_by(optim, x, call=11, phase=phase)
    owned.factors["noise"].copy_(draw(3, 4, 6, seed=5))
    group = optim.param_groups[0]
    updates, factors = optim.on_owner(group, owned)
    assert ("fired" in factors) == phase
    for i in range(3):
        alone = Owned(
            x[i : i + 1],
            {name: factor[i : i + 1] for name, factor in owned.factors.items()},
            owned.step[i : i + 1],
            owned.call,
            owned.names[i : i + 1],
            owned.numbers[i : i + 1] if owned.numbers is not None else None,
            phase,
        )
        update, its = optim.on_owner(group, alone)
        torch.testing.assert_close(updates[i : i + 1], update, atol=1e-5, rtol=0)
        for name in factors:
            torch.testing.assert_close(factors[name][i : i + 1], its[name])


# State


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("at", [10, 11, 12])  # a step after measuring, and between
def test_a_resume_continues_decisions_and_noise(name, at):
    config = noisy_config(name, **TRIGGERED, persist_noise=True)
    model = MixedShapes()
    optim = config.build(model)
    train(model, optim, 0, at)
    other = MixedShapes(seed=1)
    other_optim = config.build(other)
    train(other, other_optim, 0, 2)
    other.load_state_dict(model.state_dict())
    other_optim.load_state_dict(optim.state_dict())
    twin, twin_optim = copy.deepcopy((model, optim))
    before = {key: fired(optim, model, key) for key in ("square.weight", "tall.weight")}
    for m, o in ((model, optim), (other, other_optim), (twin, twin_optim)):
        train(m, o, at, 20)
    assert equal(weights(model), weights(other)) and equal(weights(model), weights(twin))
    assert all(fired(optim, model, key) > count for key, count in before.items())


@pytest.mark.parametrize("name", NOISY)
def test_a_bad_batch_leaves_noise_and_decisions_alone(name):
    config = noisy_config(name, **TRIGGERED, persist_noise=True)
    model = MixedShapes()
    optim = config.build(model)
    train(model, optim, 0, 9)
    state = copy.deepcopy(optim.state_dict()["state"])
    before = weights(model)
    for key, grad in grads_at(9, model).items():
        model.get_parameter(key).grad = grad
    bad = model.get_parameter("tall.weight").grad
    assert bad is not None
    bad[0, 0] = math.nan
    optim.step()
    assert equal(weights(model), before)
    for index, saved in optim.state_dict()["state"].items():
        assert equal(saved, state[index])


def test_persistent_noise_costs_one_float_an_element():
    model = MixedShapes()
    optim = noisy_config("muon_orthonoise", persist_noise=True).build(model)
    assert optim.state[model.tall.weight]["noise"].numel() == model.tall.weight.numel()
    assert "spectrum" not in optim.state[model.tall.weight]
    without = CASES["muon_orthonoise"].config.build(MixedShapes())
    assert all("noise" not in state for state in without.state.values())


@pytest.mark.parametrize("name", NOISY)
def test_a_step_with_the_trigger_never_waits_for_the_device(name, monkeypatch):
    def forbidden(self, *args, **kwargs):
        raise AssertionError("host-device sync")

    model = MixedShapes()
    optim = noisy_config(name, **TRIGGERED, persist_noise=True).build(model)
    train(model, optim, 0, 1)
    methods = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__")
    for step in range(1, 8):
        for key, grad in grads_at(step, model).items():
            model.get_parameter(key).grad = grad
        optim.ask_for_report()
        with monkeypatch.context() as patched:
            for method in (*methods, "__index__", "__array__", "__contains__"):
                patched.setattr(torch.Tensor, method, forbidden)
            optim.step()
    assert fired(optim, model, "square.weight") > 0


def test_a_report_tells_how_strong_the_noise_was_and_how_often_there_was_some():
    model = MixedShapes()
    config = MuonOrthoNoiseConfig(rank_interval=1, alpha=0.1, annealing=AlphaAnnealing.none)
    optim = config.build(model)
    for step in range(3):
        low_rank_grads(model, step)
        grad = model.get_parameter("tall.weight").grad
        assert grad is not None
        norm = grad.norm()
        optim.ask_for_report()
        optim.step()
        report = optim.take_report()
        expected = 0.1 * norm.item() if step else 0.0
        assert report["tall.weight"]["noise scale"].item() == pytest.approx(expected)
        assert report["tall.weight"]["noise fired"].item() == step
        assert report["wide.weight"]["noise scale"].item() == 0
        assert report["wide.weight"]["noise fired"].item() == 0


def test_groups_may_have_noise_of_their_own():
    override = OptimGroupOverride(["tall.*"], {"start_step": 2, "persist_noise": True})
    model = MixedShapes()
    config = MuonOrthoNoiseConfig(rank_threshold=None, group_overrides=[override])
    optim = config.build(model)
    train(model, optim, 0, 5)
    assert fired(optim, model, "tall.weight") == 3 and fired(optim, model, "wide.weight") == 5
    assert optim.state[model.tall.weight]["noise"].norm() > 0


def test_noise_that_persists_is_as_if_in_the_momentum():
    """With a gradient that vanishes after one step, the noise decays as momentum does."""
    model = nn.Linear(6, 4, bias=False)
    config = MuonIsotropicConfig(rank_threshold=None, persist_noise=True, skip_step=False)
    optim = config.build(model)
    model.weight.grad = draw(4, 6)
    optim.step()
    first = optim.state[model.weight]["noise"].clone()
    model.weight.grad = torch.zeros(4, 6)
    optim.step()
    torch.testing.assert_close(optim.state[model.weight]["noise"], first * 0.95)


# NOLAH


@pytest.mark.parametrize("gate", ["tanh", "sigmoid", "relu", "none"])
def test_gates(gate):
    expected = {
        "tanh": [-4 * math.tanh(4), 0.0, 1e-3 * math.tanh(1e-3), math.tanh(1)],
        "sigmoid": [-4 / (1 + math.e**4), 0.0, 1e-3 / (1 + math.e**-1e-3), 1 / (1 + math.e**-1)],
        "relu": [0.0, 0.0, 1e-3, 1.0],
        "none": [-4.0, 0.0, 1e-3, 1.0],
    }
    got = gated(torch.tensor([-4.0, 0.0, 1e-3, 1.0], dtype=torch.float64), gate)
    torch.testing.assert_close(got, torch.tensor(expected[gate], dtype=torch.float64))


def test_each_block_has_a_percentile_of_its_own():
    """Blocks of one parameter and parameters of their own are the same."""
    whole, first, second = (nn.Linear(8, rows, bias=False) for rows in (10, 4, 6))
    with torch.no_grad():
        first.weight.copy_(whole.weight[:4])
        second.weight.copy_(whole.weight[4:])
    blocks = OptimGroupOverride(["weight"], {"row_blocks": [4, 6]})
    config = MuonNolahConfig(scale=0.3)
    models = [(whole, config.replace(group_overrides=[blocks])), (first, config), (second, config)]
    optims = [fields.build(model) for model, fields in models]
    for step in range(4):
        grad = draw(10, 8, seed=step) * torch.logspace(0, 2, 10)[:, None]
        for (model, _), its in zip(models, (grad, grad[:4], grad[4:])):
            model.weight.grad = its.clone()
        for optim in optims:
            optim.step()
    apart = torch.cat([first.weight, second.weight])
    torch.testing.assert_close(whole.weight, apart)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_percentile_is_compared_in_float32(dtype):
    """In all dtypes the same number of elements is above it, and none of those equal to it."""
    config = MuonNolahConfig(gate=GradientGate.none, scale=0.0, projection=False, nesterov=False)
    model = nn.Linear(7, 3, bias=False).to(dtype)  # place 19 of 20 is an element
    optim = config.build(model)
    model.weight.grad = (torch.arange(1, 22, dtype=torch.float64) / 3).view(3, 7).to(dtype)
    optim.step()
    momentum = optim.state[model.weight]["momentum"]
    assert (momentum == 0).nonzero().tolist() == [[2, 6]]


def test_what_is_off_is_not_measured(monkeypatch):
    def forbidden(*args: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr("olmo_optim_ext.matrix.muon_nolah.quantile_of_magnitudes", forbidden)
    model = MixedShapes()
    train(model, MuonNolahConfig(scale=1.0).build(model), 0, 2)
    with pytest.raises(AssertionError, match="measured"):
        train(model, MuonNolahConfig().build(model), 0, 1)


def test_small_gradients_give_whole_updates():
    """The gate squares them, and then they are below the floor of the iteration's norm."""
    sizes: List[Optional[float]] = []
    for scale in (1.0, 1e-6):
        model = nn.Linear(16, 12, bias=False)
        before = model.weight.detach().clone()
        optim = MuonNolahConfig(weight_decay=0.0, projection=False).build(model)
        model.weight.grad = draw(12, 16) * scale
        optim.step()
        sizes.append((model.weight - before).norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


def test_the_projection_keeps_nothing_of_large_negative_momentum():
    """Why it is off where the contracts want small problems to be solved."""
    moved = []
    for value in (-50.0, 0.0, 50.0):
        model = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(model.weight)
        optim = MuonNolahConfig(weight_decay=0.0, gate=GradientGate.none, scale=1.0).build(model)
        model.weight.grad = torch.tensor([[value, 1.0, -1.0], [0.5, -0.3, 0.2]])
        optim.step()
        moved.append(model.weight.detach().clone())
    torch.testing.assert_close(moved[0], moved[1])
    assert (moved[2] - moved[1]).norm() > 1e-3


def test_always_means_from_the_start_step_on():
    model = MixedShapes()
    optim = MuonOrthoNoiseConfig(**ALWAYS).build(model)
    train(model, optim, 0, 6)
    assert fired(optim, model, "tall.weight") == 2
