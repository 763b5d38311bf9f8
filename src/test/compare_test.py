"""
``olmo-optim compare``, as a user types it.
"""

import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict

import pytest
from omegaconf import OmegaConf

from mixture_pretraining_stages.callbacks import read_metrics
from mixture_pretraining_stages.comparing import workers
from mixture_pretraining_stages.comparing.comparison import plan_comparison, validation_losses
from mixture_pretraining_stages.comparing.folder import results
from mixture_pretraining_stages.reading import load_spec
from olmo_optim_ext import cli
from olmo_optim_ext.cli import compare

from .mixture_pretraining_stages.comparing.workers_test import FAKE
from .mixture_pretraining_stages.spec import tiny_spec, write_spec

WORKER = Path(__file__).parent / "mixture_pretraining_stages" / "comparing" / "compare_worker.py"


@pytest.fixture
def without_training(monkeypatch) -> None:
    monkeypatch.setattr(workers, "COMMAND", FAKE)
    monkeypatch.setattr(compare, "write_report", lambda paths: paths)
    monkeypatch.setattr(compare, "show", lambda paths: print("The report:", *paths))
    monkeypatch.setattr(workers, "POLL", 0.02)
    monkeypatch.setattr(workers, "REFRESH", 0.1)


def config(folder: Path, **changes: Any) -> str:
    return str(write_spec(folder / "spec.yaml", tiny_spec(folder, **changes)))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "comparison.arms.*--optimizers"),
        (["--optimizers", "adamw,mun"], "comparison.arms.mun.*did you mean ext_muon"),
        (["--optimizers", "muon,ext_muon"], "--optimizers: 'muon,ext_muon'"),
        (["--optimizers", ""], "comparison.arms"),
        (["--optimizers", "adamw", "--lrs", "0"], "--lrs.*greater than or equal to 1"),
        (["--optimizers", "adamw", "--seeds", "x"], "--seeds.*integer"),
        (["--optimizers", "adamw", "--jobs", "0"], "--jobs"),
        (["--optimizers", "adamw", "--nproc", "3"], "global_batch_size"),
        (["--optimizers", "adamw", "--lrs", "1", "--tune"], "--lrs: 1"),
        (["--optimizers", "adamw", "--storage", "nonsense"], "--storage: 'nonsense'"),
        (["--optimizers", "adamw", "output=/proc/nothing"], "output: /proc/nothing cannot be"),
        (["--optimizers", "adamw", "sources.first.path=nowhere"], "sources.first.path.*nowhere"),
        (["comparison.arms={{a: {{optimizer.blok: 1}}}}"], "arms.a.optimizer.blok"),
        (["comparison.seed=3"], "comparison.seed: there is no such key"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, message, call, tmp_path):
    code, out, err = call("compare", config(tmp_path), *(each.format() for each in arguments))
    assert code == 2, out + err
    assert re.search(message, out + err)
    assert "Traceback" not in out + err
    assert len((out + err).strip().splitlines()) == 1
    assert not (tmp_path / "run" / "runs").exists()


def test_without_optuna_it_says_what_to_install(call, tmp_path, monkeypatch):
    find = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name == "optuna" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    code, _, err = call("compare", config(tmp_path), "--optimizers", "adamw")
    assert code == 2
    assert "pip install 'olmo-optim-ext[compare]'" in err


@pytest.mark.parametrize("command", ["pretrain", "submit"])
def test_commands_for_one_run_refuse_the_config_of_a_comparison(command, call, tmp_path):
    code, out, err = call(command, config(tmp_path, comparison={"arms": {"muon": {}}}))
    assert code == 2
    assert "comparison: this is for many runs" in err
    assert not (tmp_path / "run").exists()


def test_it_shows_what_it_does_and_the_same_command_finds_nothing_to_do(
    call, tmp_path, without_training
):
    command = ["compare", config(tmp_path), "--optimizers", "muon", "--lrs", "3", "--seeds", "1"]
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    assert "tiny: 2 arms with 3 runs each" in out
    assert "6 of 6 runs done" in out
    assert "muon lr-0.01/seed-42: complete, loss 1.0420" in out
    assert f"The report: {tmp_path}/run" in out
    again, out, _ = call(*command)
    assert again == 0
    assert "complete, loss" not in out and "The report:" in out


def test_a_failed_run_is_told_at_the_end(call, tmp_path, without_training):
    arms: Dict[str, Any] = {"broken": {}, "diverging": {}, "fine": {}}
    path = config(tmp_path, comparison={"arms": arms, "baseline": "fine", "lrs": 1, "seeds": 1})
    code, out, err = call("compare", path)
    assert code == 1
    assert "broken lr 0.01 seed 42: The run failed: RuntimeError: broken." in err
    assert "diverging lr 0.01 seed 42: it diverged" in err
    assert "Failed runs: 1." in err
    assert "fine lr-0.01/seed-42: complete, loss 1.0420" in out


def test_interrupted_it_says_how_far_it_is(call, tmp_path, without_training, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.1")
    path = config(tmp_path, comparison={"arms": {"muon": {}}, "baseline": "muon"})
    parent = os.getpid()
    if (child := os.fork()) == 0:
        time.sleep(1)
        os.kill(parent, signal.SIGINT)
        os._exit(0)
    code, out, err = call("compare", path)
    os.waitpid(child, 0)
    assert code == 1
    assert "Interrupted; 0 of 15 runs are done. The same command continues." in err


def test_a_run_ends_when_its_parent_has_ended():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(reading, 0)
        os.close(writing)
        sys.argv = ["olmo-optim", "list"]
        sys.modules.pop("mixture_pretraining_stages.comparing.child", None)
        cli.main = lambda: time.sleep(60)  # type: ignore[assignment, return-value]
        runpy.run_module("mixture_pretraining_stages.comparing.child", run_name="__main__")
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(writing)  # as a killed parent does
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_comparison_from_beginning_to_end(tmp_path):
    stages = [{"name": "one", "tokens": 256 * 8, "mixture": {"first": 3, "second": 1}}]
    path = config(tmp_path, stages=stages)
    command = ["compare", path, "--optimizers", "adamw,muon", "--lrs", "2", "--seeds", "1"]
    result = subprocess.run(
        [sys.executable, str(WORKER), *command, "--jobs", "1"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    comparison = plan_comparison(
        load_spec(Path(path)), optimizers=["adamw", "muon"], lrs=2, seeds=1
    )
    found = {(each.run.arm, each.run.lr): each for each in results(comparison)}
    assert list(found) == [("adamw", 5e-4), ("adamw", 1e-3), ("muon", 0.005), ("muon", 0.01)]
    for each in found.values():
        assert each.state == "complete"
        assert f"complete, loss {each.loss:.4f}" in result.stdout
        rows = read_metrics(each.run.folder / "metrics.jsonl")
        trained = [row for row in rows if "train/CE loss" in row]
        assert [row["step"] for row in trained] == list(range(1, 9))
        assert validation_losses(rows, ["first", "second"])[-1] == (8, each.loss)
        assert trained[3]["optim/LR (group 0)"] == pytest.approx(each.run.lr)
    # In 8 steps of a model of this size the larger rate is the better one.
    assert found["muon", 0.01].loss < found["muon", 0.005].loss < found["adamw", 1e-3].loss
    plain = OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / "comparison.yaml"))
    assert isinstance(plain, dict)
    expected = {"name": "tiny", "baseline": "adamw", "tolerance": None, "criteria": False}
    assert expected.items() <= plain.items()
    assert plain["lrs"] == {"adamw": [5e-4, 1e-3], "muon": [0.005, 0.01]}
    assert (plain["seeds"], plain["tune"]) == ([42], False)
    assert plain["spec"] == comparison.spec.as_plain()
    assert "muon" in (tmp_path / "run" / "report" / "report.html").read_text()
