"""
What ``olmo-optim submit`` asks of SLURM, and what it refuses to submit.
"""

import os
import re
import sys
from pathlib import Path
from typing import List, Tuple

import pytest
from omegaconf import OmegaConf

from olmo_optim_ext import cli

from ..mixture_pretraining_stages.spec import tiny_spec, write_spec

BATCH = {
    "global_batch_size": 2048,
    "stages": [{"name": "one", "tokens": 4096, "mixture": {"first": 1}}],
}


def install(folder: Path, monkeypatch, sbatch: str) -> None:
    """An ``sbatch`` and an ``srun`` on the PATH."""
    folder.mkdir()
    for name, script in {"sbatch": sbatch, "srun": "exit 1"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def call(monkeypatch, capsys):
    def submit(*arguments: str) -> Tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["olmo-optim", "submit", *arguments])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return submit


def batch_file(tmp_path: Path, call, *options: str) -> List[str]:
    path = write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path, **BATCH))
    code, out = call(str(path), "--nodes", "2", "--gpus-per-node", "8", *options)
    assert code == 0, out
    assert "job 4242, 2 x 8 rank(s)" in out
    assert "scancel 4242" in out
    return (tmp_path / "run" / "slurm" / "4242_submission.sh").read_text().splitlines()


def test_the_batch_file_has_nodes_gpus_signal_and_requeue(call, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, "echo Submitted batch job 4242")
    lines = batch_file(tmp_path, call, "--partition", "gpu", "--time", "60", "--mem", "0")
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=2", "gpus-per-node=8", "ntasks-per-node=1", "partition=gpu", "mem=0"} <= asked
    assert {"time=60", "signal=USR2@600", "requeue", "job-name=tiny", "open-mode=append"} <= asked
    folder = tmp_path / "run" / "slurm"
    assert lines[-1].startswith("srun ") and lines[-1].endswith(f"submitit.core._submit {folder}")


def test_other_options_go_to_sbatch_and_submitit(call, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, "echo Submitted batch job 4242")
    pairs = ["constraint=h100", "setup=module load cuda", "setup=ulimit -c 0", "exclusive=true"]
    pairs += ["signal_delay_s=1200", "mail-type=END,FAIL", "srun_args=--cpu-bind none"]
    options = [each for pair in pairs for each in ("--slurm", pair)]
    lines = batch_file(tmp_path, call, "--cpus-per-task", "16", *options)
    for line in ("constraint=h100", "exclusive", "signal=USR2@1200", "mail-type=END,FAIL"):
        assert f"#SBATCH --{line}" in lines
    assert lines.index("module load cuda") + 1 == lines.index("ulimit -c 0")
    assert "#SBATCH --cpus-per-task=16" in lines
    assert " --cpus-per-task=16 --cpu-bind none " in lines[-1]


def test_the_config_is_submitted_as_it_is_now(call, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, "echo Submitted batch job 4242")
    batch_file(tmp_path, call, "optimizer.lr=0.125", "--seed", "7")
    (frozen,) = (tmp_path / "run" / "slurm").glob("spec-*.yaml")
    spec = OmegaConf.load(frozen)
    assert (spec.optimizer.lr, spec.seed, spec.max_grad_norm) == (0.125, 7, 1.0)


@pytest.mark.parametrize(
    "options,message",
    [
        ([], "there is no sbatch on the PATH"),
        (["--executor", "local", "--nodes", "2"], "--nodes: 2 is not allowed, allowed is 1"),
        (["--executor", "local", "--partition", "gpu"], "--partition: it is for SLURM"),
        (["--executor", "local", "--slurm", "gres=gpu"], "--slurm: it is for SLURM"),
        (["--executor", "cloud"], "cloud"),
        (["--executor", "local", "seed=-1"], "seed: -1"),
        (["--executor", "local", "--gpus-per-node", "3"], "global_batch_size"),
        (["--executor", "local", "optimizer.beta=1"], "optimizer.beta"),
        (["--executor", "local", "sources.first.path=nowhere"], "sources.first.path.*nowhere"),
        (["--executor", "local", "--folder", "/proc/nothing"], "/proc/nothing cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_paragraph_and_nothing_is_submitted(
    options, message, call, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path))
    code, out = call(str(path), *options)
    assert code == 2
    assert re.search(message, out)
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "pair,message",
    [
        ("gres", "'gres' is not allowed, allowed is key=value"),
        ("--nodes=3", "--slurm nodes: it is not allowed, allowed is --nodes"),
        ("ntasks-per-node=8", "allowed is one task a node"),
        ("signal=USR1@5", "allowed is --slurm signal_delay_s=SECONDS"),
        ("signal_delay_s=soon", "'soon' is not allowed, allowed is an integer"),
        ("signal_delay_s=3600", "3600 is not allowed, allowed is less than --time"),
    ],
)
def test_options_that_would_break_a_job_are_refused(pair, message, call, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, "echo Submitted batch job 4242")
    path = write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path))
    code, out = call(str(path), "--time", "60", "--slurm", pair)
    assert (code, message in out) == (2, True), out
    assert not (tmp_path / "run").exists()


def test_what_sbatch_refuses_is_told(call, tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, "echo 'sbatch: invalid partition: gpus' >&2; exit 1")
    path = write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path))
    code, out = call(str(path), "--partition", "gpus")
    assert code == 2
    assert "sbatch refused the job: sbatch: invalid partition: gpus" in out
    assert len(out.strip().splitlines()) == 1
