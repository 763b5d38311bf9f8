"""
Whole runs of a tiny experiment: what they leave behind, and that nothing interrupts them for good.
"""

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from olmo_core.distributed.checkpoint import (
    load_keys,
    save_model_and_optim_state,
    unshard_checkpoint,
)
from omegaconf import OmegaConf

from mixture_pretraining_stages import checkpoints
from mixture_pretraining_stages.callbacks import read_metrics
from mixture_pretraining_stages.facts import read_facts, state_bytes
from mixture_pretraining_stages.mixture import drawn_tokens
from mixture_pretraining_stages.plans import plan_stages
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.timing import OPTIMIZER_SECONDS, STEP_SECONDS
from olmo_optim_ext.training import CLIPPED_METRIC, HESSIAN_SHARE_METRIC

from .jobs import run_preempted
from .spec import tiny_spec, write_spec

WORKER = Path(__file__).with_name("run_worker.py")
FINISHED, KILLED = 0, -9


def three_stages(folder: Path, **changes: Any) -> Dict[str, Any]:
    """:func:`tiny_spec`, and a stage with another optimizer, schedule, length and batch."""
    spec = tiny_spec(folder, **changes)
    last = {
        "name": "three",
        "tokens": 128 * 8,
        "mixture": {"first": 1, "second": 1},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "scheduler": {"type": "constant"},
        "warmup": 2,
        "sequence_length": 16,
        "global_batch_size": 128,
        "rank_microbatch_size": 64,
    }
    return {**spec, "stages": [*spec["stages"], last]}


def run(spec: Dict[str, Any], *moments: object, nproc: int = 1) -> List[int]:
    """Run the spec, killed at each moment, then to the end; the exit codes."""
    path = write_spec(Path(spec["output"]).with_suffix(".yaml"), spec)
    result = subprocess.run(
        [sys.executable, str(WORKER), str(path), *map(str, moments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NPROC": str(nproc), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [int(line) for line in result.stdout.split()]


def final_state(output: Path, scratch: Path) -> Dict[str, torch.Tensor]:
    """All tensors of the last checkpoint of the last stage."""
    saved = checkpoints.latest(max((output / "stages").iterdir()))
    assert saved is not None
    model, optim = unshard_checkpoint(f"{saved.path}/model_and_optim", scratch, quiet=True)
    assert optim is not None
    states = {**torch.load(model), **torch.load(optim)}
    flat: Dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{prefix}.{key}", each)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", states)
    return flat


def losses(output: Path) -> Dict[int, Dict[str, float]]:
    """Training and validation losses by step."""
    return {
        row["step"]: {key: value for key, value in row.items() if key.endswith("CE loss")}
        for row in read_metrics(output / "metrics.jsonl")
    }


def assert_same_end(output: Path, expected: Path, scratch: Path, tolerance: float = 0.0) -> None:
    got, want = final_state(output, scratch / "got"), final_state(expected, scratch / "want")
    assert len(want) > 20
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        if tolerance:
            difference = got[key].double() - tensor.double()
            assert difference.norm() <= tolerance * tensor.double().norm(), key
        else:
            assert torch.equal(got[key], tensor), key
    ours, theirs = losses(output), losses(expected)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=tolerance, abs=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    # The runs that are compared with this one have no such metrics.
    spec = three_stages(folder, optimizer_metrics={"every": 5, "per_layer": False})
    assert run(spec) == [FINISHED]
    return folder / "run"


def test_a_run_leaves_what_it_promises(uninterrupted):
    names = ("config.yaml", "roles.txt", "roles.json", "metrics.jsonl", "curves.png", "run.json")
    for name in names:
        assert (uninterrupted / name).stat().st_size > 0, name
    rows = [r for r in read_metrics(uninterrupted / "metrics.jsonl") if "train/CE loss" in r]
    assert [row["step"] for row in rows] == list(range(1, 27))
    assert [row["stage"] for row in rows] == ["one"] * 12 + ["two"] * 6 + ["three"] * 8
    tokens = [256 * step for step in range(1, 19)] + [256 * 18 + 128 * i for i in range(1, 9)]
    assert [row["tokens"] for row in rows] == tokens
    assert {row["train/CE loss not finite"] for row in rows} == {0.0}
    evaluated = [row["step"] for row in rows if "eval/validation/first/BPB" in row]
    assert evaluated == [4, 8, 12, 16, 18, 20, 24, 26]
    roles = {row["name"]: row for row in json.loads((uninterrupted / "roles.json").read_text())}
    assert roles["blocks.0.attention.w_q.weight"]["algorithm"] == "muon"
    assert roles["lm_head.w_out.weight"]["algorithm"] == "adamw"


def assert_timed(output: Path) -> None:
    rows = [r for r in read_metrics(output / "metrics.jsonl") if "train/CE loss" in r]
    assert [row["step"] for row in rows] == list(range(1, 27))
    for row in rows:
        assert 0 < row[OPTIMIZER_SECONDS] < row[STEP_SECONDS] < 60


def test_each_step_is_timed_and_a_run_says_what_it_was_made_with(uninterrupted):
    assert_timed(uninterrupted)
    facts = read_facts(uninterrupted / "run.json")
    model, optim = load_spec(uninterrupted / "config.yaml").build_on_meta(258)
    assert facts["parameters"] == sum(param.numel() for param in model.parameters())
    assert facts["state_bytes"]["one"] == facts["state_bytes"]["two"] == state_bytes(optim)
    assert facts["state_bytes"]["three"] > state_bytes(optim)  # AdamW has more than Muon
    assert facts["asked"]["one"] == {"first": 0.75, "second": 0.25}
    assert (facts["ranks"], facts["device"]["type"]) == (1, "cpu")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()


def test_what_the_optimizer_reports_is_among_the_metrics(uninterrupted):
    rows = read_metrics(uninterrupted / "metrics.jsonl")
    by_step = {row["step"]: {k: v for k, v in row.items() if k.endswith("/matrix")} for row in rows}
    assert [step for step, values in by_step.items() if values] == [5, 10, 15]
    for step in (5, 10, 15):
        assert len(by_step[step]) == 5
        assert by_step[step]["optim/failed orthogonalisations/matrix"] == 0
        assert 0 < by_step[step]["optim/relative effective rank/matrix"] <= 1
        assert 0.1 < by_step[step]["optim/update RMS/matrix"] < 0.3
    assert not any("blocks." in key for row in rows for key in row)


def test_the_resolved_config_is_the_spec_with_its_defaults(uninterrupted):
    resolved = load_spec(uninterrupted / "config.yaml")
    assert resolved.max_grad_norm == 1.0
    assert resolved == load_spec(uninterrupted.with_suffix(".yaml"))


def test_old_checkpoints_are_removed_and_stage_ends_are_kept(uninterrupted):
    kept = {
        folder.name: sorted(path.name for path in folder.iterdir())
        for folder in (uninterrupted / "stages").iterdir()
    }
    assert kept == {
        "00-one": ["step12", "step9"],
        "01-two": ["step15", "step18"],
        "02-three": ["carried.json", "roles.json", "roles.txt", "step24", "step26"],
    }


def test_the_schedule_spans_the_run_and_stages_scale_it(uninterrupted):
    rates = {
        row["step"]: row["optim/LR (group 0)"]
        for row in read_metrics(uninterrupted / "metrics.jsonl")
        if "optim/LR (group 0)" in row
    }
    assert rates[1] == pytest.approx(0.005)  # warm-up of two steps
    assert rates[12] == pytest.approx(0.01)
    assert rates[13] == pytest.approx(0.005)  # lr_scale of the second stage
    assert rates[18] == pytest.approx(0.005)  # the decay begins after 80 % of the run
    # The third stage has a schedule of its own, constant, and a warm-up of two steps.
    assert [rates[step] for step in range(19, 27)] == pytest.approx([0.005] + [0.01] * 7)


def test_bits_per_byte_are_the_loss_in_bits(uninterrupted):
    # A byte is a token; each document of 400 bytes or so ends with one token more.
    row = read_metrics(uninterrupted / "metrics.jsonl")[-1]
    loss, bits = row["eval/validation/first/CE loss"], row["eval/validation/first/BPB"]
    assert bits == pytest.approx(loss / 0.6931, rel=5e-3)
    assert bits > loss / 0.69315


def test_training_learns(uninterrupted):
    by_step = losses(uninterrupted)
    assert by_step[18]["train/CE loss"] < by_step[1]["train/CE loss"] - 1


def test_sophia_gets_its_estimates_of_the_hessian(tmp_path):
    spec = tiny_spec(tmp_path, optimizer={"name": "sophia", "lr": 0.02, "rho": 0.5})
    assert run(spec) == [FINISHED]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    clipped = {row["step"]: row[CLIPPED_METRIC] for row in rows if CLIPPED_METRIC in row}
    assert list(clipped) == [1, 11]
    assert all(0 < share < 1 for share in clipped.values())
    (share,) = [row[HESSIAN_SHARE_METRIC] for row in rows if row["step"] == 18]
    assert 0 < share < 0.5
    by_step = losses(tmp_path / "run")
    assert by_step[18]["train/CE loss"] < by_step[1]["train/CE loss"] - 1


def test_the_same_command_again_finds_nothing_to_do(uninterrupted):
    spec = OmegaConf.to_container(OmegaConf.load(uninterrupted.with_suffix(".yaml")))
    assert isinstance(spec, dict)
    before = losses(uninterrupted)
    assert run({str(k): v for k, v in spec.items()}) == [FINISHED]
    assert losses(uninterrupted) == before


MID_SAVE = [
    "Checkpointer._get_tmp_dir:1",
    "Checkpointer._save_train_state:2",
    "Checkpointer._teardown_tmp_dir:1",
    "Checkpointer._prepare_dir:2",
    "Checkpointer._save_metadata:2",
    "handover.carry_over:1",
]
BETWEEN = [
    "StageCheckpointer._remove_checkpoint:1",
    "StageCheckpointer.post_train:1",
    "handover._load:1",
    "Trainer.fit:1",
]


@pytest.mark.parametrize("moments", [MID_SAVE, BETWEEN], ids=["mid_save", "between"])
def test_killed_while_saving_or_between_stages_it_ends_as_uninterrupted(
    moments, uninterrupted, tmp_path
):
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    assert run(spec, *moments) == [*[KILLED] * len(moments), FINISHED]
    assert_same_end(tmp_path / "run", uninterrupted, tmp_path)


def random_moments(n: int) -> List[str]:
    # By progress rather than by time, so that they are spread over the run on any machine.
    chance = random.Random(0)
    lines = sorted(chance.randint(0, 36) for _ in range(n))
    return [f"{line}+{chance.uniform(0, 0.1):.3f}" for line in lines]


def test_killed_at_twenty_random_moments_it_ends_as_uninterrupted(uninterrupted, tmp_path):
    moments = random_moments(20)
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    codes = run(spec, *moments)
    print(moments, codes)
    assert codes.count(KILLED) >= 12
    assert codes[-1] == FINISHED
    assert_timed(tmp_path / "run")
    assert_same_end(tmp_path / "run", uninterrupted, tmp_path)


def test_killed_on_two_ranks_it_ends_as_uninterrupted(uninterrupted, tmp_path):
    once = three_stages(uninterrupted.parent, output=str(tmp_path / "once"))
    assert run(once, nproc=2) == [FINISHED]
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    codes = run(spec, *random_moments(5), nproc=2)
    assert codes.count(KILLED) >= 3
    assert codes[-1] == FINISHED
    assert_same_end(tmp_path / "run", tmp_path / "once", tmp_path, tolerance=1e-5)


@pytest.mark.parametrize(
    "save,code", [(2, 1), (4, 1), (9, FINISHED)], ids=["in a stage", "stage's last", "run's last"]
)
def test_a_signal_during_a_save_stops_the_run_and_loses_nothing(
    save, code, uninterrupted, tmp_path
):
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    assert run(spec, f"Checkpointer._save_train_state:{save}:SIGTERM") == [code, FINISHED]
    assert_same_end(tmp_path / "run", uninterrupted, tmp_path)


def test_a_preempted_job_is_requeued_and_ends_as_uninterrupted(
    uninterrupted, tmp_path, monkeypatch
):
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    log = run_preempted(spec, monkeypatch)
    assert log.count("Interrupted at step") == 1
    assert log.count("continuing from") == 1
    assert_same_end(tmp_path / "run", uninterrupted, tmp_path)


def test_a_half_written_checkpoint_is_removed_not_loaded(uninterrupted, tmp_path):
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    assert run(spec, "Checkpointer._save_metadata:2") == [KILLED, FINISHED]
    assert_same_end(tmp_path / "run", uninterrupted, tmp_path)
    folder = tmp_path / "run" / "stages" / "02-three"
    half = folder / "step99"
    (half / "train").mkdir(parents=True)
    (half / "train" / "rank0.pt").write_bytes(b"")
    assert checkpoints.latest(folder) == (26, str(folder / "step26"))
    checkpoints.remove_half_written(folder)
    assert not half.exists()


def test_another_config_in_the_same_folder_is_refused(uninterrupted, tmp_path):
    spec = three_stages(uninterrupted.parent, output=str(uninterrupted))
    assert run({**spec, "optimizer": {"name": "adamw", "lr": 0.01}}) == [2]
    assert run({**spec, "seed": 1}) == [2]
    # What does not change the training may change.
    write_spec(uninterrupted.with_suffix(".yaml"), spec)
    assert run({**spec, "checkpoint": {"every": 7, "keep": 2}}) == [FINISHED]


def test_a_refused_config_does_not_own_the_folder(uninterrupted, tmp_path):
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    wrong = {**spec, "sources": {**spec["sources"], "first": {"path": "nowhere.txt"}}}
    assert run(wrong) == [2]
    assert run({**spec, "seed": 7}, "Trainer.fit:1") == [KILLED, FINISHED]
    assert run(spec) == [2]  # now it is owned


@pytest.mark.parametrize(
    "change",
    [{"optimizer": {"name": "adamw", "lr": 0.01}}, {"optimizer": {"name": "nadamw", "lr": 0.01}}],
    ids=str,
)
def test_a_checkpoint_of_another_optimizer_is_refused(change, uninterrupted, tmp_path):
    spec = {**three_stages(uninterrupted.parent, output=str(tmp_path / "run")), **change}
    shutil.copytree(uninterrupted / "stages" / "00-one", tmp_path / "run" / "stages" / "00-one")
    assert run(spec) == [2]
    assert "saved with another optimizer" in (tmp_path / "run" / "train.log").read_text()


def test_a_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    for changes in ({"n_layers": 2}, {"d_model": 32}):
        spec = three_stages(uninterrupted.parent, output=str(tmp_path / str(changes) / "run"))
        spec["model"] = {**spec["model"], **changes}
        folder = Path(spec["output"]) / "stages" / "00-one"
        shutil.copytree(uninterrupted / "stages" / "00-one", folder)
        assert run(spec) == [2]
        log = (Path(spec["output"]) / "train.log").read_text()
        assert "saved with another model" in log


def test_a_damaged_config_is_named(uninterrupted, tmp_path):
    spec = three_stages(uninterrupted.parent, output=str(tmp_path / "run"))
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(bytes(range(256)))
    assert run(spec) == [2]


WARM: Dict[str, Dict[str, Any]] = {
    "weights": {},
    "the same optimizer": {"optimizer_state": True},
    "another optimizer": {"optimizer_state": True, "optimizer": {"name": "adamw"}},
}


@pytest.mark.parametrize("kind", WARM)
def test_a_run_begins_with_the_weights_of_another(kind, uninterrupted, tmp_path):
    step = "01-two/step18" if kind == "the same optimizer" else "02-three/step26"
    start = {"path": str(uninterrupted / "stages" / step), **WARM[kind]}
    stages = [{"name": "one", "tokens": 256 * 2, "mixture": {"first": 1}}]
    output = str(tmp_path / "run")
    spec = tiny_spec(
        uninterrupted.parent, stages=stages, scheduler=None, warm_start=start, output=output
    )
    assert run(spec) == [FINISHED]
    assert losses(tmp_path / "run")[1]["train/CE loss"] < losses(uninterrupted)[20]["train/CE loss"]
    decisions = tmp_path / "run" / "stages" / "00-one" / "carried.json"
    assert decisions.exists() == (kind == "another optimizer")
    steps = {
        key: float(tensor)
        for key, tensor in final_state(tmp_path / "run", tmp_path).items()
        if key.endswith(".step")
    }
    # Muon has made 18 updates, and AdamW 8, where it did not go on with what Muon left to AdamW.
    expected = {"weights": {2}, "the same optimizer": {20}, "another optimizer": {10, 28}}[kind]
    assert set(steps.values()) == expected


def test_a_run_begins_with_a_folder_of_weights_alone(tmp_path):
    stages = [{"name": "one", "tokens": 256, "mixture": {"first": 1}, "lr_scale": 0.0}]
    start = {"path": str(tmp_path / "weights")}
    spec = tiny_spec(tmp_path, stages=stages, scheduler=None, warm_start=start)
    config = load_spec(write_spec(tmp_path / "spec.yaml", spec)).model_config(256 + 1)
    model = config.build(init_device="cpu")
    save_model_and_optim_state(tmp_path / "weights", model)
    assert not checkpoints.has_optimizer_state(str(tmp_path / "weights"))
    assert run(spec) == [FINISHED]
    ended = final_state(tmp_path / "run", tmp_path)
    assert all(torch.equal(ended[f".{key}"], value) for key, value in model.state_dict().items())


def test_options_of_olmo_cores_optimizer_are_the_stages_and_not_the_checkpoints(tmp_path):
    def optimizer(**options: Any) -> Dict[str, Any]:
        return {"name": "olmo_core.skip_step_adamw", "lr": 0.01, **options}

    stages = [
        {"name": "one", "tokens": 256, "mixture": {"first": 1}},
        {
            **{"name": "two", "tokens": 256, "mixture": {"first": 1}},
            "optimizer": optimizer(betas=[0.8, 0.9], weight_decay=0.5),
        },
    ]
    spec = tiny_spec(tmp_path, stages=stages, optimizer=optimizer(), scheduler=None)
    assert run(spec) == [FINISHED]
    saved = checkpoints.latest(tmp_path / "run" / "stages" / "01-two")
    assert saved is not None
    group = "optim.param_groups.lm_head.norm.weight"
    keys = [f"{group}.betas", f"{group}.weight_decay", "optim.state.lm_head.norm.weight.step"]
    betas, decay, step = load_keys(f"{saved.path}/model_and_optim", keys)
    assert (betas, decay, float(step)) == ((0.8, 0.9), 0.5, 2)


def test_a_run_that_cannot_begin_with_a_checkpoint_says_why(uninterrupted, tmp_path):
    def said(start: Dict[str, Any], **changes: Any) -> str:
        output = tmp_path / str(len(list(tmp_path.iterdir()))) / "run"
        spec = tiny_spec(uninterrupted.parent, warm_start=start, output=str(output), **changes)
        output.parent.mkdir()
        assert run(spec) == [2]
        return (output / "train.log").read_text()

    assert "warm_start.path: nowhere has no checkpoint" in said({"path": "nowhere"})
    path = str(uninterrupted / "stages" / "02-three" / "step26")
    assert "saved with another optimizer" in said({"path": path, "optimizer_state": True})
    wider = {**tiny_spec(uninterrupted.parent)["model"], "d_model": 32}
    assert "saved with another model" in said({"path": path}, model=wider)


def test_the_drawn_mixture_is_in_the_metrics(uninterrupted):
    rows = read_metrics(uninterrupted / "metrics.jsonl")
    drawn = drawn_tokens(rows, "one", ["first", "second"])
    assert drawn["first"] == pytest.approx((0.75 * 3072, 0.75), abs=64)
    assert sum(tokens for tokens, _ in drawn.values()) == 3072
    assert drawn_tokens(rows, "two", ["first", "second"])["second"] == (256 * 6, 1.0)


def test_the_drawn_mixture_is_the_same_for_every_optimizer(uninterrupted, tmp_path):
    spec = tiny_spec(uninterrupted.parent, output=str(tmp_path / "run"), optimizer={"name": "sgd"})
    assert run(spec) == [FINISHED]

    def drawn(output: Path) -> List[Any]:
        rows = read_metrics(output / "metrics.jsonl")
        return [
            [(key, value) for key, value in row.items() if key.startswith("data/")]
            for row in rows
            if row["step"] <= 18
        ]

    ours = drawn(tmp_path / "run")
    assert len(ours) >= 18 and all(each for each in ours[1:])
    assert ours == drawn(uninterrupted)


def test_stages_are_planned_in_whole_batches(tmp_path):
    spec = load_spec(write_spec(tmp_path / "s.yaml", tiny_spec(tmp_path)))
    spec.stages[0].tokens = 256 * 3 + 1
    plans = plan_stages(spec)
    assert [(p.first_step, p.last_step) for p in plans] == [(0, 4), (4, 10)]
    assert [p.folder.name for p in plans] == ["00-one", "01-two"]
