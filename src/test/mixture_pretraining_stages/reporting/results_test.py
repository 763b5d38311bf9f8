"""
Reading runs and comparisons from disk, whatever state they are in.
"""

import json
import math
from pathlib import Path
from typing import Any, Dict, List

import pytest
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.callbacks import keep_metrics
from mixture_pretraining_stages.reporting.results import Results, load_runs
from mixture_pretraining_stages.reporting.statistics import study

from .synthetic import write_comparison, write_run, write_trial


def load_one(path: Path):
    (run,) = load_runs([path]).runs
    return run


def test_a_finished_run_is_read_with_its_losses_tokens_and_seconds(tmp_path):
    run = load_one(write_run(tmp_path / "run", 2.0))
    assert (run.arm, run.lr, run.seed, run.state, run.error) == ("muon", 0.01, 0, "complete", None)
    assert [each.step for each in run.evaluations] == [3, 6, 9, 12, 15, 18]
    assert run.final is not None
    assert run.final.loss == pytest.approx(2.0)
    assert run.final.losses == pytest.approx({"first": 1.9, "second": 2.1})
    assert run.final.bits["first"] == pytest.approx(1.9 / math.log(2))
    assert (run.final.tokens, run.final.seconds) == (256 * 18, pytest.approx(5 + 17 * 0.5))
    assert run.facts["parameters"] == 1000


def test_a_run_that_has_not_reached_its_last_step_is_unfinished(tmp_path):
    run = load_one(write_run(tmp_path / "run", until=9))
    assert (run.state, run.final, run.broken) == ("running", None, None)
    assert [each.step for each in run.evaluations] == [3, 6, 9]


def test_time_goes_on_after_a_kill_without_the_steps_that_ran_again(tmp_path):
    folder = write_run(tmp_path / "run", until=11)
    metrics = folder / "metrics.jsonl"
    keep_metrics(metrics, 9)
    kept = metrics.read_text()
    write_run(folder, step_seconds=2.0)
    resumed = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] > 9]
    metrics.write_text(kept + "\n".join(resumed) + '\n{"step": 19, "sta')
    run = load_one(folder)
    assert run.state == "complete"
    assert run.final is not None
    assert run.final.seconds == pytest.approx(5 + 8 * 0.5 + 9 * 2)


def test_without_times_there_is_no_axis_of_time(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    del rows[4]["timing/step seconds"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_one(folder)
    assert run.seconds is None
    assert {each.seconds for each in run.evaluations} == {None}


def test_only_evaluations_with_all_sources_are_compared(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    del rows[5]["eval/validation/second/CE loss"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each.step for each in load_one(folder).evaluations] == [3, 9, 12, 15, 18]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.yaml").unlink(),
        lambda folder: (folder / "config.yaml").write_bytes(bytes(range(256))),
        lambda folder: (folder / "config.yaml").write_text("- a\n- list"),
        lambda folder: (folder / "config.yaml").write_text("name: 3\nof: another version\n"),
        lambda folder: (folder / "metrics.jsonl").unlink(),
        lambda folder: (folder / "metrics.jsonl").write_text('[1]\n{"step": 3}\n{"ste'),
        lambda folder: (folder / "metrics.jsonl").write_bytes(b'\xff{"step": 3}\n'),
        lambda folder: (folder / "metrics.jsonl").write_text('{"step": 3, "stage": "one"}\n'),
        lambda folder: (folder / "metrics.jsonl").write_text(
            '{"step": "3", "stage": "one", "tokens": 1}\n'
            '{"step": 4, "stage": "one", "tokens": 1, "eval/validation/first/CE loss": "low"}\n'
        ),
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "run.json").write_text('{"state_bytes": {"one": null}}'),
    ],
)
def test_a_damaged_run_is_read_as_far_as_it_goes(damage, tmp_path):
    folder = write_run(tmp_path / "run")
    damage(folder)
    run = load_one(folder)
    assert run.arm in ("muon", "run")
    assert study(Results([run])).arms
    if run.config == {} or not run.rows:
        assert run.state == "running"


def test_a_config_without_a_rate_has_that_of_the_optimizer(tmp_path):
    folder = write_run(tmp_path / "run", optimizer={"name": "muon"})
    assert load_one(folder).lr == 0.01
    wrapped = {"name": "lookahead", "inner": {"name": "sgd", "lr": 0.5}}
    assert load_one(write_run(tmp_path / "wrapped", optimizer=wrapped)).lr == 0.5
    other = load_one(write_run(tmp_path / "other", optimizer={"name": "olmo_core.adamw"}))
    assert (other.arm, other.lr) == ("olmo_core.adamw", None)


def test_lone_runs_are_named_by_what_differs(tmp_path):
    specs: List[Dict[str, Any]] = [
        {"optimizer": {"name": "muon", "lr": 0.01, "momentum": 0.9}},
        {"optimizer": {"name": "muon", "lr": 0.02, "momentum": 0.9}, "seed": 1},
        {"optimizer": {"name": "muon", "lr": 0.01, "momentum": 0.95}},
        {"optimizer": {"name": "adamw", "lr": 0.01}},
    ]
    folders = [write_run(tmp_path / str(i), **spec) for i, spec in enumerate(specs)]
    names = [run.arm for run in load_runs(folders).runs]
    assert names == ["muon momentum=0.9", "muon momentum=0.9", "muon momentum=0.95", "adamw"]
    again = write_run(tmp_path / "again", **specs[3])
    assert [run.arm for run in load_runs([folders[3], again]).runs] == [
        "adamw (3)",
        "adamw (again)",
    ]
    longer = write_run(tmp_path / "longer", **specs[3], max_grad_norm=2.0)
    assert [run.arm for run in load_runs([folders[3], longer]).runs] == [
        "adamw max_grad_norm=None",
        "adamw max_grad_norm=2.0",
    ]


def test_the_same_folder_twice_is_one_run(tmp_path):
    folder = write_run(tmp_path / "run")
    assert len(load_runs([folder, folder / ".." / "run"]).runs) == 1
    root = write_comparison(tmp_path / "c", {"adamw": [0.1]}, [0])
    of_it = write_trial(root, "adamw", 0.1, 0)
    assert [run.arm for run in load_runs([of_it, root]).runs] == ["adamw"]


def test_a_comparison_is_what_its_trials_say(tmp_path):
    root = write_comparison(tmp_path / "c", {"adamw": [0.1, 0.2]}, [0, 1], tolerance=0.05)
    write_trial(root, "adamw", 0.1, 0)
    write_trial(root, "adamw", 0.1, 1, state="failed", error="loss is nan", until=7)
    odd = write_trial(root, "adamw", 0.2, 0, state="unheard of")
    bare = root / "runs" / "adamw" / "lr-0.2" / "seed-1"
    bare.mkdir(parents=True)
    results = load_runs([root])
    (comparison,) = results.comparisons
    assert (comparison.name, comparison.baseline, comparison.tolerance) == ("c", "adamw", 0.05)
    assert comparison.lrs == {"adamw": [0.1, 0.2]}
    states = {(run.lr, run.seed): (run.state, run.broken) for run in results.runs}
    assert states == {
        (0.1, 0): ("complete", None),
        (0.1, 1): ("failed", "loss is nan"),
        (0.2, 0): ("running", None),
        (0.2, 1): ("running", None),
    }
    (odd / "trial.json").write_text("{half")
    assert {run.arm for run in load_runs([root]).runs} == {"adamw"}
    # A run of it on its own is still what it was.
    assert load_one(root / "runs" / "adamw" / "lr-0.1" / "seed-1").error == "loss is nan"


def test_a_complete_trial_without_losses_counts_as_broken(tmp_path):
    root = write_comparison(tmp_path / "c", {"adamw": [0.1]}, [0, 1])
    (write_trial(root, "adamw", 0.1, 0) / "metrics.jsonl").unlink()
    write_trial(root, "adamw", 0.1, 1, float("nan"))
    without, diverged = load_runs([root]).runs
    assert without.broken == "complete, but without an evaluation in metrics.jsonl"
    assert diverged.broken == "diverged: its final loss is nan"


def test_arms_of_two_comparisons_stay_apart(tmp_path):
    roots = [write_comparison(tmp_path / n, {"adamw": [0.1]}, [0]) for n in ("one", "two")]
    for root in roots:
        write_trial(root, "adamw", 0.1, 0)
    lone = write_run(tmp_path / "lone", optimizer={"name": "adamw", "lr": 0.1})
    results = load_runs([*roots, lone])
    assert [run.arm for run in results.runs] == ["adamw", "two: adamw", "adamw (lone)"]
    assert [comparison.baseline for comparison in results.comparisons] == ["adamw", "two: adamw"]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(OLMoConfigurationError, match="neither a run nor a comparison, allowed"):
            load_runs([path])


@pytest.mark.parametrize("text", ["", "{", "- 1", "name: x", "{baseline: a, lrs: {a: [x]}}"])
def test_a_damaged_comparison_is_named(text, tmp_path):
    (tmp_path / "comparison.yaml").write_text(text)
    with pytest.raises(OLMoConfigurationError, match="comparison.yaml: it is damaged"):
        load_runs([tmp_path])


def test_no_two_runs_have_the_same_name_rate_and_seed(tmp_path):
    """Or one of them would take the other's place in a mean."""
    adamw = {"name": "adamw", "lr": 0.1}
    lone = [write_run(tmp_path / n / "run", optimizer=adamw) for n in ("one", "two", "three")]
    names = [run.arm for run in load_runs(lone).runs]
    assert names == ["adamw (run)", "adamw (run) 2", "adamw (run) 3"]
    again = [tmp_path / name / "c" for name in ("first", "second", "third")]
    for root in again:
        write_trial(write_comparison(root, {"adamw": [0.1]}, [0]), "adamw", 0.1, 0)
    results = load_runs(again)
    assert [run.arm for run in results.runs] == ["adamw", "c: adamw", "c: adamw 2"]
    assert [c.baseline for c in results.comparisons] == ["adamw", "c: adamw", "c: adamw 2"]
