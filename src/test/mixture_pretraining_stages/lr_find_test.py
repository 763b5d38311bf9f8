"""
Range tests of whole experiments, as a user types them.
"""

import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
from matplotlib.image import imread
from rich.console import Console

from mixture_pretraining_stages.callbacks import StopOnSignal
from mixture_pretraining_stages.lr_find import LRFind, _overrides
from mixture_pretraining_stages.reading import load_spec

from .spec import tiny_spec, write_spec

Call = Callable[..., Tuple[int, str]]


@pytest.fixture
def call(call) -> Call:
    def run(*arguments: object) -> Tuple[int, str]:
        code, out, err = call("lr-find", *arguments)
        return code, out + err

    return run


def content(folder: Path) -> Dict[str, bytes]:
    """What is in a folder of a run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "lr_find" not in path.name
    }


def found_in(folder: Path) -> Dict[str, Any]:
    return json.loads((folder / "lr_find.json").read_text())


def test_it_suggests_a_rate_and_leaves_the_run_in_the_folder_alone(call, tmp_path):
    stages = [
        # In tokens, so that shares are those of the stage and not of the test.
        {"name": "one", "tokens": 2560, "mixture": {"first": {"tokens": 1920}, "second": 1.0}},
        {"name": "two", "tokens": 256, "mixture": {"second": 1}},
    ]
    stages[0].update(optimizer={"name": "muon", "lr": 0.01, "adamw_lr": 0.004}, lr_scale=0.5)
    path = write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path, stages=stages))
    output = tmp_path / "run"
    (output / "stages" / "00-one" / "step3").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "roles.txt", "stages/00-one/step3/x"):
        (output / name).write_text("of the run")
    before = content(output)

    code, out = call(path, "--steps", 60)
    assert code == 0, out
    assert content(output) == before
    assert not (output / "lr_find.work").exists()
    assert imread(output / "lr_find.png").shape[:2] == (650, 1170)

    found = found_in(output)
    assert found["min_lr"] == pytest.approx(1e-5) and found["max_lr"] == pytest.approx(10)
    assert found["rates"][0] == pytest.approx(1e-5)
    assert len(found["rates"]) == len(found["losses"]) <= 59
    assert 1e-3 < found["suggestion"] < 1
    # The stage has half of its optimizer's rate.
    lr, adamw_lr = (float(each.partition("=")[2]) for each in found["overrides"])
    assert lr == pytest.approx(2 * found["suggestion"], rel=0.01)
    assert adamw_lr == pytest.approx(0.4 * lr, rel=0.01)
    command = f"olmo-optim pretrain {path} {' '.join(found['overrides'])}"
    assert f"Next: {command}\n" in out
    assert f"suggestion             {found['suggestion']:.2g}" in out
    again = load_spec(path, found["overrides"])
    assert again.optimizer_config(again.stages[0]).lr == lr  # type: ignore[attr-defined]


def test_without_a_suggestion_the_exit_code_is_1(call, tmp_path):
    spec = tiny_spec(tmp_path, optimizer={"name": "adamw"})
    code, out = call(write_spec(tmp_path / "spec.yaml", spec), "--max-lr", 1e-5, "--steps", 20)
    assert code == 1
    assert re.search("No suggestion: the loss .* go to higher .*--max-lr", out)
    assert "Next" not in out
    assert found_in(tmp_path / "run")["suggestion"] is None


def test_an_interrupted_test_writes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.setattr(StopOnSignal, "asked", lambda self: self.step >= 3)
    path = write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path))
    code, out = call(path, "--steps", 20)
    assert code == 1
    assert "Interrupted at step 3 of 20; nothing was written. Try again with: " in out
    assert {each.name for each in (tmp_path / "run").iterdir()} == {
        *("lr_find.log", ".lr_find.lock")
    }


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--min-lr", "0"], "--min-lr: 0.0 is not allowed, allowed is a finite number > 0"),
        (["--max-lr", "nan"], "--max-lr: nan is not allowed"),
        (["--min-lr", "1", "--max-lr", "0.1"], "--min-lr: 1.0 .*less than that of --max-lr, 0.1"),
        (["--steps", "5"], "--steps.*greater than or equal to 20"),
        (["optimizer.lr=0"], "optimizer.lr: 0.0 is not allowed, allowed is .* > 0"),
        (["stages.0.optimizer={name: adamw, lr: 0}"], "stages.0.optimizer.lr: 0.0 is"),
        (
            ["optimizer={name: lookahead, inner: {name: adafactor}}", "--max-lr", "1"],
            "--max-lr: 1.0 .*at most 0.1 with 100 steps",
        ),
        (["optimizer.name=sopa"], "sopa"),
        (["output=/proc/nothing"], "output: /proc/nothing cannot be written"),
        (["sources.first.path=nowhere.txt"], "sources.first.path.*nowhere.txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, message, call, tmp_path):
    code, out = call(write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path)), *arguments)
    assert code == 2
    assert re.search(message, out)
    assert len(out.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "optimizer,expected",
    [
        ({"name": "muon"}, ["optimizer.lr=0.04"]),
        ({"name": "muon", "adamw_lr": 1e-3}, ["optimizer.lr=0.04", "optimizer.adamw_lr=0.002"]),
        ({"name": "sam", "inner": {"lr": 0.02, "betas": [0, 0]}}, ["optimizer.inner.lr=0.04"]),
        ({"name": "sam", "lr": 0.02, "inner": {}}, ["optimizer.lr=0.04"]),
        (
            {
                "name": "adamw",
                "group_overrides": [
                    {"params": ["*norm*"], "opts": {"weight_decay": 0.0}},
                    {"params": ["*embed*"], "opts": {"lr": 0.5}},
                ],
            },
            ["optimizer.lr=0.04", "optimizer.group_overrides.1.opts.lr=1"],
        ),
    ],
)
def test_what_to_type_next_has_all_rates_in_proportion(optimizer, expected):
    assert _overrides(optimizer, "optimizer", 0.02, 2.0) == expected


def test_rates_beyond_what_adafactor_takes_are_not_in_the_range(tmp_path):
    spec = tiny_spec(tmp_path, optimizer={"name": "adafactor", "lr": 0.01})
    loaded = load_spec(write_spec(tmp_path / "spec.yaml", spec))
    test = LRFind(loaded, Console(), steps=25)
    assert test.min_lr == pytest.approx(1e-5) and test.max_lr == pytest.approx(0.2)
