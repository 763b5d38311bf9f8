"""
Weight decay and momentum that follow a schedule, in runs that are resumed, too.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional

import olmo_core.optim
import pytest
import torch
import torch.nn as nn
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import CosWithWarmup, LinearWithWarmup, OptimGroupOverride, Scheduler

from olmo_optim_ext import (
    AdamWConfig,
    CyclicScheduler,
    LambConfig,
    MuonConfig,
    OneCycleScheduler,
    PolynomialScheduler,
    ScheduleFreeConfig,
    ScionConfig,
    SGDConfig,
)
from olmo_optim_ext.training import HyperparameterScheduleCallback, check_schedule

from ..optim.case import MixedShapes, equal, grads_at, weights

STEPS, BATCH = 10, 32
Schedule: Any = HyperparameterScheduleCallback
NO_DECAY = OptimGroupOverride(params=["norm.*"], opts={"weight_decay": 0.0})
OWN_DECAY = OptimGroupOverride(params=["*.bias"], opts={"weight_decay": 0.02, "betas": (0.5, 0.9)})


class Loop:
    """What OLMo-core's trainer does of a step, in its order."""

    def __init__(self, optim: torch.optim.Optimizer, scheduler: Optional[Scheduler] = None):
        self.train_module = SimpleNamespace(optim=optim, scheduler=scheduler)
        self.global_step, self.max_steps = 0, STEPS
        self.max_tokens = STEPS * BATCH
        self.metrics: Dict[str, List[float]] = {}
        self.callbacks: List[Any] = []

    @property
    def global_train_tokens_seen(self) -> int:
        return self.global_step * BATCH

    def attach(self, callback: Any) -> Any:
        callback.trainer = self
        callback.post_attach()
        self.callbacks.append(callback)
        return callback

    def record_metric(self, name: str, value: float, namespace: str) -> None:
        self.metrics.setdefault(f"{namespace}/{name}", []).append(value)

    def step(self, model: nn.Module) -> None:
        self.global_step += 1
        grads = grads_at(self.global_step, model)
        for name, param in model.named_parameters():
            param.grad = grads[name]
        for callback in self.callbacks:
            callback.pre_optim_step()
        optim, scheduler = self.train_module.optim, self.train_module.scheduler
        if scheduler is not None:
            for group in optim.param_groups:
                scheduler.set_lr(group, self)
        optim.step()

    def close(self) -> None:
        for callback in self.callbacks:
            callback.close()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    overrides = [NO_DECAY, OptimGroupOverride(["square.bias", "row.bias"], OWN_DECAY.opts)]
    return AdamWConfig(weight_decay=0.1, group_overrides=overrides).build(model)


def decays(loop: Loop) -> List[float]:
    return [group["weight_decay"] for group in loop.train_module.optim.param_groups]


@pytest.mark.parametrize("units", ["steps", "tokens"])
def test_each_group_follows_the_schedule_from_its_own_value(units):
    model = MixedShapes()
    optim = adamw(model)
    built = [dict(group) for group in optim.param_groups]
    loop = Loop(optim)
    length = STEPS if units == "steps" else STEPS * BATCH
    schedule = LinearWithWarmup(warmup=0, alpha_f=0.5, t_max=length, units=units)
    loop.attach(Schedule("weight_decay", schedule))
    loop.attach(Schedule("momentum", PolynomialScheduler(alpha_f=0.5)))
    assert sorted(group["weight_decay"] for group in built) == [0.0, 0.02, 0.1]
    for step in range(1, STEPS + 1):
        loop.step(model)
        share = 1 - 0.5 * step / STEPS
        for group, before in zip(optim.param_groups, built):
            assert group["weight_decay"] == pytest.approx(before["weight_decay"] * share)
            first, second = before["betas"]
            assert group["betas"] == pytest.approx((first * share, second))
            same = set(group) - {"params", "weight_decay", "betas", "calls"}
            assert {key: group[key] for key in same} == {key: before[key] for key in same}
    assert len(loop.metrics["optim/weight decay (group 2)"]) == STEPS
    assert loop.metrics["optim/momentum (group 0)"][-1] == optim.param_groups[0]["betas"][0]
    loop.close()
    for group, before in zip(optim.param_groups, built):
        assert (group["weight_decay"], group["betas"]) == (before["weight_decay"], before["betas"])


def test_a_second_trainer_continues_from_the_values_of_the_config():
    model = MixedShapes()
    optim = adamw(model)
    other = MixedShapes()
    whole = Loop(adamw(other))
    loops = [Loop(optim), Loop(optim)]
    seen: List[List[float]] = []
    for index, loop in enumerate(loops):
        loop.attach(Schedule("weight_decay", PolynomialScheduler()))
        loop.global_step = 5 * index
        for _ in range(5):
            loop.step(model)
            seen.append(decays(loop))
        loop.close()
    whole.attach(Schedule("weight_decay", PolynomialScheduler()))
    for expected in seen:
        whole.step(other)
        assert decays(whole) == expected
    assert equal(weights(model), weights(other))


@pytest.mark.parametrize("config", [ScionConfig(), MuonConfig(), SGDConfig()])
def test_after_training_the_momentum_is_what_it_was_to_the_last_bit(config):
    model = MixedShapes()
    optim = config.build(model)
    built = [dict(group) for group in optim.param_groups]
    loop = Loop(optim)
    loop.attach(Schedule("momentum", PolynomialScheduler(alpha_f=0.3)))
    loop.step(model)
    assert all(group != before for group, before in zip(optim.param_groups, built))
    loop.close()
    for group, before in zip(optim.param_groups, built):
        assert {**group, "calls": 0, "params": 0} == {**before, "calls": 0, "params": 0}


def test_it_is_torchs_step_with_that_weight_decay():
    model, other = MixedShapes(), MixedShapes()
    config = SGDConfig(lr=0.1, momentum=0.9, weight_decay=0.3, skip_step=False)
    loop = Loop(config.build(model))
    loop.attach(Schedule("weight_decay", CosWithWarmup(warmup=3)))
    loop.attach(Schedule("momentum", PolynomialScheduler(alpha_f=0.1)))
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    for step in range(1, STEPS + 1):
        loop.step(model)
        (group,) = theirs.param_groups
        group["weight_decay"] = CosWithWarmup(warmup=3).get_lr(0.3, step, STEPS)
        group["momentum"] = 0.9 * (0.1 + 0.9 * (1 - step / STEPS))
        for name, param in other.named_parameters():
            param.grad = grads_at(step, other)[name]
        theirs.step()
    for mine, torchs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=1e-7)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return MuonConfig(adamw_weight_decay=0.03).build(model)


def olmo_cores(model: nn.Module) -> torch.optim.Optimizer:
    return olmo_core.optim.AdamWConfig(weight_decay=0.1).build(model)


@pytest.mark.parametrize("build", [adamw, muon, olmo_cores], ids=lambda f: f.__name__)
def test_a_resumed_run_is_the_same(build: Callable[[nn.Module], Any], tmp_path):
    def start(model: nn.Module) -> Loop:
        loop = Loop(build(model), OneCycleScheduler(units="tokens"))  # type: ignore[arg-type]
        loop.attach(Schedule("weight_decay", PolynomialScheduler(power=2)))
        return loop

    whole = MixedShapes()
    loop = start(whole)
    for step in range(STEPS):
        if step == 4:
            save_model_and_optim_state(
                tmp_path / "saved", whole, loop.train_module.optim, flatten_optimizer_state=True
            )
        loop.step(whole)

    resumed = MixedShapes(seed=1)
    loop = start(resumed)
    load_model_and_optim_state(
        tmp_path / "saved", resumed, loop.train_module.optim, flatten_optimizer_state=True
    )
    loop.global_step = 4
    for _ in range(4, STEPS):
        loop.step(resumed)
    assert equal(weights(resumed), weights(whole))


@dataclass
class Grows(Scheduler):
    """From half the initial value to three halves."""

    def get_lr(self, initial_lr: Any, current: int, t_max: int) -> Any:
        return initial_lr * (0.5 + current / t_max)


REFUSED: Dict[str, Any] = {
    "'field' is 'betas'": (adamw, "betas", PolynomialScheduler()),
    "no 'weight_decay'": (ScionConfig().build, "weight_decay", PolynomialScheduler()),
    "schedule_free": (ScheduleFreeConfig().build, "momentum", PolynomialScheduler(alpha_f=0.9)),
    "weight decay is 0 in all": (SGDConfig().build, "weight_decay", PolynomialScheduler()),
    "momentum is 0 in all": (SGDConfig(momentum=0.0).build, "momentum", PolynomialScheduler()),
    "neither 'momentum' nor 'betas'": (
        lambda model: torch.optim.Adagrad(model.parameters(), weight_decay=0.1),
        "momentum",
        PolynomialScheduler(),
    ),
    "a finite number > 0 with 'always_adapt'": (
        LambConfig().build,
        "weight_decay",
        PolynomialScheduler(),
    ),
    "at 7 of 10 steps makes the momentum 1.08, allowed is a number in .0, 1": (
        adamw,
        "momentum",
        Grows(),
    ),
    "cycle_momentum: True": (adamw, "weight_decay", CyclicScheduler(up=3)),
    "fails for the weight decay 0.02 with AssertionError": (
        adamw,
        "weight_decay",
        LinearWithWarmup(warmup=3, warmup_min_lr=0.05),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_scheduled_is_refused_when_it_is_attached(message):
    build, field, schedule = REFUSED[message]
    loop = Loop(build(MixedShapes()))
    with pytest.raises(OLMoConfigurationError, match=message):
        loop.attach(Schedule(field, schedule))


def test_two_schedules_of_the_momentum_are_refused():
    loop = Loop(adamw(MixedShapes()), OneCycleScheduler())
    with pytest.raises(OLMoConfigurationError, match="OneCycleScheduler sets the momentum, too"):
        loop.attach(Schedule("momentum", PolynomialScheduler()))
    loop.attach(Schedule("weight_decay", PolynomialScheduler()))
    loop = Loop(adamw(MixedShapes()), OneCycleScheduler(cycle_momentum=False))
    loop.attach(Schedule("momentum", PolynomialScheduler()))


def test_a_schedule_that_fails_at_the_last_step_is_found_before_the_first():
    never = olmo_core.optim.WSD(warmup=1, decay=0, decay_fraction=None)
    with pytest.raises(OLMoConfigurationError, match="at 5000 of 5000 steps.*ZeroDivisionError"):
        check_schedule(never, 0.1, 5000, "learning rate", "scheduler")
    check_schedule(never, 0.1, 1, "learning rate", "scheduler")
