"""
What is the wrappers' own, beside the contracts.
"""

import math
import pickle
from typing import Any, Callable, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig, OptimGroupOverride
from pytorch_optimizer import SAM as TheirSAM
from pytorch_optimizer import ScheduleFreeAdamW

from olmo_optim_ext import (
    AdamWConfig,
    LookaheadConfig,
    MarsConfig,
    MuonConfig,
    PolarMethod,
    RangerConfig,
    SAMConfig,
    ScheduleFreeConfig,
    SoapConfig,
)
from olmo_optim_ext.config import ExtOptimConfig
from olmo_optim_ext.role_table import role_table
from olmo_optim_ext.wrappers import base

from .case import MixedShapes, equal, grads_at, relative_error, take_step, train, weights

COMMON: Dict[str, Any] = dict(lr=0.01, weight_decay=0.1)
WRAPPERS = [LookaheadConfig, RangerConfig, ScheduleFreeConfig, SAMConfig]


def end_of(config: ExtOptimConfig, steps: int = 20) -> Dict[str, torch.Tensor]:
    model = MixedShapes()
    train(model, config.build(model), 0, steps)
    return weights(model)


# What a wrapper reduces to


@pytest.mark.parametrize("inner", [AdamWConfig, MuonConfig, SoapConfig])
@pytest.mark.parametrize(
    "wrapper,fields", [(LookaheadConfig, {"alpha": 1.0}), (SAMConfig, {"rho": 0.0})]
)
def test_a_wrapper_that_does_nothing_is_bitwise_the_optimizer_inside(wrapper, fields, inner):
    alone = end_of(inner(**COMMON))
    assert equal(end_of(wrapper(inner=inner(), **fields, **COMMON)), alone)
    assert not equal(end_of(wrapper(inner=inner(), **COMMON)), alone)


# State that starts as the weights


@pytest.mark.parametrize("config", [LookaheadConfig(k=2), RangerConfig(k=3), ScheduleFreeConfig()])
def test_a_bad_batch_changes_nothing_whenever_it_comes(config):
    model = MixedShapes()
    optim = config.build(model)

    def everything() -> Dict[str, torch.Tensor]:
        states = {p: state for p, state in optim.state.items()}
        named = {f"{n} {k}": v for n, p in model.named_parameters() for k, v in states[p].items()}
        return {key: value.clone() for key, value in {**named, **weights(model)}.items()}

    for step in range(5):
        before = everything()
        for param in model.parameters():
            param.grad = torch.full_like(param, math.nan)
        optim.step()
        assert equal(everything(), before), step
        train(model, optim, step, step + 1)


@pytest.mark.parametrize(
    "config,key", [(LookaheadConfig(), "slow"), (ScheduleFreeConfig(inner={"name": "muon"}), "z")]
)
def test_state_that_is_like_weights_is_never_rounded(config, key):
    optim = config.replace(state_dtype="bfloat16").build(MixedShapes())
    dtypes = {
        name: {s[name].dtype for s in optim.state.values() if name in s}
        for name in (key, "exp_avg")
    }
    assert dtypes == {key: {torch.float32}, "exp_avg": {torch.bfloat16}}


# Lookahead


def test_a_step_that_is_skipped_does_not_shift_the_synchronisation():
    ends = []
    for bad in (False, True):
        model = MixedShapes()
        optim: Any = LookaheadConfig(k=3, **COMMON).build(model)
        train(model, optim, 0, 2)
        if bad:
            for param in model.parameters():
                param.grad = torch.full_like(param, math.nan)
            optim.step()
        train(model, optim, 2, 7)
        ends.append(weights(model))
    assert equal(*ends)


def test_weights_that_are_loaded_after_the_optimizer_was_made_are_the_slow_ones():
    late, early = MixedShapes(1), MixedShapes(0)
    config = LookaheadConfig(k=2, **COMMON)
    optim = config.build(late)
    late.load_state_dict(early.state_dict())
    train(late, optim, 0, 5)
    train(early, config.build(early), 0, 5)
    assert equal(weights(late), weights(early))


# Schedule-Free


def free_pair(steps: int) -> Any:
    model, other = MixedShapes(), MixedShapes()
    optim: Any = ScheduleFreeConfig(warmup_steps=3, **COMMON).build(model)
    theirs: Any = ScheduleFreeAdamW(other.parameters(), warmup_steps=3, foreach=False, **COMMON)
    theirs.train()
    train(model, optim, 0, steps)
    train(other, theirs, 0, steps)
    return model, optim, other, theirs


def test_the_average_is_that_of_the_authors_and_comes_and_goes_bitwise():
    model, optim, other, theirs = free_pair(20)
    start, trained = weights(MixedShapes()), weights(model)
    theirs.eval()
    with optim.averaged():
        assert optim.is_averaged
        assert relative_error(weights(model), weights(other), start) < 5e-6
        assert not equal(weights(model), trained)
    assert not optim.is_averaged
    assert equal(weights(model), trained)
    with pytest.raises(ZeroDivisionError):
        with optim.averaged():
            1 / 0  # noqa: B018
    assert equal(weights(model), trained)


def test_the_average_before_the_first_step_is_the_start():
    model = MixedShapes()
    optim: Any = ScheduleFreeConfig().build(model)
    with optim.averaged():
        assert equal(weights(model), weights(MixedShapes()))


@pytest.mark.parametrize(
    "what",
    [
        lambda model, optim: train(model, optim, 0, 1),
        lambda model, optim: optim.state_dict(),
        lambda model, optim: optim.load_state_dict({}),
        lambda model, optim: optim.swap_to_average(),
    ],
    ids=["step", "state_dict", "load_state_dict", "swap_to_average"],
)
def test_nothing_is_done_to_the_average(what: Callable[..., Any]):
    model = MixedShapes()
    optim: Any = ScheduleFreeConfig().build(model)
    with optim.averaged(), pytest.raises(OLMoConfigurationError, match="allowed is swap_back"):
        what(model, optim)


def test_an_average_that_fails_halfway_is_undone():
    model = MixedShapes()
    optim: Any = ScheduleFreeConfig(**COMMON).build(model)
    train(model, optim, 0, 3)
    trained = weights(model)
    del optim.state[model.lm_head.weight]["z"]
    with pytest.raises(KeyError, match="z"):
        with optim.averaged():
            pass
    assert not optim.is_averaged
    assert equal(weights(model), trained)


def test_an_average_within_one_leaves_that_one_alone():
    model = MixedShapes()
    optim: Any = ScheduleFreeConfig(**COMMON).build(model)
    train(model, optim, 0, 3)
    with optim.averaged():
        average = weights(model)
        with pytest.raises(OLMoConfigurationError, match="allowed is swap_back"):
            with optim.averaged():
                pass
        assert equal(weights(model), average)


def test_another_momentum_than_the_saved_one_is_refused(tmp_path):
    model = MixedShapes()
    optim: Any = ScheduleFreeConfig(**COMMON).build(model)
    train(model, optim, 0, 3)
    fresh = MixedShapes()
    other: Any = ScheduleFreeConfig(momentum=0.8, r=1.0, **COMMON).build(fresh)
    message = "'momentum' is 0.8 and the state to load was saved with 0.9, allowed is 0.9"
    with pytest.raises(OLMoConfigurationError, match=message):
        other.load_state_dict(optim.state_dict())
    assert all(state["step"] == 0 for state in other.state.values())
    save_model_and_optim_state(tmp_path, model, optim, flatten_optimizer_state=True)
    with pytest.raises(OLMoConfigurationError, match=message):
        load_model_and_optim_state(tmp_path, fresh, other, flatten_optimizer_state=True)


# SAM


class Quartic(nn.Module):
    """With a gradient that changes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.b = nn.Parameter(torch.randn(5, generator=generator))

    def loss(self) -> torch.Tensor:
        return (self.a**4).sum() + (self.a.sum() * self.b).square().sum()


def test_it_is_sam_of_pytorch_optimizer():
    ours, theirs = Quartic(), Quartic()
    optim: Any = SAMConfig(rho=0.1, **COMMON).build(ours)
    other: Any = TheirSAM(list(theirs.parameters()), torch.optim.AdamW, rho=0.1, **COMMON)
    for _ in range(10):
        ours.loss().backward()
        before = weights(ours)
        optim.perturb()
        moved = [weights(ours)[key] - before[key] for key in before]
        assert math.isclose(
            float(torch.cat([m.flatten() for m in moved]).norm()), 0.1, rel_tol=1e-5
        )
        optim.zero_grad()
        ours.loss().backward()
        optim.unperturb()
        assert equal(weights(ours), before)
        optim.step()
        optim.zero_grad()

        theirs.loss().backward()
        other.first_step(zero_grad=True)
        theirs.loss().backward()
        other.second_step(zero_grad=True)
    assert relative_error(weights(ours), weights(theirs), weights(Quartic())) < 1e-5


def test_a_step_without_its_second_pass_says_what_to_add():
    model = MixedShapes()
    optim: Any = SAMConfig(interval=3).build(model)
    for step in range(7):
        for key, grad in grads_at(step, model).items():
            model.get_parameter(key).grad = grad
        assert optim.wants_second_pass() == (step % 3 == 0)
        if step % 3 == 0:
            start = weights(model)
            with pytest.raises(OLMoConfigurationError, match=r'add_callback\("sam", SAMCallback'):
                optim.step()
            assert equal(weights(model), start)
            optim.perturb()
            with pytest.raises(OLMoConfigurationError, match="allowed is step"):
                optim.perturb()
        optim.step()
    assert [group["calls"] for group in optim.param_groups] == [7]


@pytest.mark.parametrize(
    "what", [lambda optim: optim.state_dict(), lambda optim: optim.load_state_dict({})]
)
def test_perturbed_weights_are_neither_saved_nor_loaded(what: Callable[..., Any]):
    model = MixedShapes()
    optim: Any = SAMConfig().build(model)
    for key, grad in grads_at(0, model).items():
        model.get_parameter(key).grad = grad
    optim.perturb()
    with pytest.raises(OLMoConfigurationError, match="perturbed, allowed is unperturb()"):
        what(optim)
    optim.unperturb()
    optim.load_state_dict(optim.state_dict())
    # What was loaded has no second pass.
    with pytest.raises(OLMoConfigurationError, match="without the second pass"):
        optim.step()


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_first_gradient_is_enough_to_skip_the_step(bad, clipped):
    model = MixedShapes()
    optim: Any = SAMConfig(**COMMON).build(model)
    start = weights(model)
    for key, grad in grads_at(0, model).items():
        model.get_parameter(key).grad = grad
    model.tall.weight.grad[0, 0] = bad  # type: ignore[index]
    optim.perturb()
    assert all(torch.isfinite(weight).all() for weight in weights(model).values())
    for key, grad in grads_at(1, model).items():
        model.get_parameter(key).grad = grad
    optim.latest_loss = torch.tensor(1.0)
    if clipped:
        optim.latest_grad_norm = torch.tensor(2.0)
    optim.step()
    assert optim.step_skipped == 1.0
    assert equal(weights(model), start)
    assert optim.shared["gate_count"].tolist() == [1, 0]


# Configs


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_configs_are_read_as_they_were_written(wrapper):
    inner = MuonConfig(polar_method=PolarMethod.svd, adamw_betas=(0.8, 0.9))
    for config in (wrapper(), wrapper(inner=inner, lr=0.1), wrapper(inner={"name": "soap"})):
        assert wrapper.from_dict(config.as_dict()) == config
        assert OptimConfig.from_dict(config.as_config_dict()) == config
    config = wrapper(inner=inner, lr=0.1)
    assert {"name": "ext_muon", "polar_method": "svd"}.items() <= config.inner.items()
    assert config.inner["adamw_betas"] == [0.8, 0.9] and "lr" not in config.inner
    assert config.rule_config == inner.replace(lr=0.1)


def test_what_is_not_given_is_the_inner_optimizers_or_the_authors():
    assert LookaheadConfig().rule_config == AdamWConfig()
    assert ScheduleFreeConfig().rule_config == AdamWConfig(
        lr=0.0025, betas=(0.0, 0.999), weight_decay=0.0
    )
    assert ScheduleFreeConfig(inner={"name": "muon"}).rule_config == MuonConfig()
    assert SAMConfig(inner={"lr": 0.5, "eps": 1e-3}, seed=3).rule_config == AdamWConfig(
        lr=0.5, eps=1e-3, seed=3
    )
    assert RangerConfig(lr=0.5).rule_config.as_dict()["betas"] == (0.95, 0.999)


@pytest.mark.parametrize(
    "inner,message",
    [
        ({"name": "muonn"}, "'inner.name' is 'muonn', allowed are .*did you mean ext_muon"),
        ({"name": "lookahead"}, "'inner.name' is 'lookahead', allowed are "),
        ({"name": "skip_step_adamw"}, "'inner.name' is 'skip_step_adamw', allowed are "),
        ({"name": None}, "'inner.name' is None, allowed are "),
        ({"name": ["muon"]}, r"'inner.name' is \['muon'\], allowed are "),
        ("muon", "'inner' is 'muon', allowed is a mapping"),
        (LookaheadConfig(), "'inner.name' is 'lookahead', allowed are "),
        ({"beta": 1}, "'inner.beta' is no field of ext_adamw, allowed are .*did you mean betas"),
        ({"betas": [0.9]}, r"'betas' is \(0.9,\), allowed is two"),
        ({"name": "muon", "polar_method": "qr"}, "'polar_method' is 'qr', allowed are"),
        ({"skip_step": False}, "'inner.skip_step' cannot be set, allowed is 'skip_step' of"),
        (AdamWConfig(seed=3), "'inner.seed' cannot be set"),
        ({"lr": 0.2}, "'lr' is 0.1 and 'inner.lr' is 0.2, allowed is one of them"),
    ],
    ids=str,
)
def test_a_wrong_inner_optimizer_is_refused(inner, message):
    with pytest.raises(OLMoConfigurationError, match=message):
        SAMConfig(inner=inner, lr=0.1)


def test_a_field_that_the_inner_optimizer_has_not_is_refused():
    assert SAMConfig(inner={"name": "scion"}, lr=0.1).rule_config.as_dict()["lr"] == 0.1
    message = "'weight_decay' is 0.1, allowed is None, as scion has no such field"
    with pytest.raises(OLMoConfigurationError, match=message):
        SAMConfig(inner={"name": "scion"}, weight_decay=0.1)


def test_what_a_config_inside_says_is_not_tuned():
    inner = AdamWConfig(betas=(0.9, 0.999))
    assert ScheduleFreeConfig(inner=inner).rule_config == inner
    assert ScheduleFreeConfig(inner=AdamWConfig()).rule_config == AdamWConfig()
    assert ScheduleFreeConfig(inner=inner, lr=0.5).rule_config == inner.replace(lr=0.5)
    # Names that the wrapper and the optimizer inside share.
    muon = MuonConfig(momentum=0.95)
    assert ScheduleFreeConfig(inner=muon, momentum=0.8).rule_config == muon


def test_sam_around_exact_mars_is_refused():
    assert SAMConfig(inner={"name": "mars"}).rule_config == MarsConfig()
    for inner in ({"name": "mars", "exact": True}, MarsConfig(exact=True)):
        with pytest.raises(OLMoConfigurationError, match="'inner.exact' is True, allowed is false"):
            SAMConfig(inner=inner)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_groups_roles_and_reports_are_those_of_the_optimizer_inside(wrapper):
    overrides = [OptimGroupOverride(["norm.*"], {"lr": 0.5, "betas": (0.5, 0.6)})]
    config = wrapper(inner={"name": "muon"}, group_overrides=overrides, lr=0.1)
    rule = config.rule_config
    model, other = MixedShapes(), MixedShapes()
    optim: Any = config.build(model)
    bare: Any = rule.build(other)

    def of(o: Any) -> List[Dict[str, Any]]:
        own = lambda key: key == "params" or key.startswith(base.PREFIX)  # noqa: E731
        return [{k: v for k, v in g.items() if not own(k)} for g in o.param_groups]

    assert of(optim) == of(bare)
    assert role_table(model, config, optim) == role_table(other, rule, bare)
    optim.ask_for_report()
    for key, grad in grads_at(0, model).items():
        model.get_parameter(key).grad = grad
    take_step(optim)
    assert "square.weight" in optim.take_report()


def test_overrides_of_a_wrappers_own_fields_are_refused():
    overrides = [OptimGroupOverride(["norm.*"], {"alpha": 0.5})]
    with pytest.raises(OLMoConfigurationError, match="'alpha' is not a field of a parameter group"):
        LookaheadConfig(group_overrides=overrides).build(MixedShapes())


@pytest.mark.parametrize("way", ["torch", "dcp_flat", "dcp_nested"])
@pytest.mark.parametrize(
    "saved,loaded,differences",
    [
        (LookaheadConfig(alpha=0.8), LookaheadConfig(k=7, alpha=0.8), ["k: 5 -> 7"]),
        (
            SAMConfig(),
            SAMConfig(rho=0.1, adaptive=True, interval=2),
            ["rho: 0.05 -> 0.1", "adaptive: False -> True", "interval: 1 -> 2"],
        ),
        (
            ScheduleFreeConfig(),
            ScheduleFreeConfig(warmup_steps=3, r=1.0),
            ["warmup_steps: 0 -> 3", "r: 0.0 -> 1.0"],
        ),
    ],
    ids=["lookahead", "sam", "schedule_free"],
)
def test_options_that_changed_are_listed_when_a_checkpoint_is_loaded(
    saved, loaded, differences, way, tmp_path, caplog
):
    model, other = MixedShapes(), MixedShapes()
    optim, resumed = saved.build(model), loaded.build(other)
    own = [dict(group) for group in resumed.param_groups]
    train(model, optim, 0, 1)
    caplog.set_level("WARNING", logger="olmo_optim_ext.config")
    if way == "torch":
        torch.save(optim.state_dict(), tmp_path / "state.pt")
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    else:
        flat = {"flatten_optimizer_state": way == "dcp_flat"}
        save_model_and_optim_state(tmp_path / "s", model, optim, **flat)
        load_model_and_optim_state(tmp_path / "s", other, resumed, **flat)
    listed = [r.getMessage() for r in caplog.records if "other hyperparameters" in r.message]
    lines = [f"group 0 wrapper_{difference}" for difference in differences]
    assert [message.split("used: ")[1] for message in listed] == ["; ".join(lines)]
    assert resumed.param_groups[0] == {**own[0], "calls": 1}


def test_options_in_groups_cannot_be_set():
    overrides = [OptimGroupOverride(["norm.*"], {"wrapper_alpha": 0.5})]
    with pytest.raises(OLMoConfigurationError, match="'wrapper_alpha' is not a field of a param"):
        LookaheadConfig(group_overrides=overrides).build(MixedShapes())


def test_a_copy_can_be_read_where_the_class_was_never_made():
    optim: Any = LookaheadConfig(inner={"name": "soap"}).build(MixedShapes())
    written = pickle.dumps(optim)
    known = dict(base._WRAPPED)
    base._WRAPPED.clear()
    try:
        read = pickle.loads(written)
    finally:
        base._WRAPPED.update(known)
    assert type(read).__name__ == type(optim).__name__ == "LookaheadSoap"
    states: List[Any] = [o.state_dict()["state"] for o in (read, optim)]
    assert states[0].keys() == states[1].keys()
