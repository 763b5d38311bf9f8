"""
Wrappers in OLMo-core's training loop, on one rank and on two.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import ConstantWithWarmup, InvSqrtWithWarmup, LinearWithWarmup, Scheduler

from olmo_optim_ext import AdamWConfig, SAMConfig
from olmo_optim_ext.training import (
    AveragingCallback,
    SAMCallback,
    check_never_decays,
    sharpness,
)

from ..ranks import run_on_ranks
from .wrapper_worker import STEPS

WORKER = Path(__file__).with_name("wrapper_worker.py")

Found = List[Dict[str, Any]]


@pytest.fixture(scope="module", params=[1, 2], ids="ranks{}".format)
def found(request, tmp_path_factory) -> Found:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("wrappers")
    run_on_ranks(request.param, WORKER, folder)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(request.param)]


@pytest.mark.parametrize("name", ["sam", "asam", "changed batch"])
def test_the_gradients_of_the_second_pass_are_those_of_a_loop_by_hand(name, found):
    for rank in found:
        assert rank[name]["steps"] == STEPS
        # Rounding grows from step to step.
        assert rank[name]["error"] < 1e-4
        assert rank[name]["error of plain"] > 1e-2


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_weights_are_bitwise_what_they_were_before_the_second_pass(name, found):
    assert all(rank[name]["restored"] for rank in found)


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_metrics_and_gate_have_the_loss_of_the_first_pass(name, found):
    for rank in found:
        for losses in ("losses", "gated losses"):
            assert rank[name][losses] == pytest.approx(rank[name]["expected losses"], rel=1e-4)


def test_without_a_radius_the_run_is_that_of_the_optimizer_inside(found):
    assert all(rank["plain"] for rank in found)


def test_evaluation_sees_the_average(found):
    for rank in found:
        assert rank["schedule_free"]["evaluated"] == [2, 4, 6, 8]
        assert rank["schedule_free"]["sees the average"]


@pytest.mark.parametrize(
    "what",
    [
        *("trains on", "resumes", "back after an error", "resumes after an error"),
        *("same after export", "exported"),
    ],
)
def test_nothing_else_sees_the_average(what, found):
    assert all(rank["schedule_free"][what] for rank in found)


def test_a_schedule_that_decays_is_refused(found):
    for rank in found:
        assert "CosWithWarmup lowers the learning rate" in rank["schedule_free"]["refused"]
        assert "allowed are schedules that never do" in rank["schedule_free"]["refused"]


@pytest.mark.parametrize(
    "scheduler", [LinearWithWarmup(warmup=3), InvSqrtWithWarmup(warmup=3)], ids=str
)
def test_schedules_are_known_by_what_they_do(scheduler: Scheduler):
    check_never_decays(None, 0.1, 100, "scheduler")
    check_never_decays(ConstantWithWarmup(warmup=30), 0.1, 100, "scheduler")
    with pytest.raises(OLMoConfigurationError, match="scheduler: .* lowers .* allowed"):
        check_never_decays(scheduler, 0.1, 100, "scheduler")


def test_a_second_pass_that_fails_leaves_the_weights_as_they_were(monkeypatch):
    model = nn.Linear(3, 2)
    optim = SAMConfig().build(model)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    moved: List[bool] = []

    def fails(module: Any, batch: Dict[str, Any]) -> None:
        del module, batch
        moved.extend(not param.equal(start[name]) for name, param in model.named_parameters())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sharpness, "backward_again", fails)
    monkeypatch.setattr(sharpness, "transformer_of", lambda module, owner: module)
    callback, module = SAMCallback(), SimpleNamespace(optim=optim, zero_grads=optim.zero_grad)
    callback.trainer = SimpleNamespace(train_module=module)  # type: ignore[assignment]
    callback.pre_step({})
    model(torch.ones(3)).sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        callback.pre_optim_step()
    assert moved == [True, True]
    assert all(param.equal(start[name]) for name, param in model.named_parameters())
    optim.state_dict()


@pytest.mark.parametrize(
    "callback,config,allowed",
    [
        (AveragingCallback(), AdamWConfig(), "is a AdamW, allowed is schedule_free"),
        (SAMCallback(), SAMConfig(), "is a SimpleNamespace, allowed is TransformerTrainModule"),
    ],
    ids=["averaging", "sam"],
)
def test_callbacks_refuse_what_they_are_not_for(callback, config, allowed):
    optim = config.build(nn.Linear(3, 2))
    callback.trainer = SimpleNamespace(train_module=SimpleNamespace(optim=optim))
    with pytest.raises(OLMoConfigurationError, match=allowed):
        callback.post_attach()
