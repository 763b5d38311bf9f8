"""
Stages in their places: sizes, schedules, warm-ups.
"""

from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.plans import plan_stages
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.training import JolmoModel

from .spec import tiny_spec, write_spec


def stage(name: str, **fields: Any) -> Dict[str, Any]:
    return {"name": name, "tokens": 256 * 40, "mixture": {"first": 1}, **fields}


def load(folder: Path, *stages: Dict[str, Any], **changes: Any) -> JolmoModel:
    spec = load_spec(write_spec(folder / "s.yaml", tiny_spec(folder, stages=[*stages], **changes)))
    spec.check()
    return spec


class Progress:
    """What a scheduler asks of the trainer."""

    def __init__(self, step: int, tokens: int):
        self.global_step, self.global_train_tokens_seen = step, tokens


def rates(spec: JolmoModel, lr: Any = 1.0) -> List[float]:
    """At each step of the run."""
    plans, out = plan_stages(spec), []
    for plan in plans:
        scheduler = plan.scheduler(spec, plans)
        for step in range(plan.first_step + 1, plan.last_step + 1):
            group = {"lr": lr, "initial_lr": 1.0}
            scheduler.set_lr(group, Progress(step, plan.tokens_at(step)))
            t_max = plans[-1].span.within(scheduler.units)[1]
            now = step if scheduler.units == "steps" else plan.tokens_at(step)
            assert float(group["lr"]) == pytest.approx(scheduler.get_lr(1.0, now, t_max), rel=1e-6)
            out.append(float(group["lr"]))
    return out


def test_steps_and_tokens_count_on_through_stages_of_other_batches(tmp_path):
    spec = load(
        tmp_path,
        stage("a", tokens=256 * 3 + 1),
        stage("b", tokens=1024, global_batch_size=512),
        stage("c", tokens=512, sequence_length=64, rank_microbatch_size=256),
    )
    plans = plan_stages(spec)
    assert [(p.first_step, p.last_step) for p in plans] == [(0, 4), (4, 6), (6, 8)]
    assert [(p.first_token, p.last_token) for p in plans] == [(0, 1024), (1024, 2048), (2048, 2560)]
    assert plans[1].tokens_at(5) == 1536
    assert [p.sequence_length for p in plans] == [32, 32, 64]
    config = spec.train_module_config(1, plans[2].spec)
    assert (config.rank_microbatch_size, config.max_sequence_length) == (256, 64)


@pytest.mark.parametrize("units", ["steps", "tokens"])
def test_the_runs_schedule_spans_the_stages_and_a_stages_own_only_that(units, tmp_path):
    per = 1 if units == "steps" else 256
    linear = {"type": "linear_with_warmup", "warmup": 10 * per, "alpha_f": 0.0, "units": units}
    spec = load(
        tmp_path,
        stage("a", lr_scale=0.5),
        stage("b", scheduler=linear),
        stage("c"),
        scheduler={"type": "linear_with_warmup", "warmup": 20 * per, "units": units},
    )
    got = rates(spec)
    assert got[9] == pytest.approx(0.25)  # half way up, half as high
    assert got[19] == pytest.approx(0.5)
    assert got[40 + 9] == pytest.approx(1.0)
    assert got[40 + 24] == pytest.approx(0.5)
    assert got[79] == pytest.approx(0.0)
    assert got[80 + 19] == pytest.approx(1 - 0.9 * 0.8)  # at 100 of 120
    assert got[119] == pytest.approx(0.1)


def test_a_rate_on_the_device_is_set_in_place(tmp_path):
    spec = load(tmp_path, stage("a", lr_scale=0.5, warmup=4), scheduler=None)
    rate = torch.tensor(1.0)
    assert rates(spec, rate)[:5] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert rate == 0.5


def test_another_optimizer_warms_up_by_default(tmp_path):
    adamw, soap = {"name": "adamw"}, {"name": "soap"}
    stages = [
        stage("a"),
        stage("b", optimizer=soap),
        stage("c", optimizer={**soap, "lr": 0.1}),
        stage("d", optimizer={"name": "lookahead", "inner": soap}),
        stage("e", tokens=256 * 4000),
        stage("f", optimizer=soap, warmup=0),
    ]
    plans = plan_stages(load(tmp_path, *stages, optimizer=adamw, scheduler=None))
    assert [plan.changes_optimizer for plan in plans] == [False, True, False, True, True, True]
    assert [plan.warmup for plan in plans] == [0, 2, 0, 2, 100, 0]
    assert rates(load(tmp_path, *stages[:2], optimizer=adamw, scheduler=None))[40:43] == [0.5, 1, 1]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"optimizer": {"name": "sopa"}}, "stages.1.optimizer.name: .*'sopa'.*soap"),
        ({"optimizer": {"name": "soap", "lrr": 1}}, "stages.1.optimizer.lrr: .*lr"),
        ({"optimizer": {"name": "soap", "lr": -1}}, "stages.1.optimizer: .*'lr' is -1"),
        ({"optimizer": 3}, "stages.1.optimizer: 3 .*a mapping"),
        ({"scheduler": {"type": "wsq"}}, "stages.1.scheduler.type: 'wsq'.*wsd"),
        ({"scheduler": {"type": "wsd", "warmp": 1}}, "stages.1.scheduler.warmp: "),
        (
            {"optimizer": {"name": "olmo_core.skip_step_adamw"}},
            "stages.1.optimizer.name: 'olmo_core.skip_step_adamw' .*the optimizer before it",
        ),
        ({"warmup": -1}, "stages.1.warmup: -1 .*>= 0"),
        ({"sequence_length": 0}, "stages.1.sequence_length: 0 .*>= 1"),
        ({"sequence_length": 48}, "stages.1.rank_microbatch_size: 128 .*sequence_length .48"),
        ({"global_batch_size": 300}, "stages.1.global_batch_size: 300 .*128 x 1"),
        ({"rank_microbatch_size": 100}, "stages.1.rank_microbatch_size: 100"),
        (
            {"sequence_length": 512, "rank_microbatch_size": 512, "global_batch_size": 512},
            "512 x 2",
        ),
    ],
    ids=str,
)
def test_a_bad_value_of_a_stage_is_named(change, message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message) as caught:
        load(tmp_path, stage("a"), stage("b", **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "start,message",
    [
        ({}, "warm_start.path: this key is required"),
        ({"path": "x", "optimizer": {"name": "adamw"}}, "warm_start.optimizer_state: False .*true"),
        (
            {"path": "x", "optimizer_state": True, "optimizer": {"name": "adamx"}},
            "warm_start.optimizer.name: .*'adamx'",
        ),
        ({"path": "x", "steps": 3}, "warm_start.steps: there is no such key"),
        (3, "warm_start: 3 .*a mapping"),
    ],
    ids=str,
)
def test_a_bad_warm_start_is_named(start, message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message):
        load(tmp_path, stage("a"), warm_start=start)
