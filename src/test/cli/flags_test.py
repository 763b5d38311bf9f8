"""
Short flags: which overrides they stand for, and what contradicts them.
"""

import math
import random
import sys
from pathlib import Path
from typing import Any, List

import pytest
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.training import JolmoModel
from olmo_optim_ext import cli
from olmo_optim_ext.cli.app import load_with_flags
from olmo_optim_ext.cli.flags import Flags, scale_tokens

from ..mixture_pretraining_stages.spec import tiny_spec, write_spec

MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.2, "polar_steps": 4}
NOISE = {"name": "muon_orthonoise", "lr": 0.02, "alpha": 0.03, "rank_interval": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flags")


def load(folder: Path, flags: Flags, *overrides: str, **changes: Any) -> JolmoModel:
    changes = {"output": "runs/${name}", **changes}
    path = write_spec(folder / "spec.yaml", tiny_spec(folder, **changes))
    spec, _ = load_with_flags([str(path), *overrides], flags)
    spec.check()
    return spec


def notes(folder: Path, flags: Flags, *overrides: str, **changes: Any) -> List[str]:
    path = write_spec(folder / "spec.yaml", tiny_spec(folder, **changes))
    return load_with_flags([str(path), *overrides], flags)[1]


@pytest.mark.parametrize(
    "flags,name",
    [
        (Flags(orthonoise=True), "muon_orthonoise"),
        (Flags(isotropic=True), "muon_isotropic"),
        (Flags(optimizer="muon_isotropic"), "muon_isotropic"),
        (Flags(isotropic=True, optimizer="muon_isotropic"), "muon_isotropic"),
    ],
    ids=str,
)
def test_noise_is_weak_and_does_not_anneal_and_muons_fields_stay(flags, name, folder):
    spec = load(folder, flags, optimizer=MUON)
    assert spec.optimizer == {**MUON, "name": name, "alpha": 1e-3, "annealing": "none"}


def test_nolah_has_no_noise(folder):
    assert load(folder, Flags(nolah=True), optimizer=MUON).optimizer == {
        **MUON,
        "name": "muon_nolah",
    }


def test_annealing_goes_to_a_tenth_over_the_run(folder):
    flags = Flags(orthonoise=True, alpha=0.02, anneal=True, steps=9)
    config: Any = load(folder, flags).optimizer_config()
    assert (config.alpha, config.alpha_end) == (0.02, pytest.approx(0.002))
    assert (config.annealing, config.anneal_steps) == ("exponential", 9)
    config = load(
        folder, Flags(orthonoise=True, anneal=True), "stages.0.tokens=2560"
    ).optimizer_config()
    assert (config.alpha, config.alpha_end, config.anneal_steps) == (1e-3, 1e-4, 16)


def test_what_the_config_or_an_override_asks_for_comes_before_what_flags_imply(folder):
    assert load(folder, Flags(isotropic=True), optimizer=NOISE).optimizer["alpha"] == 0.03
    spec = load(folder, Flags(orthonoise=True, anneal=True), "optimizer.alpha=0.5")
    assert (spec.optimizer["alpha"], spec.optimizer["alpha_end"]) == (0.5, pytest.approx(0.05))
    spec = load(folder, Flags(orthonoise=True, anneal=True), "optimizer.annealing=linear")
    assert spec.optimizer["annealing"] == "linear"
    spec = load(folder, Flags(optimizer="soap"), "optimizer.lr=0.5", optimizer=MUON)
    assert spec.optimizer == {"name": "soap", "lr": 0.5, "weight_decay": 0.2}
    spec = load(folder, Flags(alpha=0.5), "optimizer.name=muon_isotropic", optimizer=MUON)
    assert spec.optimizer == {
        **MUON,
        "name": "muon_isotropic",
        "alpha": 0.5,
        "annealing": "none",
    }


def test_alpha_alone_tunes_the_optimizer_of_the_config(folder):
    spec = load(folder, Flags(alpha=0.5), optimizer=NOISE)
    assert spec.optimizer == {**NOISE, "alpha": 0.5, "annealing": "none"}


@pytest.mark.parametrize(
    "name,stays",
    [
        ("soap", {"weight_decay": 0.2}),
        ("adamw", {"weight_decay": 0.2}),
        ("olmo_core.muon", {"weight_decay": 0.2}),
        ("schedule_free", {"weight_decay": 0.2}),
        ("scion", {}),  # has none
        ("sgd", {}),  # L2 by default
        ("ext_nor_muon", {"weight_decay": 0.2}),  # its rate is of another scale
    ],
)
def test_no_learning_rate_goes_from_one_rule_to_another(name, stays, folder):
    flags = Flags(optimizer=name)
    spec = load(folder, flags, "scheduler=null", "stages.1.lr_scale=1", optimizer=MUON)
    assert spec.optimizer == {"name": name, **stays}
    assert "not lr=0.02" in notes(folder, flags, optimizer=MUON)[0]


def test_what_an_override_sets_is_not_told_as_the_optimizers_own_or_the_configs(folder):
    overrides = ("optimizer.lr=0.5", "optimizer.weight_decay=0.3")
    (told,) = notes(folder, Flags(optimizer="adamw"), *overrides, optimizer=MUON)
    assert "its own" not in told and "of the config" not in told
    (told,) = notes(folder, Flags(optimizer="adamw"), optimizer=MUON)
    assert "lr=0.001, its own" in told and "weight_decay=0.2 of the config" in told


def test_the_optimizer_of_the_config_stays_as_it_is(folder):
    for name in ("muon", "ext_muon"):
        assert load(folder, Flags(optimizer=name), optimizer=MUON).optimizer == MUON
        assert notes(folder, Flags(optimizer=name), optimizer=MUON) == []


def test_the_rest_of_the_flags_are_keys_of_the_spec(folder):
    spec = load(folder, Flags(seed=7, name="a b"))
    assert (spec.seed, spec.name, spec.output) == (7, "a b", "runs/a b")
    assert notes(folder, Flags(name="c"), output="runs/${name}") == []
    assert "output stays runs/d" in notes(folder, Flags(name="c"), output="runs/d")[0]


def test_flags_are_written_as_they_are_typed():
    flags = Flags("soap", False, True, False, 1e-4, True, 9, 3, "x y")
    assert flags.arguments() == [
        *("--optimizer", "soap", "--isotropic", "--alpha", "0.0001", "--anneal"),
        *("--steps", "9", "--seed", "3", "--name", "x y"),
    ]


@pytest.mark.parametrize(
    "flags,overrides,message",
    [
        (Flags(orthonoise=True, nolah=True), [], "--orthonoise and --nolah name several"),
        (Flags(optimizer="soap", nolah=True), [], "--nolah and --optimizer soap name several"),
        (Flags(optimizer="sopa"), [], "optimizer.name.*did you mean .*soap"),
        (Flags(optimizer="soap", alpha=1.0), [], "--alpha 1.0: the optimizer 'soap' has no noise"),
        (Flags(optimizer="ademamix", alpha=1.0), [], "--alpha 1.0: .*'ademamix' has no noise"),
        (Flags(nolah=True, anneal=True), [], "--anneal: the optimizer 'muon_nolah' has no noise"),
        (Flags(anneal=True), [], "--anneal: the optimizer 'muon' has no noise"),
        (Flags(orthonoise=True, alpha=-1.0), [], "--alpha: -1.0 .*finite number >= 0"),
        (Flags(orthonoise=True, alpha=math.nan), [], "--alpha: nan .*finite number >= 0"),
        (Flags(optimizer="soap"), ["optimizer.name=kron"], "soap and optimizer.name=kron differ"),
        (Flags(orthonoise=True), ["optimizer={name: muon}"], "optimizer.name=muon differ"),
        (Flags(orthonoise=True, alpha=1.0), ["optimizer.alpha=2"], "optimizer.alpha=2 differ"),
        (
            Flags(alpha=1.0),
            ["optimizer={name: muon_orthonoise}"],
            "--alpha 1.0 and optimizer.alpha=None differ",
        ),
        (
            Flags(orthonoise=True, anneal=True),
            ["optimizer.annealing=none"],
            "--anneal and optimizer.annealing=none differ",
        ),
        (Flags(seed=1), ["seed=2"], "--seed 1 and seed=2 differ"),
        (Flags(name="a"), ["name=b"], "--name a and name=b differ"),
        (Flags(steps=9), ["stages.0.tokens=1280"], "--steps 9 and the tokens of stages"),
        (Flags(steps=1), [], "--steps: 1 .*at least one for each of the 2 stages"),
        (Flags(seed=-1), [], "seed: -1"),
    ],
    ids=lambda value: " ".join(value.arguments()) if isinstance(value, Flags) else None,
)
def test_contradictions_are_refused(flags, overrides, message, folder):
    with pytest.raises(OLMoConfigurationError, match=message):
        load(folder, flags, *overrides)


def test_an_override_that_says_the_same_is_allowed(folder):
    flags = Flags(orthonoise=True, alpha=0.5, seed=3)
    spec = load(folder, flags, "optimizer.name=muon_orthonoise", "optimizer.alpha=0.5", "seed=3")
    assert (spec.optimizer["alpha"], spec.seed) == (0.5, 3)


def test_steps_are_exact_and_in_proportion_with_a_batch_for_each_stage(folder):
    chance = random.Random(0)
    for _ in range(500):
        stages = chance.randint(1, 5)
        tokens = [chance.randint(1, 10**9) for _ in range(stages)]
        batches = [chance.choice((1, 7, 256, 4096)) for _ in range(stages)]
        steps = chance.randint(stages, 10_000)
        scaled = scale_tokens(tokens, batches, steps)
        counts = [count / batch for count, batch in zip(scaled, batches)]
        assert sum(counts) == steps
        assert all(count >= 1 and count == int(count) for count in counts)
        whole = sum(t / b for t, b in zip(tokens, batches))
        for count, token, batch in zip(counts, tokens, batches):
            # One step of rounding, and one for each stage that is too short for a step of its own.
            assert abs(count - steps * token / batch / whole) <= stages
    assert scale_tokens([3000, 1000], [10, 10], 8) == [60, 20]
    assert scale_tokens([10**9, 1, 1], [1, 1, 1], 5) == [3, 1, 1]
    spec = load(folder, Flags(steps=9))
    assert sum(math.ceil(stage.tokens / 256) for stage in spec.stages) == 9
    assert [stage.tokens for stage in spec.stages] == [256 * 6, 256 * 3]


def test_stages_keep_what_is_their_own(folder):
    stages = tiny_spec(folder)["stages"]
    stages[1] = {**stages[1], "optimizer": {"name": "adamw"}, "global_batch_size": 512}
    spec = load(folder, Flags(optimizer="soap", steps=5), stages=stages)
    assert [stage.optimizer for stage in spec.stages] == [None, {"name": "adamw"}]
    # 12 batches of 256 tokens and 3 of 512.
    assert [stage.tokens for stage in spec.stages] == [256 * 4, 512]
    assert "keep it: two" in notes(folder, Flags(optimizer="soap"), stages=stages)[0]
    stages[0] = {**stages[0], "optimizer": {"name": "adamw"}}
    with pytest.raises(OLMoConfigurationError, match="each stage has its own"):
        load(folder, Flags(optimizer="soap"), stages=stages)


def test_the_command_line_takes_them(folder, monkeypatch, capsys):
    path = write_spec(folder / "spec.yaml", tiny_spec(folder))
    line = ["pretrain", str(path), "--nolah", "--alpha", "1e-4", "--steps", "20", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["olmo-optim", *line])
    assert cli.main() == 2
    captured = capsys.readouterr()
    assert "--alpha 0.0001: the optimizer 'muon_nolah'" in captured.err
    assert len((captured.out + captured.err).strip().splitlines()) == 1
