"""
The command line, as a user types it.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest

import olmo_optim_ext
from mixture_pretraining_stages.facts import read_facts, state_bytes
from mixture_pretraining_stages.reading import load_spec
from olmo_optim_ext.cli.catalog import field_docs

from .mixture_pretraining_stages.reporting.synthetic import write_run
from .mixture_pretraining_stages.spec import tiny_spec, write_spec


def test_list_has_every_name(call):
    code, out, _ = call("list")
    assert code == 0
    for name in olmo_optim_ext.list_optimizers():
        assert name in out


@pytest.mark.parametrize("name", [*olmo_optim_ext.list_optimizers(), "muon"])
def test_show_has_every_field_with_its_meaning(name, call):
    code, out, _ = call("show", name)
    assert code == 0
    config_class = olmo_optim_ext.get_config_class(name)
    docs = field_docs(config_class)
    for field in config_class().hyperparameters():
        assert field in out
        assert len(docs[field]) > 10, field
    assert out.count("Preset ") == len(olmo_optim_ext.optimizer_info(name).presets)
    assert ("arXiv:2509.02046" in out) == bool(olmo_optim_ext.optimizer_info(name).presets)


def test_roles_are_those_of_the_config(call, tmp_path):
    path = str(write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path)))
    code, out, _ = call("roles", path, "optimizer.adamw_lr=0.125")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["lm_head.w_out.weight"][1:5] == ["384x16", "head", "adamw", "0.125"]
    assert lines["blocks.0.feed_forward.w2.weight"][2:4] == ["matrix", "muon"]
    code, out, _ = call("roles", path, "optimizer.muon_on_lm_head=true", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["lm_head.w_out.weight"]["algorithm"] == "muon"
    override = "stages.1.optimizer={name: adamw}"
    code, out, _ = call("roles", path, override, "--stage", "two")
    assert code == 0 and "muon" not in out
    assert not (tmp_path / "run").exists()


def test_the_quickstart_is_the_default(call):
    code, out, _ = call("roles")
    assert code == 0
    assert "blocks.3.attention.w_q.weight" in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["show", "sopa"], "there is no optimizer 'sopa'"),
        (["pretrain", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["pretrain", "optimizer.lr=quick"], "optimizer.lr: 'quick'"),
        (["pretrain", "--nproc", "0"], "--nproc.*greater than or equal to 1"),
        (["pretrain", "--nproc", "3"], "global_batch_size: 4096.*"),
        (["pretrain", "--fast"], "--fast"),
        (["roles", "model=olmo9"], "olmo9"),
        (["roles", "--stage", "aneal"], "--stage: 'aneal'.*anneal"),
        (["dance"], "dance"),
        (["report"], "RUNS"),
        (["report", "{tmp}"], "neither a run nor a comparison"),
        (["pretrain", "output=/proc/nothing"], "output: /proc/nothing cannot be written"),
        (["pretrain", "tokenizer=nowhere.json", "output={tmp}/a"], "nowhere.json"),
        (["pretrain", "sources.code.builtin=perl-code", "output={tmp}/b"], "perl-code"),
        (
            ["pretrain", "sources.code={{path: nowhere.txt}}", "output={tmp}/c"],
            "sources.code.path.*nowhere.txt",
        ),
        (
            ["pretrain", "sources.code={{path: {tmp}/empty.txt}}", "output={tmp}/d"],
            "sources.code.path.*at least one",
        ),
        (
            [
                "pretrain",
                "tokenizer={{vocab_size: 5, eos_token_id: 9, pad_token_id: 0}}",
                "output={tmp}/e",
            ],
            "tokenizer.eos_token_id: 9",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, message, call, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    code, out, err = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert re.search(message, out + err)
    assert "Traceback" not in out + err
    assert len((out + err).strip().splitlines()) == 1


def test_a_report_prints_its_table_and_where_it_is(call, tmp_path):
    run = write_run(tmp_path / "run", 1.25, name="[bold]name[/bold]")
    code, out, _ = call("report", str(run), "--output", str(tmp_path / "out"))
    assert code == 0
    assert re.search(r"^ muon +0\.01 +1\.2500 +1/1 +- +no baseline", out, re.MULTILINE)
    assert f"The report: {tmp_path / 'out' / 'report.html'}" in out
    assert "[bold]name[/bold]" in (tmp_path / "out" / "report.html").read_text()


def test_tokens_outside_the_vocabulary_are_refused(call, tmp_path):
    (tmp_path / "tokens.npy").write_bytes(bytes([1, 2, 3, 250] * 1000))
    spec = tiny_spec(
        tmp_path,
        tokenizer={"vocab_size": 200, "eos_token_id": 0, "pad_token_id": 0},
        sources={"first": {"path": str(tmp_path / "tokens.npy")}},
        stages=[{"name": "one", "tokens": 256, "mixture": {"first": 1}}],
    )
    code, out, err = call("pretrain", str(write_spec(tmp_path / "spec.yaml", spec)))
    assert code == 2
    assert "250" in out + err and "vocab_size of 200" in out + err


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mixture_pretraining_stages", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]") -> Tuple[int, str]:
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two_ranks")
    path = write_spec(folder / "spec.yaml", tiny_spec(folder))
    code, out = finish(start("pretrain", str(path), "--nproc", "2"))
    assert code == 0, out
    return folder, out


def test_two_ranks_share_the_matrices(two_ranks):
    folder, _ = two_ranks
    rows = json.loads((folder / "run" / "roles.json").read_text())
    matrices = [row for row in rows if row["algorithm"] == "muon"]
    assert {row["path"] for row in matrices} == {"rows"}
    assert {owner for row in matrices for owner in row["owners"]} == {0, 1}


def test_the_state_of_two_ranks_is_counted_together(two_ranks):
    folder, _ = two_ranks
    _, optim = load_spec(folder / "spec.yaml").build_on_meta(258)
    shared = sum(
        value.numel() * value.element_size()
        for param, state in optim.state.items()
        for value in state.values()
        if value.shape != param.shape
    )
    facts = read_facts(folder / "run" / "run.json")
    assert facts["state_bytes"]["two"] == state_bytes(optim) + shared
    assert facts["ranks"] == 2


def test_two_ranks_print_once_and_train_like_one(two_ranks):
    folder, out = two_ranks
    assert out.count("2 rank(s)") == 1
    path = write_spec(folder / "one.yaml", tiny_spec(folder, output=str(folder / "one")))
    assert finish(start("pretrain", str(path)))[0] == 0

    def validation(run: str) -> List[float]:
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        key = "eval/validation/second/CE loss"
        return [json.loads(line)[key] for line in lines if key in line]

    assert validation("run") == pytest.approx(validation("one"), rel=1e-3)


def test_bad_input_on_ranks_is_one_paragraph_and_exit_code_2(tmp_path):
    spec = tiny_spec(tmp_path)
    spec["sources"]["first"] = {"path": str(tmp_path / "nowhere.txt")}
    path = write_spec(tmp_path / "spec.yaml", spec)
    code, out = finish(start("pretrain", str(path), "--nproc", "2"))
    assert code == 2
    assert len(out.strip().splitlines()) == 1
    assert "sources.first.path" in out and "nowhere.txt" in out


@pytest.mark.parametrize(
    "signal_name,options",
    [("SIGINT", []), ("SIGTERM", []), ("SIGTERM", ["--nproc", "2"])],
    ids=["SIGINT", "SIGTERM", "SIGTERM on two ranks"],
)
def test_a_signal_saves_and_the_same_command_resumes(signal_name, options, tmp_path):
    spec = tiny_spec(
        tmp_path,
        stages=[{"name": "one", "tokens": 256 * 1000, "mixture": {"first": 1}}],
        checkpoint={"every": 10_000, "keep": 2},
        evaluation={"every": 10_000, "tokens": 512},
    )
    command = ["pretrain", str(write_spec(tmp_path / "spec.yaml", spec)), *options]
    process = start(*command)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("one 100/"):
            break
    process.send_signal(getattr(signal, signal_name))
    code, out = finish(process)
    assert code == 1
    assert f"Resume with: olmo-optim {' '.join(command)}" in out
    (saved,) = (tmp_path / "run" / "stages" / "00-one").glob("step*")
    step = int(saved.name.removeprefix("step"))
    assert step < 1000
    assert f"at step {step} of 1000" in out

    resumed = start(*command)
    assert resumed.stdout is not None
    lines = []
    for line in resumed.stdout:
        lines.append(line)
        if line.startswith(f"one {100 * (step // 100 + 1)}/") or "failed" in line:
            break
    resumed.terminate()
    resumed.wait()
    assert any(f"continuing from {saved}" in line for line in lines)
    assert lines[-1].startswith(f"one {100 * (step // 100 + 1)}/")
    assert not any(line.startswith("one 100/") for line in lines)


def test_the_readme_has_the_catalogues_table(call):
    code, out, _ = call("list", "--markdown")
    assert code == 0
    readme = Path(__file__).parents[2] / "README.md"
    assert f"-->\n{out}<!--" in readme.read_text()


def test_every_optimizer_has_a_plan_page():
    plans = Path(__file__).parents[2] / "plans"
    for name in olmo_optim_ext.list_optimizers():
        assert name in (plans / f"{name}.md").read_text()
