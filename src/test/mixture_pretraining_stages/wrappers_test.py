"""
Experiments with wrappers: what is added by itself, and what is refused.
"""

from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from olmo_core.distributed.checkpoint import unshard_checkpoint
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.callbacks import read_metrics
from mixture_pretraining_stages.reading import load_spec
from olmo_optim_ext import LookaheadConfig, MuonConfig, ScheduleFreeConfig

from .run_test import FINISHED, KILLED, assert_same_end, final_state, run
from .spec import tiny_spec, write_spec

SAME_RATE = [
    {"name": "one", "tokens": 256 * 12, "mixture": {"first": 3, "second": 1}},
    {"name": "two", "tokens": 256 * 6, "mixture": {"second": 1}},
]
FREE: Dict[str, Any] = dict(
    optimizer={"name": "schedule_free", "lr": 0.01, "warmup_steps": 2},
    scheduler=None,
    stages=SAME_RATE,
)


def averaged(output: Path, scratch: Path) -> Dict[str, torch.Tensor]:
    model, _ = unshard_checkpoint(output / "averaged", scratch, optim=False, quiet=True)
    return torch.load(model)


def test_the_average_is_evaluated_and_kept_and_no_kill_changes_it(tmp_path):
    outputs = []
    # Killed within an evaluation, and before the average is saved; a process counts anew.
    for name, moments in (
        ("whole", []),
        ("killed", ["ScheduleFree.swap_to_average:2", "ScheduleFree.swap_to_average:5"]),
    ):
        spec = tiny_spec(tmp_path / name, **FREE)
        assert run(spec, *moments) == [KILLED] * len(moments) + [FINISHED]
        outputs.append(tmp_path / name / "run")
    whole, killed = outputs
    assert_same_end(killed, whole, tmp_path)
    kept = averaged(whole, tmp_path / "kept")
    again = averaged(killed, tmp_path / "again")
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    # Checkpoints have what is trained.
    trained = final_state(whole, tmp_path / "trained")
    same = [key for key in kept if torch.equal(trained[f".{key}"], kept[key])]
    assert same == []
    evaluated = [
        row["step"]
        for row in read_metrics(whole / "metrics.jsonl")
        if "eval/validation/first/CE loss" in row
    ]
    assert evaluated == [4, 8, 12, 16, 18]


def test_another_optimizer_begins_with_the_average_that_was_evaluated(tmp_path):
    # At a learning rate of 0, so that its weights stay those that it began with.
    after = {**SAME_RATE[1], "tokens": 512, "optimizer": {"name": "adamw"}, "lr_scale": 0.0}
    spec = tiny_spec(tmp_path, **{**FREE, "stages": [SAME_RATE[0], after]})
    assert run(spec) == [FINISHED]
    key = "eval/validation/first/CE loss"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    evaluated = {row["step"]: row[key] for row in rows if key in row}
    assert evaluated[14] == pytest.approx(evaluated[12], rel=1e-6)


def test_sam_gets_its_second_pass_and_reports_are_those_of_the_optimizer_inside(tmp_path):
    spec = tiny_spec(
        tmp_path,
        optimizer={"name": "sam", "inner": {"name": "muon", "lr": 0.01}, "interval": 2},
        optimizer_metrics={"every": 9, "per_layer": False},
    )
    assert run(spec) == [FINISHED]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["train/CE loss"] for row in rows if "train/CE loss" in row]
    assert len(losses) == 18 and losses[-1] < losses[0]
    assert [r["step"] for r in rows if "optim/update RMS/matrix" in r] == [9, 18]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"scheduler": {"type": "cos_with_warmup", "warmup": 2}}, "scheduler: CosWithWarmup low"),
        (
            {"stages": [SAME_RATE[0], {**SAME_RATE[1], "lr_scale": 0.5}]},
            "stages.1.lr_scale: 0.5 is not allowed, allowed is what keeps the learning rate",
        ),
    ],
    ids=["scheduler", "stages"],
)
def test_a_rate_that_falls_is_refused_for_an_average(change, message, tmp_path):
    spec = {**tiny_spec(tmp_path, **FREE), **change}
    with pytest.raises(OLMoConfigurationError, match=message):
        load_spec(write_spec(tmp_path / "spec.yaml", spec)).check()
    fine = {**spec, "optimizer": {"name": "adamw"}}
    load_spec(write_spec(tmp_path / "spec.yaml", fine)).check()


def test_a_schedule_that_only_warms_up_is_allowed(tmp_path):
    warmup = {"type": "constant_with_warmup", "warmup": 2}
    spec = {**tiny_spec(tmp_path, **FREE), "scheduler": warmup}
    load_spec(write_spec(tmp_path / "spec.yaml", spec)).check()


def test_the_optimizer_inside_is_chosen_with_dotted_keys(tmp_path):
    spec = tiny_spec(tmp_path, optimizer={"name": "lookahead", "k": 7})
    path = write_spec(tmp_path / "spec.yaml", spec)
    loaded = load_spec(path, ["optimizer.inner.name=muon", "optimizer.inner.lr=0.02"])
    config = loaded.optimizer_config()
    assert config == LookaheadConfig(inner={"name": "muon", "lr": 0.02}, k=7)
    assert isinstance(config, LookaheadConfig) and config.rule_config == MuonConfig(lr=0.02)
    loaded = load_spec(path, ["optimizer.name=schedule_free", "optimizer.k=null"])
    with pytest.raises(OLMoConfigurationError, match="optimizer.k: there is no such key"):
        loaded.optimizer_config()
    loaded = load_spec(path, ["optimizer={name: schedule_free, inner: {weight_decay: 0.1}}"])
    assert loaded.optimizer_config() == ScheduleFreeConfig(inner={"weight_decay": 0.1})
    wrong = load_spec(path, ["optimizer.inner.polar=svd"])
    with pytest.raises(OLMoConfigurationError, match="optimizer: .*'inner.polar' is no field of"):
        wrong.optimizer_config()
