"""
The contracts, for every catalogue name, and for wrappers around more than their default.
"""

import copy
import gc
import math
import pickle
from types import SimpleNamespace
from typing import Dict

import pytest
import torch
import torch.nn as nn
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimGroupOverride
from torch._dynamo.utils import counters

from olmo_optim_ext import (
    ScheduleFreeConfig,
    get_config_class,
    list_optimizers,
    optimizer_info,
)

from .case import STEPS, MixedShapes, equal, grads_at, relative_error, take_step, train, weights
from .cases import CASES
from .toys import ListState, TimesZero

NAMES = list(CASES)


def test_every_name_is_in_the_table():
    assert set(CASES) >= set(list_optimizers())
    for name in list_optimizers():
        assert isinstance(CASES[name].config, get_config_class(name))


def state_of(optim: torch.optim.Optimizer) -> Dict[str, torch.Tensor]:
    return {
        f"{index}.{key}": value.clone()
        for index, state in optim.state_dict()["state"].items()
        for key, value in state.items()
    }


# C1: parity with the source


@pytest.mark.parametrize(
    "name,index",
    [(name, index) for name in NAMES for index in range(len(CASES[name].oracles))],
)
def test_same_trajectory_as_the_oracle(name, index):
    config, oracle, tolerance = CASES[name].oracles[index]
    model = MixedShapes()
    start = weights(model)
    train(model, config.build(model), 0, 50)
    assert relative_error(weights(model), oracle(start, 50), start) < tolerance


@pytest.fixture(scope="module")
def reference():
    cache: Dict[str, Dict[str, torch.Tensor]] = {}

    def of(name: str) -> Dict[str, torch.Tensor]:
        if name not in cache:
            model = MixedShapes()
            train(model, CASES[name].config.build(model), 0, STEPS)
            cache[name] = weights(model)
        return cache[name]

    return of


# C3: a checkpoint never changes the run


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_saving_changes_nothing(name, flatten, tmp_path, reference):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    for step in (0, STEPS // 2):
        save_model_and_optim_state(
            tmp_path / str(step), model, optim, flatten_optimizer_state=flatten
        )
        train(model, optim, step, step + STEPS // 2)
    assert equal(weights(model), reference(name))


def test_state_that_is_made_late_fails(tmp_path):
    def run(save: bool) -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        optim = torch.optim.AdamW(model.parameters(), lr=0.01)
        if save:
            save_model_and_optim_state(tmp_path, model, optim, flatten_optimizer_state=True)
        train(model, optim, 0, 3)
        return weights(model)

    assert not equal(run(save=True), run(save=False))


def test_state_in_a_list_fails(tmp_path):
    model = MixedShapes()
    optim = ListState(model.named_parameters())
    with pytest.raises(Exception, match="(?i)list|unexpected|not supported|NotImplemented|type"):
        save_model_and_optim_state(tmp_path, model, optim, flatten_optimizer_state=True)


# C4: resume is the same run


@pytest.mark.parametrize("way", ["dcp_flat", "dcp_nested", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_the_same_run(name, way, tmp_path, reference):
    def build(seed: int):
        model = MixedShapes(seed)
        return model, CASES[name].config.build(model)

    flatten = way == "dcp_flat"
    model, optim = build(0)
    train(model, optim, 0, STEPS // 2)
    if way == "torch":
        torch.save([model.state_dict(), optim.state_dict()], tmp_path / "state.pt")
    else:
        save_model_and_optim_state(tmp_path / "s", model, optim, flatten_optimizer_state=flatten)

    resumed, resumed_optim = build(1)
    train(resumed, resumed_optim, 0, 3)  # what is loaded must replace all of this
    if way == "torch":
        model_state, optim_state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed.load_state_dict(model_state)
        resumed_optim.load_state_dict(optim_state)
    else:
        load_model_and_optim_state(
            tmp_path / "s", resumed, resumed_optim, flatten_optimizer_state=flatten
        )
    assert equal(state_of(resumed_optim), state_of(optim))
    assert resumed_optim.param_groups[0]["calls"] == STEPS // 2
    train(resumed, resumed_optim, STEPS // 2, STEPS)
    assert equal(weights(resumed), reference(name))


@pytest.mark.parametrize("name", NAMES)
def test_loaded_state_is_a_copy(name):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    train(model, optim, 0, 2)
    saved = optim.state_dict()
    other = MixedShapes()
    other_optim = CASES[name].config.build(other)
    other_optim.load_state_dict(saved)
    before = state_of(optim)
    train(other, other_optim, 2, 4)
    assert equal(state_of(optim), before)


@pytest.mark.parametrize("name", NAMES)
def test_state_of_a_bfloat16_model_is_not_rounded_to_it(name):
    model = MixedShapes().bfloat16()
    optim = CASES[name].config.build(model)
    for step in range(3):
        for key, grad in grads_at(step, model).items():
            model.get_parameter(key).grad = grad.bfloat16()
        take_step(optim)
    other = CASES[name].config.build(MixedShapes().bfloat16())
    other.load_state_dict(optim.state_dict())
    floating = [v for v in state_of(other).values() if v.is_floating_point()]
    assert all(v.dtype in (torch.float32, torch.float64) for v in floating)
    assert equal(state_of(other), state_of(optim))


# C5: a bad batch costs one step


HISTORY = ("gate_count", "gate_history")


def without_history(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if not k.endswith(HISTORY)}


def one_bad_step(model, optim, kind: str) -> None:
    for key, grad in grads_at(99, model).items():
        model.get_parameter(key).grad = grad
    if kind == "nan":
        model.tall.weight.grad[3, 2] = math.nan
    elif kind == "inf":
        model.norm.bias.grad[0] = -math.inf
    elif kind == "nan_loss":
        optim.latest_loss = torch.tensor(math.nan)
    elif kind == "inf_norm":
        optim.latest_grad_norm = torch.tensor(math.inf)
    elif kind == "spike":
        optim.latest_loss = torch.tensor(50.0)
    elif kind == "norm_spike":
        optim.latest_loss, optim.latest_grad_norm = torch.tensor(1.0), torch.tensor(99.0)
    take_step(optim)


def with_history(model, optim) -> None:
    for step in range(10):
        optim.latest_loss = torch.tensor(2.0 + 0.1 * (step % 3))
        optim.latest_grad_norm = torch.tensor(1.0 + 0.05 * (step % 4))
        train(model, optim, step, step + 1)


BAD = ["nan", "inf", "nan_loss", "inf_norm", "spike", "norm_spike"]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_batch_changes_nothing(name, state_dtype, kind):
    config = CASES[name].config.replace(rolling_interval_length=8, state_dtype=state_dtype)
    model = MixedShapes()
    optim = config.build(model)
    with_history(model, optim)
    assert optim.step_skipped == 0.0
    before, state = weights(model), state_of(optim)
    one_bad_step(model, optim, kind)
    assert optim.step_skipped == 1.0
    assert equal(weights(model), before)
    assert equal(without_history(state_of(optim)), without_history(state))
    assert all(torch.isfinite(v).all() for v in state_of(optim).values())
    train(model, optim, 11, 12)
    assert optim.step_skipped == 0.0
    assert not any(torch.equal(weights(model)[key], before[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_first_batch_changes_nothing(name):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    before, state = weights(model), state_of(optim)
    one_bad_step(model, optim, "nan")
    assert equal(weights(model), before)
    assert equal(state_of(optim), state)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_gate_a_bad_batch_destroys(name):
    model = MixedShapes()
    optim = CASES[name].config.replace(skip_step=False).build(model)
    one_bad_step(model, optim, "nan")
    tensors = [model.tall.weight, *state_of(optim).values()]
    assert not all(torch.isfinite(tensor).all() for tensor in tensors)
    assert optim.step_skipped == 0.0


def test_a_gate_that_multiplies_by_zero_fails():
    model = MixedShapes()
    optim = TimesZero(model.named_parameters())
    one_bad_step(model, optim, "nan")
    assert not torch.isfinite(model.tall.weight).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_of_a_good_run_changes_nothing(name, reference):
    model = MixedShapes()
    train(model, CASES[name].config.replace(skip_step=False).build(model), 0, STEPS)
    assert equal(weights(model), reference(name))


@pytest.mark.parametrize("name", NAMES)
def test_history_is_in_the_checkpoint(name, tmp_path):
    config = CASES[name].config.replace(rolling_interval_length=8)
    model = MixedShapes()
    optim = config.build(model)
    with_history(model, optim)
    save_model_and_optim_state(tmp_path, model, optim, flatten_optimizer_state=True)
    resumed = MixedShapes(seed=1)
    # Another window than the run that was saved.
    resumed_optim = config.replace(rolling_interval_length=6).build(resumed)
    load_model_and_optim_state(tmp_path, resumed, resumed_optim, flatten_optimizer_state=True)
    one_bad_step(resumed, resumed_optim, "spike")
    assert resumed_optim.step_skipped == 1.0
    assert equal(weights(resumed), weights(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_for_the_device(name, monkeypatch):
    def forbidden(self, *args, **kwargs):
        raise AssertionError("host-device sync")

    model = MixedShapes()
    optim = CASES[name].config.build(model)
    train(model, optim, 0, 1)
    for given in (False, True):
        for key, grad in grads_at(1, model).items():
            model.get_parameter(key).grad = grad
        if given:
            optim.latest_loss, optim.latest_grad_norm = torch.tensor(1.0), torch.tensor(1.0)
        with monkeypatch.context() as patched:
            for method in SYNCS:
                patched.setattr(torch.Tensor, method, forbidden)
            take_step(optim)
            optim.step_skipped  # noqa: B018
            with pytest.raises(AssertionError, match="sync"):
                bool(torch.ones(()))


SYNCS = (
    *("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__"),
    *("__index__", "__array__", "__contains__"),
)


# C6: zero in, zero out; bounded always


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_move_nothing(name):
    model = MixedShapes()
    start = weights(model)
    optim = CASES[name].config.replace(**CASES[name].without_decay).build(model)
    for _ in range(5):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        take_step(optim)
    assert equal(weights(model), start)
    assert all(torch.isfinite(v).all() for v in state_of(optim).values())


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e15])
@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_updates_stay_finite_and_bounded(name, scale, rank_one):
    model = MixedShapes()
    start = weights(model)
    optim = CASES[name].config.build(model)
    lr = max(group["lr"] for group in optim.param_groups)
    largest_grad = 0.0
    for step in range(5):
        for key, grad in grads_at(step, model, 1.0).items():
            if rank_one and grad.ndim == 2:
                grad = grad[:, :1] * grad[:1, :]
            model.get_parameter(key).grad = grad * scale
            largest_grad = max(largest_grad, float(grad.abs().max()) * scale)
        take_step(optim)
    bound = CASES[name].bound(lr, largest_grad)
    for key, weight in weights(model).items():
        assert torch.isfinite(weight).all(), key
        # Where the case says nothing else, a step moves a coordinate by no more than a few lr.
        assert (weight - start[key]).abs().max() < bound, key
    assert all(torch.isfinite(v).all() for v in state_of(optim).values())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_and_frozen_ones_are_left_alone(name):
    model = MixedShapes()
    model.tall.weight.requires_grad_(False)
    start = weights(model)
    config = CASES[name].config.replace(**CASES[name].without_randomness)
    optim = config.build(model)
    idle = {"tall.weight", "square.weight", "norm.bias"}
    for step in range(3):
        for key, grad in grads_at(step, model).items():
            model.get_parameter(key).grad = None if key in idle else grad
        take_step(optim)
    for key, weight in weights(model).items():
        assert torch.equal(weight, start[key]) == (key in idle), key
    assert model.tall.weight not in optim.state

    if CASES[name].whole_model:
        return
    # Bias corrections count the updates of the parameter, not the calls.
    fresh = MixedShapes()
    fresh_optim = config.build(fresh)
    for m, o in ((model, optim), (fresh, fresh_optim)):
        o.zero_grad()
        m.square.weight.grad = grads_at(7, m)["square.weight"]
        take_step(o)
    assert torch.equal(model.square.weight, fresh.square.weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_matrix_is_enough(name):
    model = nn.Linear(3, 5, bias=False)
    optim = CASES[name].config.build(model)
    model.weight.grad = torch.ones_like(model.weight)
    take_step(optim)
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_steps_leak_nothing(name):
    model = nn.Linear(3, 2)
    optim = CASES[name].config.build(model)
    grads = {key: torch.randn(p.shape) for key, p in model.named_parameters()}

    def live_tensors(steps: int) -> int:
        for _ in range(steps):
            for key, param in model.named_parameters():
                param.grad = grads[key].clone()
            take_step(optim)
            optim.zero_grad()
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    assert live_tensors(990) == live_tensors(10)


# C7 (state): cost is declared and true


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_are_as_declared(name):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    own_rule = next(iter(CASES[name].state_bytes.values()))
    if name in list_optimizers():
        assert optimizer_info(name).state_bytes_per_param == own_rule
    names = {param: key for key, param in model.named_parameters()}
    for group in optim.param_groups:
        algorithm = group.get("algorithm") or ""
        for param in group["params"]:
            expected = CASES[name].state_bytes[algorithm] * param.numel()
            expected += CASES[name].own_bytes(names[param], tuple(param.shape))
            if algorithm == getattr(optim, "algorithm", None):
                expected += CASES[name].factor_bytes(*param.shape)
            ours = {"step", "hessian_step", *optim._shared_keys}  # one set of them for all
            n_bytes = sum(v.nbytes for k, v in optim.state[param].items() if k not in ours)
            assert n_bytes == expected


# C8: clear errors


@pytest.mark.parametrize(
    "name,bad", [(name, bad) for name in NAMES for bad in CASES[name].bad_fields], ids=str
)
def test_bad_values_are_refused_by_config_and_constructor(name, bad):
    (field,) = bad
    config_class = get_config_class(name)
    with pytest.raises(OLMoConfigurationError, match=f"'{field}' is .*allowed"):
        config_class(**bad)
    if field not in config_class.CONFIG_ONLY:
        config = config_class()
        groups = config.build_groups(nn.Linear(3, 2, bias=False))
        with pytest.raises(OLMoConfigurationError, match=f"'{field}' is .*allowed"):
            config.optimizer()(groups, **bad)


@pytest.mark.parametrize("name", NAMES)
def test_bad_values_in_overrides_are_refused(name):
    def build(patterns, **opts):
        override = OptimGroupOverride(params=patterns, opts=opts)
        return CASES[name].config.replace(group_overrides=[override]).build(MixedShapes())

    with pytest.raises(OLMoConfigurationError, match="'lr' is -1"):
        build(["norm.*"], lr=-1)
    with pytest.raises(OLMoConfigurationError, match="'learning_rate' is not a field"):
        build(["norm.*"], learning_rate=1)
    with pytest.raises(OLMoConfigurationError, match=r"nrm\.\*"):
        build(["nrm.*"], lr=1)
    for params in ("norm.*", [], [1]):
        with pytest.raises(OLMoConfigurationError, match="list of names"):
            build(params, lr=1)
    with pytest.raises(OLMoConfigurationError, match="'lr' is None"):
        build(["norm.*"], lr=None)
    for reserved in ("params", "algorithm", "calls"):
        with pytest.raises(OLMoConfigurationError, match=f"'{reserved}' cannot be set"):
            build(["norm.*"], **{reserved: 1})


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_model_or_optimizer_is_refused(name):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    train(model, optim, 0, 1)
    smaller = nn.Linear(3, 2, bias=False)
    with pytest.raises(OLMoConfigurationError, match="for other parameters"):
        CASES[name].config.build(smaller).load_state_dict(optim.state_dict())

    state = optim.state_dict()
    state["state"] = {k: dict(v) for k, v in state["state"].items()}
    renamed = state["state"][0]
    renamed["other"] = renamed.pop(next(k for k in renamed if k != "step"))
    with pytest.raises(OLMoConfigurationError, match="keeps"):
        optim.load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_grouping_is_loaded_by_name(name, reference):
    def build(*patterns: str):
        model = MixedShapes()
        overrides = [OptimGroupOverride([pattern], {}) for pattern in patterns]
        return model, CASES[name].config.replace(group_overrides=overrides).build(model)

    model, optim = build("tall.*")
    train(model, optim, 0, STEPS // 2)
    for patterns in ([], ["wide.*"], ["norm.*", "square.weight"]):
        other, other_optim = build(*patterns)
        other.load_state_dict(model.state_dict())
        other_optim.load_state_dict(optim.state_dict())
        assert {g["calls"] for g in other_optim.param_groups} == {STEPS // 2}
        train(other, other_optim, STEPS // 2, STEPS)
        assert equal(weights(other), reference(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_load_changes_nothing(name):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    train(model, optim, 0, 1)
    before = state_of(optim)
    state = optim.state_dict()
    state["state"] = {k: {n: v + 1 for n, v in s.items()} for k, s in state["state"].items()}
    last = state["state"][max(state["state"])]
    last[max(last)] = torch.zeros(1, 2, 3)
    with pytest.raises(OLMoConfigurationError, match="of shape"):
        optim.load_state_dict(state)
    assert equal(state_of(optim), before)


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_whole(name, reference):
    model = MixedShapes()
    optim = CASES[name].config.build(model)
    train(model, optim, 0, STEPS // 2)
    twin, twin_optim = copy.deepcopy((model, optim))
    train(twin, twin_optim, STEPS // 2, STEPS)
    assert equal(weights(twin), reference(name))
    assert not equal(weights(model), reference(name))
    read = pickle.loads(pickle.dumps(optim))
    for group, theirs in zip(read.param_groups, optim.param_groups):
        for param, other in zip(group["params"], theirs["params"]):
            other.grad = param.grad = torch.ones_like(other)
    take_step(read)
    take_step(optim)
    assert equal(state_of(read), state_of(optim))
    train(model, optim, 0, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_unfrozen_later_is_not_ignored(name):
    model, config = MixedShapes(), CASES[name].config
    groups = config.build_groups(model)
    model.tall.weight.requires_grad_(False)
    optim = config.optimizer()(groups)
    model.tall.weight.requires_grad_(True)
    with pytest.raises(OLMoConfigurationError, match="'tall.weight' has a gradient but"):
        train(model, optim, 0, 1)


# C9: no recompiles, no surprises


@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_the_same_rule(name):
    """Also a second time with other values: see the count of compilations."""

    def run(compiled: bool, **fields) -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        train(model, CASES[name].config.replace(compile=compiled, **fields).build(model), 0, 5)
        return weights(model)

    start = weights(MixedShapes())
    assert relative_error(run(True), run(False), start) < 1e-5
    counters.clear()
    other = CASES[name].other_values
    assert relative_error(run(True, **other), run(False, **other), start) < 1e-5
    assert counters["stats"]["unique_graphs"] == 0


# Groups that come later


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_comes_later_is_as_if_it_had_been_there(name):
    def build(later: int):
        model = MixedShapes()
        groups = CASES[name].config.build_groups(model)
        groups = [{**g, "params": [pair]} for g in groups for pair in g["params"]][::-1]
        optim = CASES[name].config.optimizer()(
            groups[: len(groups) - later], **CASES[name].config.hyperparameters()
        )
        for group in groups[len(groups) - later :]:
            optim.add_param_group(group)
        return model, optim

    (model, optim), (other, other_optim) = build(0), build(3)
    # The gate's history is where it would have been, which is how DCP finds it.
    assert [set(s) for s in optim.state_dict()["state"].values()] == [
        set(s) for s in other_optim.state_dict()["state"].values()
    ]
    for m, o in ((model, optim), (other, other_optim)):
        train(m, o, 0, 3)
    assert equal(weights(model), weights(other))


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_the_same_in_all_groups(name):
    model, later = MixedShapes(), nn.Linear(3, 2, bias=False)
    optim = CASES[name].config.build(model)
    train(model, optim, 0, 3)
    (group,) = CASES[name].config.build_groups(later)
    optim.add_param_group({**group, "params": [("later", later.weight)]})
    assert [g["calls"] for g in optim.param_groups] == [3] * len(optim.param_groups)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_cannot_be_told_apart_are_refused(name):
    config, linear = CASES[name].config, nn.Linear(3, 2, bias=False)
    (group,) = config.build_groups(linear)
    twice = [("w", linear.weight), ("w", nn.Parameter(torch.ones(2, 3)))]
    with pytest.raises(OLMoConfigurationError, match="two parameters are named 'w'"):
        config.optimizer()([{**group, "params": twice}])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_without_a_gradient_scaler_is_refused(name):
    with pytest.raises(OLMoConfigurationError, match="float16.*allowed are float32, bfloat16"):
        CASES[name].config.build(nn.Linear(3, 2, bias=False).half())


def test_matrices_that_cannot_be_viewed_are_refused():
    model = nn.Conv2d(3, 4, 2)
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    overrides = [OptimGroupOverride(["weight"], {"role": "matrix"})]
    with pytest.raises(OLMoConfigurationError, match="not contiguous"):
        CASES["ext_muon"].config.replace(group_overrides=overrides).build(model)


def test_stacks_of_other_devices_keep_to_the_size_of_a_bucket():
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(7))
    optim = CASES["ext_muon"].config.build(model)
    optim.bucket_bytes = 3 * 64
    jobs = [
        SimpleNamespace(
            member=SimpleNamespace(param=param, grad=SimpleNamespace(device=torch.device("cuda"))),
            plan=optim._plans[param],
            group=optim.param_groups[0],
            work=SimpleNamespace(clock=torch.zeros(1)),
        )
        for param in model.parameters()
    ]
    assert [len(stack) for stack in optim._stacks([(job, 0) for job in jobs])] == [3, 3, 1]


# C10: it optimises


class Problem(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 0.5))


def solve(name: str, problem_name: str, loss_fn, shape, steps: int) -> float:
    torch.manual_seed(0)
    problem = Problem(shape)
    case = CASES[name]
    lr = case.fast_lr_of.get(problem_name, case.fast_lr)
    free = isinstance(case.config, ScheduleFreeConfig)  # which takes no schedule
    optim = case.config.replace(lr=lr, **case.without_decay).build(problem)
    first = float(loss_fn(problem.weight.detach()))
    for step in range(steps):
        for group in optim.param_groups:
            group["lr"] = lr if free else lr * (1 - step / steps)
        loss = loss_fn(problem.weight)
        optim.zero_grad()
        loss.backward()
        take_step(optim, lambda: loss_fn(problem.weight))
    if free:
        optim.swap_to_average()
    return float(loss_fn(problem.weight.detach())) / first


@pytest.mark.parametrize("name", NAMES)
def test_solves_a_quadratic(name):
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(6, 4, generator=generator)
    curvature = torch.logspace(-1, 1, 24).view(6, 4)
    loss = lambda w: (curvature * (w - target) ** 2).sum()  # noqa: E731
    assert solve(name, "quadratic", loss, (6, 4), 300) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_descends_rosenbrock(name):
    loss = lambda w: ((1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2).sum()  # noqa: E731
    assert solve(name, "rosenbrock", loss, (2, 3), 1000) < 2e-2


@pytest.mark.parametrize("name", NAMES)
def test_solves_a_matrix_regression(name):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 12, generator=generator)
    y = x @ torch.randn(8, 12, generator=generator).T / math.sqrt(12)
    loss = lambda w: ((x @ w.T - y) ** 2).mean()  # noqa: E731
    assert solve(name, "regression", loss, (8, 12), 300) < 1e-3
