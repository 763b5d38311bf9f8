"""
A range test in OLMo-core's trainer, and what it leaves of weights and optimizers: nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Dict, Optional

import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import SkipStepAdamWConfig
from olmo_core.optim.scheduler import ConstantScheduler, ExponentialScheduler
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback

from olmo_optim_ext import list_optimizers
from olmo_optim_ext.training import LRFinderCallback
from olmo_optim_ext.training.lr_finder import RangeScheduler, without_gate
from olmo_optim_ext.training.snapshot import Snapshot

from ..optim.case import MixedShapes, equal, grads_at, take_step, train, weights
from ..optim.cases import CASES
from .bad_batch_worker import STEPS, Witness, bits, build_trainer, tensors_of


def test_the_rates_of_one_group_are_those_of_olmo_core():
    ours, theirs = RangeScheduler(low=1e-3, high=1e3, steps=50), ExponentialScheduler(lr_min=2e-5)
    rates = [ours.get_lr(0.02, step, 0) for step in range(1, 51)]
    # Theirs begins at step 0, and ends at what it takes for the initial rate.
    assert rates == pytest.approx([theirs.get_lr(20.0, step, 49) for step in range(50)])


def test_groups_keep_their_proportion_and_steps_count_from_the_first():
    schedule = RangeScheduler(low=0.1, high=10.0, steps=21, first_step=1000)
    for step in range(1001, 1022):
        lr = schedule.get_lr(0.02, step, 0)
        assert schedule.get_lr(torch.tensor(0.005), step, 0) == pytest.approx(lr / 4)
    assert schedule.factor(1001) == pytest.approx(0.1)
    assert schedule.factor(1011) == pytest.approx(1.0)
    assert schedule.factor(1021) == pytest.approx(10.0)


@pytest.mark.parametrize("name", list_optimizers())
def test_after_a_test_training_goes_as_without_one(name):
    """For every name: what a snapshot did not put back would show in the steps after it."""
    ends = []
    for tested in (False, True):
        model = MixedShapes()
        optim = CASES[name].config.build(model)
        train(model, optim, 0, 2)
        if tested:
            snapshot = Snapshot(model, optim)
            put_back = without_gate(optim)
            range_test(model, optim)
            put_back()
            snapshot.restore()
        train(model, optim, 2, 5)
        ends.append(weights(model))
    assert equal(*ends)


def range_test(model: torch.nn.Module, optim: torch.optim.Optimizer, steps: int = 6) -> None:
    """Steps with growing rates and gradients; the last ones are not finite."""
    schedule = RangeScheduler(low=1e-2, high=1e4, steps=steps)
    before = weights(model)
    for step in range(1, steps + 1):
        for group in optim.param_groups:
            group["lr"] = schedule.get_lr(group["initial_lr"], step, steps)
        scale = math.nan if step == steps else 10.0**step
        grads = grads_at(100 + step, model, scale)
        for key, param in model.named_parameters():
            param.grad = grads[key]
        take_step(optim)
        optim.zero_grad()
    assert not any(torch.equal(weights(model)[key], before[key]) for key in before)


def test_state_that_an_optimizer_makes_late_is_not_there_after_a_test():
    model: Any = MixedShapes()
    optim = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    lr, before = optim.param_groups[0]["lr"], weights(model)
    model.register_buffer("counts", torch.ones(3))
    snapshot = Snapshot(model, optim)
    for _ in range(2):
        optim.param_groups[0]["lr"].mul_(10)
        optim.param_groups[0]["eps"] = 0.5
        model.counts.add_(1)
        train(model, optim, 0, 1)
        assert len(optim.state) > 0 and not equal(weights(model), before)
        snapshot.restore()
        assert len(optim.state) == 0 and equal(weights(model), before)
        assert model.counts.tolist() == [1.0] * 3
        assert optim.param_groups[0]["lr"] is lr and lr == 0.1
        assert optim.param_groups[0]["eps"] == 1e-8


# In the trainer


@dataclass
class Fails(Callback):
    """Raises an error in a step, after the optimizer's."""

    at: int = 7
    priority: ClassVar[int] = 2000  # before the finder

    def post_train_batch(self):
        if self.step == self.at:
            raise ValueError("on purpose")


@dataclass
class Outcome:
    """A range test that was, and what was before and after it, bit by bit."""

    trainer: Trainer
    finder: LRFinderCallback
    witness: Witness
    before: Dict[str, bytes]
    error: Optional[Exception] = None

    @property
    def module(self) -> Any:
        return self.trainer.train_module

    def assert_everything_is_back(self) -> None:
        after = {key: bits(value) for key, value in tensors_of(self.module).items()}
        assert after == self.before
        assert self.module.optim.skip_step
        assert isinstance(self.module.scheduler, ConstantScheduler)
        rates = [(group["lr"], group["initial_lr"]) for group in self.module.optim.param_groups]
        assert rates == [(0.01, 0.01)] * len(rates)


def make_test(
    folder: Path,
    bad_steps: Optional[Dict[int, str]] = None,
    fails: Optional[Callback] = None,
    low: float = 1e-2,
    high: float = 1e5,
    steps: int = STEPS,
) -> Outcome:
    finder = LRFinderCallback(low=low, high=high, steps=steps)
    witness = Witness(bad_steps=bad_steps or {})
    trainer = build_trainer(folder, "ext_muon", witness, max_grad_norm=1.0, further=finder, lr=0.01)
    if fails is not None:
        trainer.add_callback("fails", fails)
    module: Any = trainer.train_module
    module.scheduler = ConstantScheduler()
    before = {key: bits(value) for key, value in tensors_of(module).items()}
    tested = Outcome(trainer, finder, witness, before)
    try:
        trainer.fit()
    except Exception as error:
        tested.error = error
    return tested


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return make_test(tmp_path_factory.mktemp("diverged"))


def test_it_ends_once_the_loss_has_diverged_and_everything_is_back(diverged):
    assert diverged.error is None and diverged.finder.finished
    finder, steps = diverged.finder, diverged.trainer.global_step
    assert len(finder.losses) == steps - 1 < STEPS - 1
    assert max(finder.losses[:-3]) < 4 < finder.losses[-1]
    diverged.assert_everything_is_back()


def test_a_loss_is_that_of_the_batch_after_the_step_with_its_rate(diverged):
    metrics, finder = diverged.witness.record.metrics, diverged.finder
    rates = [metrics[i + 1]["optim/LR (group 0)"] for i in range(len(finder.losses))]
    losses = [metrics[i + 2]["train/CE loss"] for i in range(len(finder.losses))]
    assert [0.01 * factor for factor in finder.factors] == pytest.approx(rates)
    assert finder.losses == pytest.approx(losses)


def test_a_test_that_does_not_diverge_ends_after_its_steps(tmp_path):
    tested = make_test(tmp_path, high=2.0, steps=7)
    assert tested.trainer.global_step == 7 and tested.finder.finished
    assert tested.finder.factors[0] == pytest.approx(1e-2)
    assert len(tested.finder.losses) == 6
    tested.assert_everything_is_back()


def test_an_error_in_the_middle_leaves_everything_as_it_was(tmp_path):
    tested = make_test(tmp_path, fails=Fails())
    assert isinstance(tested.error, ValueError)
    assert not tested.finder.finished
    tested.assert_everything_is_back()


def test_a_loss_that_is_not_finite_ends_the_test_and_not_with_an_error(tmp_path):
    tested = make_test(tmp_path, bad_steps={5: "nan loss"}, high=2.0)
    assert tested.error is None and tested.finder.finished
    assert tested.trainer.global_step == 5
    assert math.isnan(tested.finder.losses[-1]) and len(tested.finder.losses) == 4
    tested.assert_everything_is_back()


def test_a_first_loss_that_is_not_finite_is_the_trainers_error(tmp_path):
    tested = make_test(tmp_path, bad_steps={1: "nan loss"})
    assert isinstance(tested.error, RuntimeError) and "nan loss" in str(tested.error)
    tested.assert_everything_is_back()


def test_the_gate_does_not_hide_a_spike(tmp_path):
    # The gate, which has seen half of its 8 steps, would skip the step.
    tested = make_test(tmp_path, bad_steps={7: "spike"}, high=2.0)
    assert tested.trainer.global_step == 7
    assert tested.finder.losses[-1] > 1000 and tested.finder.finished
    assert any(key.startswith("param") for key in tested.witness.record.changed[7])


def test_olmo_cores_own_gate_is_off_and_knows_afterwards_what_it_knew():
    model = MixedShapes()
    optim = SkipStepAdamWConfig(rolling_interval_length=8).build(model)

    def step(loss: float) -> float:
        optim.latest_loss = optim.latest_grad_norm = torch.tensor(loss)
        return 1 - float(optim.get_step_factor())

    assert [step(loss) for loss in (1.0, 1.2, 1.0, 1.1)] == [0.0] * 4
    put_back = without_gate(optim)
    assert [step(loss) for loss in (50.0, 1.0, 60.0)] == [0.0] * 3
    put_back()
    assert [float(loss) for loss in optim._losses] == pytest.approx([1.0, 1.2, 1.0, 1.1])
    assert step(50.0) == 1.0


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"low": 0.0}, "'low' is 0.0"),
        ({"low": 2.0, "high": 1.0}, "0 < low < high"),
        ({"high": math.inf}, "'high' inf"),
        ({"steps": 1}, "'steps' is 1"),
    ],
)
def test_what_is_no_range_is_refused(fields: Dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(OLMoConfigurationError, match=message):
        build_trainer(tmp_path, "ext_adamw", Witness(), 1.0, further=LRFinderCallback(**fields))
