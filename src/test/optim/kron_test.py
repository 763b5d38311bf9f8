"""
What is Kron's alone.
"""

import math
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from olmo_core.optim import OptimGroupOverride

from olmo_optim_ext import Kron, KronConfig, KronFit, MemorySaveMode, SoapConfig, TrustRegion
from olmo_optim_ext.matrix.kron import FACTORS, UpdateSchedule, clipped, sides

from .case import MATRICES, MixedShapes, grads_at, relative_error, train, weights
from .kron_cases import KRON, PRO, SCHEDULE, package_kron
from .models import StackShapes


def test_the_schedule_is_the_counter_of_the_package_and_a_function_of_the_call_alone():
    settings = (1.0, 0.03, 0.01, 50)
    waited, expected = 0, []
    for n in range(1000):
        probability = max(0.03, min(1.0, math.exp(-0.01 * (n - 50))))
        waited += 1
        expected.append(waited >= 1 / probability)
        waited = 0 if expected[-1] else waited
    assert all(expected[:50]) and sum(expected[900:]) == 3
    schedule = UpdateSchedule(*settings)
    assert [schedule.is_due(n + 1) for n in range(1000)] == expected
    for call in (700, 3, 51, 999, 52):
        assert schedule.is_due(call) == expected[call - 1]
        assert UpdateSchedule(*settings).is_due(call) == expected[call - 1]


@pytest.mark.parametrize("update", KronFit)
def test_factors_move_in_the_calls_of_the_schedule_only(update: KronFit):
    model = nn.Linear(6, 4, bias=False)
    optim = KronConfig(**SCHEDULE, update=update).build(model)
    schedule = UpdateSchedule(1.0, *SCHEDULE.values())
    moved = []
    for step in range(30):
        before = optim.state[model.weight][FACTORS[0]].clone()
        train(model, optim, step, step + 1)
        moved.append(not torch.equal(optim.state[model.weight][FACTORS[0]], before))
    assert moved == [schedule.is_due(step + 1) for step in range(30)]
    assert 0 < sum(moved) < 30


def test_a_stack_a_vector_and_merged_dimensions_are_what_the_package_makes_of_each():
    as_matrix = OptimGroupOverride(["stack.weight", "merged.weight"], {"role": "matrix"})
    fields: Dict[str, Any] = dict(lr=0.01, momentum=0.9, weight_decay=0.1)
    config = KronConfig(
        **fields, balance_prob=0.0, precondition_1d=True, group_overrides=[as_matrix]
    )
    model, start = StackShapes(), weights(StackShapes())
    names = ["square", *(f"stack.weight[{i}]" for i in range(3)), "gain", "merged.weight"]

    def parts(of: Dict[str, torch.Tensor]) -> List[torch.Tensor]:
        stack = of["stack.weight"].reshape(3, 7, 4)
        # (18, 16) is squarer than (6, 48).
        return [of["square"], *stack, of["gain"].view(7), of["merged.weight"].reshape(18, 16)]

    params = [nn.Parameter(part.clone()) for part in parts(start)]
    train(model, config.build(model), 0, 50)
    package_kron(
        names,
        params,
        lambda step: parts(grads_at(step, StackShapes())),
        50,
        leaks=False,
        balance_prob=0.0,
        pre_conditioner_update_probability=1.0,
        **fields,
    )
    expected = {name: param.detach() for name, param in zip(names, params)}
    got = dict(zip(names, parts(weights(model))))
    assert relative_error(got, expected, dict(zip(names, parts(start)))) < 1e-5


def test_which_factors_are_diagonal():
    def kinds(n_out: int, n_in: int, **fields: Any) -> Dict[int, bool]:
        model = nn.Linear(n_in, n_out, bias=False)
        return sides(KronConfig(**fields).build(model).param_groups[0], n_out, n_in)

    triangular, diagonal = False, True
    assert kinds(4, 6) == {0: triangular, 1: triangular}
    assert kinds(4, 6, max_size_triangular=5) == {0: triangular, 1: diagonal}
    assert kinds(4, 6, min_ndim_triangular=3) == {0: diagonal, 1: diagonal}
    one, smart = MemorySaveMode.one_diag, MemorySaveMode.smart_one_diag
    assert kinds(6, 4, memory_save_mode=one) == {0: diagonal, 1: triangular}
    assert kinds(5, 5, memory_save_mode=one) == {0: triangular, 1: diagonal}
    assert kinds(4, 6, memory_save_mode=smart) == {0: triangular, 1: diagonal}
    assert kinds(5, 5, memory_save_mode=smart) == {0: triangular, 1: triangular}
    assert kinds(5, 6, memory_save_mode=MemorySaveMode.all_diag) == {0: diagonal, 1: diagonal}


def test_triangular_factors_stay_triangular():
    model = nn.Linear(6, 4, bias=False)
    optim = KronConfig().build(model)
    train(model, optim, 0, 20)
    for name, n in zip(FACTORS, (4, 6)):
        q = optim.state[model.weight][name].view(n, n)
        assert torch.equal(q, q.triu()) and q.triu(1).any()


def condition_number(config: KronConfig, steps: int) -> float:
    """
    Of the covariance of preconditioned gradients, which at first is 1000; momentum is off, and the
    fit gets slower at the end.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator)).Q * torch.logspace(0, -0.75, n)
        for n in (8, 6)
    )
    model = nn.Linear(6, 8, bias=False)
    optim = config.build(model)
    for step in range(steps):
        if step == steps // 2:
            for group in optim.param_groups:
                group["precond_lr"] = 0.01
        model.weight.grad = left @ torch.randn(8, 6, generator=generator) @ right.T
        optim.step()
    state = optim.state[model.weight]
    q_left, q_right = (state[name].view(n, n).double() for name, n in zip(FACTORS, (8, 6)))
    covariance = torch.kron((left @ left.T).double(), (right @ right.T).double())
    p = torch.kron(q_left.T @ q_left, q_right.T @ q_right)
    assert torch.linalg.cond(covariance) > 900
    return float(torch.linalg.cond(p @ covariance @ p))


@pytest.mark.parametrize("update", KronFit)
def test_gradients_are_whitened(update: KronFit):
    config = KronConfig(lr=0.0, momentum=0.0, update=update, precond_update_prob_min=1.0)
    assert condition_number(config, 2000) < 10


def test_the_fit_without_division_is_the_formula_over_a_run():
    """In float64, from the maths of psgd_torch, for the update that both give."""
    model = nn.Linear(6, 4, bias=False)
    start = weights(model)
    grads = [grads_at(step, model)["weight"].double() for step in range(30)]
    config = KronConfig(
        lr=0.01, momentum=0.0, update=KronFit.pro, precond_update_prob_min=1.0, balance_prob=0.0
    )
    optim = config.build(model)
    w = start["weight"].double()
    q = [torch.eye(n).double() for n in (4, 6)]
    bound = [0.0, 0.0]
    for grad in grads:
        model.weight.grad = grad.float()
        optim.step()
        h = q[0].T @ q[0] @ grad @ q[1].T @ q[1]
        for side, moment in enumerate((h @ h.T, h.T @ h)):
            target = 24 / len(moment)
            least = lower_bound(moment) + target
            bound[side] = max(0.9 * bound[side] + 0.1 * least, least)
            q[side] = q[side] - 0.1 / bound[side] * (moment @ q[side] - target * q[side])
            q[side] = rotated(q[side])
        update = q[0].T @ q[0] @ grad @ q[1].T @ q[1]
        rms = update.square().mean().sqrt()
        w = w - 0.01 * update * min(1.0, 1.1 / float(rms))
    # The damping of the fit, of 3e-4, is not in the formula.
    assert relative_error(weights(model), {"weight": w}, start) < 1e-3


def lower_bound(a: torch.Tensor) -> float:
    j = int((a * a).sum(0).argmax())
    x = a @ a[:, j]
    return float((a @ (x / x.norm())).norm())


def rotated(q: torch.Tensor) -> torch.Tensor:
    r = q.T - q
    if r.norm() > 0:
        r = r / lower_bound(r.T @ r) ** 0.5
    slope, curvature = float((r @ q).trace()), float((r @ r @ q).trace())
    a = min(-slope / curvature, 1 / 8) if curvature < 0 else 1 / 8
    return q + a * (r @ q) + a * a / 2 * (r @ r @ q)


def test_trust_regions():
    x = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1, 1)

    def rms(x: torch.Tensor) -> float:
        return float(x.square().mean().sqrt())

    for region in TrustRegion:
        torch.testing.assert_close(clipped(x, one / 2, region), x / 2)
    large = 50 * x
    assert rms(clipped(x, 50 * one, TrustRegion.rms)) == pytest.approx(1.1, rel=1e-4)
    assert torch.equal(clipped(large, one, TrustRegion.none), large)
    assert rms(clipped(large, one, TrustRegion.amplitude)) == pytest.approx(2.0, rel=1e-4)
    large[0, 0, 0] = 1e6
    assert float(clipped(large, one, TrustRegion.amplitude).abs().max()) == 10.0


@pytest.mark.parametrize("update", KronFit)
def test_a_matrix_may_be_without_gradients_for_long(update: KronFit):
    """As a dead expert is: its momentum fades, its factors stay, and it comes back as it was."""
    model = nn.Linear(6, 4, bias=False)
    optim = KronConfig(update=update, precond_update_prob_min=1.0, balance_prob=0.0).build(model)

    def state() -> List[torch.Tensor]:
        return [optim.state[model.weight][name].clone() for name in FACTORS]

    train(model, optim, 0, 50)
    before = state()
    for _ in range(1500):
        model.weight.grad = torch.zeros(4, 6)
        optim.step()
    assert all(torch.equal(*pair) for pair in zip(before, state()))
    idle = model.weight.detach().clone()
    train(model, optim, 50, 51)
    assert 0 < float((model.weight - idle).abs().max()) < 5 * optim.param_groups[0]["lr"]


@pytest.mark.parametrize("region", TrustRegion)
def test_what_overflows_moves_nothing(region: TrustRegion):
    x = torch.full((2, 3, 4), 1e-3)
    x[1, 0, 0] = torch.inf
    got = clipped(x, torch.ones(1, 1, 1), region)
    assert torch.equal(got[0], x[0]) and not got[1].any()


def test_contradictions_are_refused():
    contradictions: List[Dict[str, Any]] = [
        {"precond_update_prob_max": 0.01},
        {"author_noise": True, "momentum_into_precond_update": False},
    ]
    for fields in contradictions:
        with pytest.raises(OLMoConfigurationError, match="allowed"):
            KronConfig(**fields).build(nn.Linear(3, 2, bias=False))
    schedule = UpdateSchedule(0.1, 0.1, 0.001, 500)
    assert [call for call in range(1, 40) if schedule.is_due(call)] == [10, 20, 30]


def test_a_stack_of_one_expert_stays_as_it_is():
    layer = DroplessMoEMLP(d_model=4, hidden_size=6, num_experts=1)
    assert KronConfig().layouts(layer) == SoapConfig().layouts(layer)


def test_vectors_have_no_decay_and_who_follows():
    model = MixedShapes()
    optim = KronConfig(**KRON, precondition_1d=True).build(model)
    found = {
        optim.name_of(param): group["weight_decay"]
        for group in optim.param_groups
        if group["algorithm"] == Kron.algorithm
        for param in group["params"]
    }
    vectors = {"square.bias", "few_rows.bias", "norm.weight", "norm.bias"}
    assert found == {**dict.fromkeys(MATRICES, 0.1), **dict.fromkeys(vectors, 0.0)}
    state = optim.state[model.norm.weight]
    assert state[FACTORS[0]].shape == (8,) and FACTORS[1] not in state


def test_the_initial_scale_is_that_of_both_factors():
    model = MixedShapes()
    optim = KronConfig(precond_init_scale=9.0, precondition_1d=True).build(model)
    assert float(optim.state[model.square.weight][FACTORS[0]].max()) == pytest.approx(3.0)
    assert float(optim.state[model.norm.weight][FACTORS[0]].max()) == pytest.approx(9.0)


def test_a_run_with_the_other_fit_learns():
    model = nn.Linear(6, 4, bias=False)
    target = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optim = PRO.replace(lr=0.05, weight_decay=0.0).build(model)
    for _ in range(300):
        model.weight.grad = model.weight.detach() - target
        optim.step()
    assert (model.weight - target).norm() < 0.1 * target.norm()
