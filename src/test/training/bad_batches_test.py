"""
A bad batch costs one step: whole runs of OLMo-core's trainer, on one rank and on two, with batches
whose gradients or loss are not finite, or spike.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Set

import pytest
import torch
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import SkipStepAdamWConfig

from olmo_optim_ext import AdamWConfig
from olmo_optim_ext.training import BadBatchCallback

from ..ranks import run_on_ranks
from .bad_batch_worker import BAD_STEPS, NAMES, SAVE_AT, STEPS

WORKER = Path(__file__).with_name("bad_batch_worker.py")
WORLD_SIZES = [1, 2]
LOSS, NOT_FINITE, SKIPPED = "train/CE loss", "train/CE loss not finite", "optim/step skipped"
GOOD_STEPS = [step for step in range(1, STEPS + 1) if step not in BAD_STEPS]

Record = Dict[str, Any]


@pytest.fixture(scope="module", params=WORLD_SIZES, ids="ranks{}".format)
def records(request, tmp_path_factory) -> List[Dict[str, Record]]:
    """The records of all runs, one dict a rank."""
    folder = tmp_path_factory.mktemp("bad_batches")
    run_on_ranks(request.param, WORKER, folder)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(request.param)]


def by_step(record: Record, metric: str) -> Dict[int, float]:
    """The values of a metric."""
    metrics = record["metrics"]
    return {int(step): row[metric] for step, row in metrics.items() if metric in row}


def kinds(keys: List[str]) -> Set[str]:
    """``param``, and the names of state tensors."""
    return {key.split()[0] for key in keys}


def for_each_run(test: Callable[..., None]) -> Callable[..., None]:
    for_clipping = pytest.mark.parametrize("clipping", ["clipped", "unclipped"])
    return for_clipping(pytest.mark.parametrize("name", NAMES)(test))


@for_each_run
def test_parameters_and_state_are_untouched_on_all_ranks(name, clipping, records):
    for record in (rank[f"{name} {clipping}"] for rank in records):
        for step in BAD_STEPS:
            changed = kinds(record["changed"][str(step)])
            assert changed <= {"gate_count", "gate_history"}, (step, changed)
        for step in GOOD_STEPS:
            changed = kinds(record["changed"][str(step)])
            assert changed > {"param", "step", "gate_count", "gate_history"}, step


@for_each_run
def test_the_metrics_say_which_steps_were_skipped(name, clipping, records):
    for record in (rank[f"{name} {clipping}"] for rank in records):
        skipped = by_step(record, SKIPPED)
        assert skipped == {step: float(step in BAD_STEPS) for step in range(1, STEPS + 1)}


@for_each_run
def test_the_run_ends_as_planned_and_learns(name, clipping, records):
    for record in (rank[f"{name} {clipping}"] for rank in records):
        assert record["error"] is None
        loss = by_step(record, LOSS)
        assert list(loss) == list(range(1, STEPS + 1))
        # A skipped step leaves the loss as it was: all steps have the same batch.
        assert loss[5] == loss[4] < loss[3] == loss[2] < loss[1]
        assert loss[9] == pytest.approx(loss[7] / 1000, rel=1e-5)
        assert loss[12] < loss[11] < loss[10] < loss[9] < loss[5]


@for_each_run
def test_a_loss_that_is_not_finite_is_told_and_the_last_finite_one_recorded(
    name, clipping, records
):
    bad = {step for step, kind in BAD_STEPS.items() if kind in ("nan loss", "inf loss")}
    for record in (rank[f"{name} {clipping}"] for rank in records):
        told = by_step(record, NOT_FINITE)
        assert told == {step: float(step in bad) for step in range(1, STEPS + 1)}
        loss = by_step(record, LOSS)
        assert all(loss[step] == loss[step - 1] for step in bad)


@for_each_run
def test_all_finite_values_enter_the_history_and_no_others(name, clipping, records):
    for record in (rank[f"{name} {clipping}"] for rank in records):
        assert not any(record["not_finite"].values())
        losses = norms = 0
        for step in range(1, STEPS + 1):
            kind = BAD_STEPS.get(step)
            losses += kind not in ("nan loss", "inf loss")
            norms += clipping == "clipped" and kind in (None, "nan loss", "spike")
            assert record["history"][str(step)] == [losses, norms], step


@for_each_run
def test_all_ranks_log_the_same(name, clipping, records):
    for metric in (LOSS, NOT_FINITE, SKIPPED):
        logged = [by_step(rank[f"{name} {clipping}"], metric) for rank in records]
        assert all(each == logged[0] for each in logged)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_knows_the_history(name, records):
    for rank in records:
        resumed, whole = rank[f"{name} resumed"], rank[f"{name} clipped"]
        assert resumed["error"] is None
        assert BAD_STEPS[SAVE_AT + 1] == "spike"
        assert by_step(resumed, SKIPPED)[SAVE_AT + 1] == 1.0
        for metric in (LOSS, NOT_FINITE, SKIPPED):
            after = {s: v for s, v in by_step(whole, metric).items() if s > SAVE_AT}
            assert by_step(resumed, metric) == after
        assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("name", NAMES)
def test_without_the_gate_the_same_batch_spoils_the_run(name, records):
    (step,) = (step for step, kind in BAD_STEPS.items() if kind == "nan gradients")
    for record in (rank[f"{name} ungated"] for rank in records):
        assert set(by_step(record, SKIPPED).values()) == {0.0}
        assert not record["not_finite"][str(step - 1)]
        assert record["not_finite"][str(step)]


def test_a_nan_loss_right_after_the_resume_has_the_last_loss_before_it(records):
    for rank in records:
        record = rank["resumed at nan"]
        assert record["error"] is None
        before = by_step(rank[f"{NAMES[0]} clipped"], LOSS)
        assert by_step(record, LOSS)[SAVE_AT + 1] == before[SAVE_AT - 1]
        assert by_step(record, NOT_FINITE)[SAVE_AT + 1] == 1.0


@pytest.mark.parametrize(
    "run,step",
    [("without the callback", SAVE_AT + 1), ("not skipped", SAVE_AT + 1), ("nan at once", 1)],
)
def test_the_trainer_ends_the_run(run, step, records):
    for rank in records:
        assert rank[run]["error"] == f"nan loss encountered at step {step}"


def test_optimizers_that_skip_in_name_only_are_refused():
    optim = SkipStepAdamWConfig().build(nn.Linear(2, 2))
    for train_module in (SimpleNamespace(optim=optim), SimpleNamespace(optimizers=[optim])):
        callback = BadBatchCallback()
        callback.trainer = SimpleNamespace(train_module=train_module)  # type: ignore[assignment]
        with pytest.raises(OLMoConfigurationError, match="allowed are optimizers of"):
            callback.post_attach()


def test_the_host_waits_for_no_value():
    # On the meta device there is none, and reading one raises.
    model = nn.Linear(2, 2, device="meta")
    optim = AdamWConfig().build(model)
    loss = torch.empty((), device="meta")
    optim.latest_loss = loss
    for param in model.parameters():
        param.grad = torch.empty_like(param)
    optim.step()

    recorded: Dict[str, torch.Tensor] = {}
    callback = BadBatchCallback()
    callback.trainer = SimpleNamespace(  # type: ignore[assignment]
        train_module=SimpleNamespace(optim=optim),
        get_metric=lambda name: loss,
        record_metric=lambda name, value, **options: recorded.update({name: value}),
    )
    callback.post_train_batch()
    assert [value.device.type for value in recorded.values()] == ["meta", "meta"]
