"""
Scheduled experiments: what is drawn is what a run does, also one that is killed.
"""

from pathlib import Path
from typing import Any, Dict, List

import pytest
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.callbacks import read_metrics
from mixture_pretraining_stages.plans import plan_stages
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.schedule_plot import (
    Curve,
    draw_schedule,
    schedule_table,
    scheduled_values,
)

from .run_test import FINISHED, KILLED, run
from .spec import tiny_spec, write_spec

VOCAB_SIZE = 258
SCHEDULED: Dict[str, Any] = dict(
    optimizer={"name": "muon", "lr": 0.01, "adamw_lr": 0.002},
    scheduler={"type": "cyclic", "up_fraction": 0.1, "units": "tokens"},
    weight_decay_schedule={"type": "polynomial", "power": 2, "units": "tokens"},
    max_grad_value=0.01,
)


def curves(folder: Path, **changes: Any) -> List[Curve]:
    spec = load_spec(write_spec(folder / "spec.yaml", tiny_spec(folder, **changes)))
    spec.check()
    return scheduled_values(spec, VOCAB_SIZE)


def of(found: List[Curve], quantity: str, group: str) -> Dict[int, float]:
    """The values by step."""
    (curve,) = (c for c in found if c.quantity == quantity and group in c.groups)
    return dict(zip(curve.steps, curve.values))


def test_a_run_that_is_killed_steps_with_the_values_that_are_drawn(tmp_path):
    spec = tiny_spec(tmp_path, **SCHEDULED)
    spec["stages"][1]["global_batch_size"] = 512
    assert run(spec, "Checkpointer._save_metadata:2") == [KILLED, FINISHED]
    loaded = load_spec(tmp_path / "run.yaml")
    found = scheduled_values(loaded, VOCAB_SIZE)
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/CE loss" in r]
    assert [row["step"] for row in rows] == list(range(1, plan_stages(loaded)[-1].last_step + 1))
    for index, group in enumerate(["0 (adamw)", "1 (muon)"]):
        rate, decay = (of(found, what, group) for what in ("learning rate", "weight decay"))
        for row in rows:
            expected = pytest.approx(rate[row["step"]], rel=1e-6)
            assert row[f"optim/LR (group {index})"] == expected
            expected = pytest.approx(decay[row["step"]], rel=1e-6, abs=1e-12)
            assert row[f"optim/weight decay (group {index})"] == expected
    assert [curve.tokens for curve in found] == [[row["tokens"] for row in rows]] * len(found)


def test_the_curve_is_the_schedule_with_the_scales_of_stages(tmp_path):
    found = curves(tmp_path, scheduler={"type": "polynomial"})
    expected = {s: 0.01 * (1 - s / 18) * (1 if s <= 12 else 0.5) for s in range(1, 19)}
    assert of(found, "learning rate", "1 (muon)") == pytest.approx(expected)
    (curve,) = found
    assert curve.groups == ["0 (adamw)", "1 (muon)"]
    assert curve.tokens == [256 * step for step in range(1, 19)]


def test_momentum_is_drawn_where_something_moves_it(tmp_path):
    assert {c.quantity for c in curves(tmp_path)} == {"learning rate"}
    cycled = curves(tmp_path, scheduler={"type": "one_cycle", "warmup_fraction": 0.5})
    momentum = of(cycled, "momentum", "0 (adamw)")
    assert (momentum[9], momentum[18]) == pytest.approx((0.85, 0.95))
    scheduled = curves(tmp_path, momentum_schedule={"type": "polynomial", "alpha_f": 0.5})
    assert of(scheduled, "momentum", "1 (muon)")[18] == 0.95 / 2
    assert of(scheduled, "momentum", "0 (adamw)")[18] == 0.9 / 2


def test_optimizers_and_schedules_of_stages_have_curves_of_their_own(tmp_path):
    spec = tiny_spec(tmp_path, scheduler={"type": "polynomial", "alpha_f": 0.5})
    second = {"optimizer": {"name": "adamw", "lr": 0.1}, "scheduler": {"type": "one_cycle"}}
    stages = [spec["stages"][0], {**spec["stages"][1], **second, "warmup": 0}]
    found = curves(tmp_path, scheduler=spec["scheduler"], stages=stages)
    assert list(of(found, "learning rate", "muon 1 (muon)")) == list(range(1, 13))
    rate = of(found, "learning rate", "adamw 0")
    assert list(rate) == list(range(13, 19))
    assert rate[18] == pytest.approx(0.5 * 0.1 / 25e4)
    assert list(of(found, "momentum", "adamw 0")) == list(range(13, 19))


def test_long_runs_are_evaluated_at_some_steps_and_the_ends_of_stages(tmp_path):
    spec = tiny_spec(tmp_path, scheduler={"type": "polynomial"})
    stages = [{**stage, "tokens": 256 * 1_000_000} for stage in spec["stages"]]
    (curve,) = curves(tmp_path, scheduler=spec["scheduler"], stages=stages)
    assert len(curve.steps) < 10_100
    assert {1, 1_000_000, 1_000_001, 2_000_000} <= set(curve.steps)
    assert "not of every step" in str(schedule_table([curve]).caption)


def test_the_picture_replaces_another_whole(tmp_path):
    spec = load_spec(write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path, **SCHEDULED)))
    path = tmp_path / "schedule.png"
    path.write_bytes(b"another")
    draw_schedule(scheduled_values(spec, VOCAB_SIZE), plan_stages(spec), "tiny", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp*"))


BAD: Dict[str, Dict[str, Any]] = {
    "max_grad_value: 0.0 is.*a finite number > 0": {"max_grad_value": 0},
    "max_grad_value: inf": {"max_grad_value": float("inf")},
    "max_grad_value: 'x' is": {"max_grad_value": "x"},
    "weight_decay_schedule: 'linear' is.*a mapping": {"weight_decay_schedule": "linear"},
    "weight_decay_schedule.type: 'line' is": {"weight_decay_schedule": {"type": "line"}},
    "weight_decay_schedule.powr: there is no": {
        "weight_decay_schedule": {"type": "polynomial", "powr": 2}
    },
    "weight_decay_schedule: .*no 'weight_decay'": {
        "optimizer": {"name": "scion"},
        "weight_decay_schedule": {"type": "polynomial"},
    },
    "momentum_schedule.cycle_momentum: True": {"momentum_schedule": {"type": "one_cycle"}},
    "momentum_schedule: .* with scheduler.cycle_momentum": {
        "momentum_schedule": {"type": "polynomial"},
        "scheduler": {"type": "one_cycle"},
    },
    "momentum_schedule: .*schedule_free": {
        "momentum_schedule": {"type": "constant"},
        "optimizer": {"name": "schedule_free"},
        "scheduler": None,
        "stages": [{"name": "one", "tokens": 512, "mixture": {"first": 1}}],
    },
    "scheduler.schedulers.1.cycle_momentum: True": {
        "scheduler": {
            "type": "sequential",
            "schedulers": [{"type": "constant"}, {"type": "cyclic", "up": 3}],
            "schedulers_max": [5],
        }
    },
    "scheduler: CyclicScheduler: 'up' is 0": {"scheduler": {"type": "cyclic", "up": 0}},
    "scheduler: MultiStepScheduler: 'milestones' is .3, 2.": {
        "scheduler": {"type": "multi_step", "milestones": [3, 2]}
    },
    "CyclicScheduler: 'cycle_momentum' is True.*neither": {
        "scheduler": {"type": "cyclic", "up": 3},
        "optimizer": {"name": "adafactor"},
    },
    "scheduler: WSD at 18 of 18 steps fails for the learning rate 0.01": {
        "scheduler": {"type": "wsd", "warmup": 1, "decay_fraction": 0}
    },
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_schedule_names_the_key_before_anything_runs(message, tmp_path):
    spec = load_spec_of(tmp_path, BAD[message])
    with pytest.raises(OLMoConfigurationError, match=message) as caught:
        loaded = load_spec(spec)
        loaded.check()
        loaded.build_on_meta(VOCAB_SIZE)
    assert "\n" not in str(caught.value)


def load_spec_of(folder: Path, changes: Dict[str, Any]) -> Path:
    return write_spec(folder / "spec.yaml", {**tiny_spec(folder), **changes})
