"""
What is SOAP's alone.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.optim import OptimGroupOverride

from olmo_optim_ext import Soap, SoapConfig
from olmo_optim_ext.engine.exchange import assign_owners
from olmo_optim_ext.linalg import eigenbasis as eigenbasis_module
from olmo_optim_ext.matrix.soap import EIGVECS, EXP_AVG, FAILURES, UPDATES, rotate_back

from .case import MATRICES, MixedShapes, grads_at, relative_error, train, weights
from .models import LargeShapes, StackShapes
from .soap_cases import SOAP, package_soap


def run(config: SoapConfig, model: nn.Module, steps: int) -> Dict[str, torch.Tensor]:
    train(model, config.build(model), 0, steps)
    return weights(model)


FIELDS: Dict[str, Any] = dict(
    lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, precondition_frequency=3
)


def test_a_stack_and_a_vector_are_what_the_package_makes_of_each_matrix():
    as_matrix = OptimGroupOverride(["stack.weight"], {"role": "matrix"})
    # Before 7 gradients the Gram matrix of the vector has a null space.
    fields = {**FIELDS, "precondition_frequency": 10}
    config = SoapConfig(**fields, precondition_1d=True, group_overrides=[as_matrix])
    model, start = StackShapes(), weights(StackShapes())
    got = run(config, model, 50)

    def parts(of: Dict[str, torch.Tensor]) -> List[torch.Tensor]:
        stack = of["stack.weight"].reshape(3, 7, 4)
        return [of["square"], *stack, of["gain"].reshape(7)]

    params = [nn.Parameter(part.clone()) for part in parts(start)]
    package_soap(
        params,
        lambda step: parts(grads_at(step, StackShapes())),
        50,
        0.95,
        precondition_1d=True,
        **fields,
    )
    names = ["square", "first", "second", "third", "gain"]
    expected = {name: param.detach() for name, param in zip(names, params)}
    error = relative_error(dict(zip(names, parts(got))), expected, dict(zip(names, parts(start))))
    assert error < 5e-6


@pytest.mark.parametrize("frequency", [1, 10])
def test_squares_are_what_the_package_makes_of_them_untouched(frequency: int):
    """Their first Gram matrix has full rank, so that its eigenvectors are no matter of rounding."""
    model = nn.Linear(24, 24, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))
    start = weights(model)
    fields = {**FIELDS, "precondition_frequency": frequency}
    param = nn.Parameter(start["weight"].clone())
    package_soap(
        [param],
        lambda step: [grads_at(step, model)["weight"]],
        50,
        0.95,
        same_first_basis=False,
        **fields,
    )
    got = run(SoapConfig(**fields), model, 50)
    assert relative_error(got, {"weight": param.detach()}, start) < 1e-4


def test_blocks_are_matrices_of_their_own():
    whole = nn.Linear(7, 5, bias=False)
    parts = [nn.Linear(n, m, bias=False) for m in (3, 2) for n in (3, 3, 1)]
    places = [(slice(r, r + 3), slice(c, c + 3)) for r in (0, 3) for c in (0, 3, 6)]
    config = SoapConfig(**FIELDS)
    # One with a single column is no matrix unless it is told to be.
    role = OptimGroupOverride(["*"], {"role": "matrix"})
    for part, place in zip(parts, places):
        part.weight.data.copy_(whole.weight.data[place])
    cut = replace(config, block_size=3).build(whole)
    own = [
        replace(config, group_overrides=[role]).build(part)
        for part in parts
        if 1 not in part.weight.shape
    ]
    for step in range(20):
        whole.weight.grad = grads_at(step, whole)["weight"]
        for part, place in zip(parts, places):
            part.weight.grad = whole.weight.grad[place].contiguous()
        for optim in (cut, *own):
            optim.step()
    for part, place in zip(parts, places):
        if 1 not in part.weight.shape:
            torch.testing.assert_close(whole.weight[place], part.weight)


def test_the_first_step_finds_the_basis_and_leaves_weights_alone():
    model = MixedShapes()
    start = weights(model)
    train(model, SoapConfig(**SOAP).build(model), 0, 1)
    for name, weight in weights(model).items():
        assert torch.equal(weight, start[name]) == (name in MATRICES), name


def test_a_change_of_basis_loses_nothing_of_the_momentum():
    model = nn.Linear(6, 4, bias=False)
    optim = SoapConfig(lr=0.01, betas=(0.8, 0.9), precondition_frequency=2).build(model)
    expected = torch.zeros(4, 6)
    for step in range(9):
        model.weight.grad = grads_at(step, model)["weight"]
        if step:
            expected = 0.8 * expected + 0.2 * model.weight.grad
        optim.step()
        state = optim.state[model.weight]
        bases = [state[name].view(1, n, n) for name, n in zip(EIGVECS, (4, 6))]
        momentum = rotate_back(state[EXP_AVG].view(1, 4, 6), bases)[0]
        torch.testing.assert_close(momentum, expected, rtol=0, atol=1e-6)


def refreshes(config: SoapConfig, n_matrices: int, steps: int) -> List[List[str]]:
    """The matrices whose basis changes in each step."""
    model = nn.ModuleList(nn.Linear(4 + i % 3, 4, bias=False) for i in range(n_matrices))
    optim = config.build(model)
    out = []
    for step in range(steps):
        before = {name: optim.state[p][EIGVECS[0]].clone() for name, p in model.named_parameters()}
        train(model, optim, step, step + 1)
        after = {name: optim.state[p][EIGVECS[0]] for name, p in model.named_parameters()}
        out.append([name for name in before if not torch.equal(before[name], after[name])])
    return out


def test_all_are_refreshed_in_the_steps_of_the_authors_code():
    found = refreshes(SoapConfig(precondition_frequency=4), 3, 10)
    assert [len(names) for names in found] == [3, 0, 0, 0, 3, 0, 0, 0, 3, 0]


def test_staggered_refreshes_are_spread_and_each_has_its_turn_once_a_period():
    n, frequency = 24, 4
    found = refreshes(SoapConfig(precondition_frequency=frequency, stagger=True), n, 13)
    assert len(found[0]) == n
    counts = [len(names) for names in found[1:]]
    assert max(counts) <= math.ceil(n / frequency) + 1 and min(counts) >= n // frequency - 1
    for first in (1, 5, 9):
        period = [name for names in found[first : first + frequency] for name in names]
        assert len(period) == len(set(period)) == n


@pytest.mark.parametrize("n_owners", [1, 2, 4, 8, 16])
def test_staggered_refreshes_cost_alike_on_each_owner(n_owners: int):
    """No step of an owner's costs much more than its share of a period and the dearest matrix."""
    with torch.device("meta"):
        model = LargeShapes(width=64, layers=24)
    optim = SoapConfig(precondition_frequency=10, stagger=True).build(model)
    matrices = optim.all_matrices()
    costs = [optim.cost(group, *shape) for group, shape in matrices.values()]
    work: Dict[int, List[float]] = {owner: [0.0] * 10 for owner in range(n_owners)}
    for name, cost, owner in zip(matrices, costs, assign_owners(costs, n_owners)):
        work[owner][int(optim._shift(name) * 10)] += cost
    for steps in work.values():
        assert max(steps) <= 1.5 * (sum(steps) / 10 + max(costs))


def test_a_vector_may_be_left_out():
    left_out = OptimGroupOverride(["norm.*"], {"role": "vector"})
    config = SoapConfig(precondition_1d=True, group_overrides=[left_out])
    followers = {name for name, layout in config.layouts(MixedShapes()).items() if layout.cols == 1}
    assert followers == {"square.bias", "few_rows.bias"}


def test_parameters_of_two_dtypes_may_share_a_group():
    model = nn.ModuleList([nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False).double()])
    optim = SoapConfig(precondition_frequency=2).build(model)
    for step in range(5):
        for param in model.parameters():
            param.grad = torch.ones_like(param) * (step + 1)
        optim.step()
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_refresh_in_a_skipped_step_is_made_in_the_next():
    runs = []
    for skips in (False, True):
        model = MixedShapes()
        optim = SoapConfig(**SOAP).build(model)
        for step in range(8):
            if skips and step in (0, 3):  # finding the basis, and a refresh
                train(model, optim, step, step)
                for key, grad in grads_at(step, model).items():
                    model.get_parameter(key).grad = grad * math.nan
                optim.step()
                assert optim.step_skipped == 1.0
            train(model, optim, step, step + 1)
        runs.append(weights(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_failed_refresh_keeps_the_basis_and_is_counted(monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(6, 4, bias=False)
    optim = SoapConfig(precondition_frequency=2).build(model)
    train(model, optim, 0, 2)
    state = optim.state[model.weight]
    before = state[EIGVECS[0]].clone()
    monkeypatch.setattr(eigenbasis_module, "orthonormal_columns", lambda x: x * math.nan)
    optim.ask_for_report()
    train(model, optim, 2, 3)
    assert torch.equal(state[EIGVECS[0]], before)
    (report,) = optim.take_report().values()
    assert float(report["failed refreshes"]) == 2 == float(state[FAILURES])  # one for each side
    assert all(x.isfinite().all() for x in state.values()) and model.weight.isfinite().all()
    monkeypatch.undo()
    optim.ask_for_report()
    train(model, optim, 3, 5)
    assert not torch.equal(state[EIGVECS[0]], before) and float(state[FAILURES]) == 2
    optim.ask_for_report()
    train(model, optim, 5, 6)
    (report,) = optim.take_report().values()
    assert float(report["failed refreshes"]) == 2 and float(report["update RMS"]) > 0


def test_eigenvectors_that_are_never_found_leave_the_identity(monkeypatch: pytest.MonkeyPatch):
    def fails(gram: torch.Tensor):
        raise torch.linalg.LinAlgError("does not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    model = nn.Linear(6, 4, bias=False)
    optim = SoapConfig(precondition_frequency=100).build(model)
    train(model, optim, 0, 5)
    state = optim.state[model.weight]
    assert torch.equal(state[EIGVECS[0]].view(4, 4), torch.eye(4))
    assert float(state[FAILURES]) == 2 and float(state[UPDATES]) == 5


def test_sides():
    def factors(n_out: int, n_in: int, **fields: Any) -> set:
        model = nn.Linear(n_in, n_out, bias=False)
        return {*SoapConfig(**fields).build(model).state[model.weight]} & {*EIGVECS}

    left, right = EIGVECS
    assert factors(4, 6) == {left, right}
    assert factors(4, 6, max_precond_dim=5) == {left}
    assert factors(4, 6, max_precond_dim=3) == set()
    assert factors(4, 6, one_sided=True) == {left}
    assert factors(6, 4, one_sided=True) == {right}
    assert factors(5, 5, one_sided=True) == {left}


@pytest.mark.parametrize(
    "fields,follow",
    [
        ({}, set()),
        ({"precondition_1d": True}, {"square.bias", "few_rows.bias", "norm.weight", "norm.bias"}),
        ({"precondition_embeddings": True}, {"embeddings.weight"}),
        ({"precondition_lm_head": True}, {"lm_head.weight"}),
    ],
)
def test_who_follows(fields: Dict[str, Any], follow: set):
    model = MixedShapes()
    optim = SoapConfig(**fields).build(model)
    found = {
        optim.name_of(param)
        for group in optim.param_groups
        if group["algorithm"] == Soap.algorithm
        for param in group["params"]
    }
    assert found == {*MATRICES, *follow}
    train(model, optim, 0, 3)
    assert all(torch.isfinite(weight).all() for weight in weights(model).values())


def test_adamw_has_its_own_hyperparameters():
    config = SoapConfig(betas=(0.7, 0.8), eps=1e-5, adamw_betas=(0.6, 0.9), adamw_eps=1e-7)
    for group in config.build(MixedShapes()).param_groups:
        soap = group["algorithm"] == Soap.algorithm
        assert group["betas"] == ((0.7, 0.8) if soap else (0.6, 0.9))
        assert group["eps"] == (1e-5 if soap else 1e-7)


def test_decay_comes_after_the_update():
    def end(**fields: Any) -> torch.Tensor:
        model = nn.Linear(6, 4, bias=False)
        model.weight.data.fill_(1.0)
        train(model, SoapConfig(lr=0.5, **fields).build(model), 0, 2)
        return model.weight.detach()

    torch.testing.assert_close(end(weight_decay=0.2), end(weight_decay=0.0) * (1 - 0.495 * 0.2))


def test_stacks_of_other_devices_have_one_phase():
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(6))
    optim = SoapConfig(precondition_frequency=3, stagger=True).build(model)
    train(model, optim, 0, 2)
    jobs: List[Any] = [
        SimpleNamespace(
            member=SimpleNamespace(param=param, grad=SimpleNamespace(device=torch.device("cuda"))),
            plan=optim._plans[param],
            group=optim.param_groups[0],
            work=SimpleNamespace(clock=torch.zeros(1)),
        )
        for param in model.parameters()
    ]
    stacks = optim._stacks([(job, 0) for job in jobs])
    phases = [{optim._phase_of(job, k) for job, k in stack} for stack in stacks]
    assert [len(stack) for stack in stacks] in ([2, 4], [4, 2])
    assert sorted(map(len, phases)) == [1, 1] and phases[0] != phases[1]
