"""
What a comparison is made of: arms, learning rates, seeds, budgets, and what is refused of them.
"""

import math
from pathlib import Path
from typing import Any, Dict

import pytest
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.comparing.comparison import (
    Comparison,
    check_arms,
    factors_of_two,
    plan_comparison,
    validation_losses,
)
from mixture_pretraining_stages.comparing.folder import claim_folder
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.training import JolmoModel

from ..spec import tiny_spec, write_spec


def load(folder: Path, **changes: Any) -> JolmoModel:
    return load_spec(write_spec(folder / "spec.yaml", tiny_spec(folder, **changes)))


def plan(folder: Path, flags: Any = None, **changes: Any) -> Comparison:
    return plan_comparison(load(folder, **changes), **(flags or {}))


def flags(*optimizers: str, lrs: int = 3, seeds: int = 2, **others: Any) -> Any:
    return {"optimizers": optimizers, "lrs": lrs, "seeds": seeds, **others}


def test_grids_are_powers_of_two_around_one_and_nested():
    assert factors_of_two(1) == [1]
    assert factors_of_two(2) == [0.5, 1]
    assert factors_of_two(5) == [0.25, 0.5, 1, 2, 4]
    for count in range(1, 9):
        assert set(factors_of_two(count)) < set(factors_of_two(count + 1))


def test_arms_have_grids_around_their_own_rates(tmp_path):
    found = plan(
        tmp_path,
        flags("adamw", "muon", "schedule_free", "olmo_core.lion"),
        optimizer={"name": "ext_muon", "lr": 0.04, "momentum": 0.5},
    )
    own = {arm: rates[1] for arm, rates in found.rates.items()}
    # AdamW's default, the config's, the wrapper's for AdamW, that of OLMo-core's class.
    assert own == {"adamw": 1e-3, "muon": 0.04, "schedule_free": 0.0025, "olmo_core.lion": 1e-4}
    for arm, rates in found.rates.items():
        assert rates == [own[arm] / 2, own[arm], own[arm] * 2]
    assert found.seeds == [42, 43]
    assert found.specs["muon"].optimizer["momentum"] == 0.5
    assert found.baseline == "adamw"
    assert found.budget == 6


def test_a_run_is_the_arm_with_rate_seed_and_folder(tmp_path):
    found = plan(tmp_path, flags("adamw", "muon"))
    first = found.run("muon", 0.02, 42)
    assert first.folder == tmp_path / "run" / "runs" / "muon" / "lr-0.02" / "seed-42"
    assert first.spec.output == str(first.folder)
    assert first.spec.optimizer == {"name": "muon", "lr": 0.02}
    second = found.run("muon", 0.02, 43)
    # Also what is random in a step moves with the seed.
    assert (second.spec.seed, second.spec.optimizer["seed"]) == (43, 1)
    assert found.specs["muon"].optimizer == {"name": "muon", "lr": 0.01}


def test_the_rate_of_a_wrapper_goes_where_it_was_given(tmp_path):
    arms = {"inner": {"optimizer": {"name": "lookahead", "inner": {"name": "muon", "lr": 0.02}}}}
    found = plan(tmp_path, comparison={"arms": arms, "lrs": 3, "baseline": "inner"})
    run = found.run("inner", found.rates["inner"][2], 42)
    assert run.spec.optimizer["inner"] == {"name": "muon", "lr": 0.04}
    run.spec.check()


def test_metrics_of_matrices_are_for_arms_that_have_a_rule_for_them(tmp_path):
    found = plan(tmp_path, flags("adamw", "muon"), optimizer_metrics={"every": 5})
    assert found.specs["adamw"].optimizer_metrics is None
    assert found.specs["muon"].optimizer_metrics is not None
    check_arms(found)


def test_rates_of_stages_with_optimizers_of_their_own_move_along(tmp_path):
    stages = tiny_spec(tmp_path)["stages"]
    stages[1]["optimizer"] = {"name": "adamw", "lr": 0.004}
    found = plan(tmp_path, flags("muon", "sgd", seeds=2), stages=stages)
    spec = found.run("muon", 0.02, 43).spec
    assert spec.optimizer == {"name": "muon", "lr": 0.02, "seed": 1}
    assert spec.stages[1].optimizer == {"name": "adamw", "lr": 0.008, "seed": 1}
    spec.check()
    stages[0]["optimizer"] = {"name": "muon", "lr": 0.1}
    of_stages = {"baseline": "own", "arms": {"own": {}}}
    assert plan(tmp_path, stages=stages, comparison=of_stages).own_rate("own") == 0.1
    with pytest.raises(OLMoConfigurationError, match="arms.ext_adamw.optimizer: each stage has"):
        plan(tmp_path, flags("muon"), stages=stages)


def test_adamw_is_added_unless_there_is_a_baseline(tmp_path):
    added = plan(tmp_path, flags("muon", "soap"))
    assert list(added.arms) == ["ext_adamw", "muon", "soap"]
    assert added.baseline == "ext_adamw"
    assert added.rates["ext_adamw"] == [5e-4, 1e-3, 2e-3]
    assert plan(tmp_path, flags("ext_adamw", "muon")).baseline == "ext_adamw"
    named = {"baseline": "muon", "arms": {"muon": {}, "slow": {"optimizer": {"name": "sgd"}}}}
    assert list(plan(tmp_path, comparison=named).arms) == ["muon", "slow"]


def test_arms_override_the_spec_and_flags_the_section(tmp_path):
    section = {
        "lrs": [0.5, 1],
        "seeds": 4,
        "tolerance": 0.05,
        "criteria": True,
        "arms": {
            "short": {"sequence_length": 16, "scheduler": {"type": "constant"}},
            "fast": {"optimizer.lr": 0.5},
        },
    }
    found = plan(tmp_path, comparison=section)
    assert found.specs["short"].sequence_length == 16
    assert found.specs["short"].scheduler == {"type": "constant"}
    assert found.rates == {"ext_adamw": [5e-4, 1e-3], "short": [0.005, 0.01], "fast": [0.25, 0.5]}
    assert (len(found.seeds), found.tolerance, found.criteria) == (4, 0.05, True)
    assert found.spec.comparison is None
    chosen = plan(tmp_path, flags("fast", "adamw", seeds=1), comparison=section)
    assert {arm: len(rates) for arm, rates in chosen.rates.items()} == {"fast": 3, "adamw": 3}
    assert chosen.rates["fast"][1] == 0.5


def test_a_comparison_without_an_output_has_one_by_its_name(tmp_path):
    spec = load(tmp_path)
    spec.output = JolmoModel.output
    assert plan_comparison(spec, optimizers=["adamw"]).folder == Path("runs/tiny")


BAD_FLAGS = {
    "soap once": flags("soap", "muon", "soap"),
    "ext_muon once": flags("muon", "ext_muon"),
    "comparison.lrs: 0 .*>= 1": flags("muon", lrs=0),
    "comparison.seeds: -1 .*>= 1": flags("muon", seeds=-1),
    "comparison.lrs: 3000 .*1 to 64": flags("muon", lrs=3000),
    "--lrs: 1 .*at least 2": flags("muon", lrs=1, tune=True),
    "comparison.arms.mun.optimizer.name.*did you mean ext_muon": flags("mun"),
    "comparison.arms: {}.*--optimizers": flags(),
}
BAD_SECTIONS = {
    "comparison.armz: there is no such key": {"armz": {}},
    "comparison.seeds: 1.5 ": {"seeds": 1.5},
    "comparison.lrs: 'many'": {"lrs": "many"},
    "comparison.lrs: .*the rate of ext_adamw, .*finite": {"lrs": [1e-322], "arms": {"muon": {}}},
    "comparison.lrs: .*different numbers > 0": {"lrs": [1, 1]},
    "comparison.lrs: .*0.0.*different numbers > 0": {"lrs": [0, 1]},
    "comparison.tolerance: -0.1": {"tolerance": -0.1},
    "comparison.baseline: 'soap'.*muon": {"baseline": "soap", "arms": {"muon": {}}},
    "comparison.arms.a.seed: an arm cannot": {"arms": {"a": {"seed": 1}}},
    "comparison.arms.a.evaluation.every: an arm cannot": {"arms": {"a": {"evaluation.every": 1}}},
    "comparison.arms.a.tokens: there is no such key": {"arms": {"a": {"tokens": 1}}},
    "comparison.arms.a.stages: '3072 tokens'.*4608": {"arms": {"a": {"stages.1.tokens": 0}}},
    "comparison.arms: '../a'": {"arms": {"../a": {}}},
    "comparison.arms.a.optimizer.lr: 0": {"arms": {"a": {"optimizer.lr": 0}}},
    "comparison.arms.a.optimizer.momentm": {"arms": {"a": {"optimizer.momentm": 0}}},
}


@pytest.mark.parametrize("message", BAD_FLAGS)
def test_bad_flags_are_refused(message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message):
        plan(tmp_path, BAD_FLAGS[message])


@pytest.mark.parametrize("message", BAD_SECTIONS)
def test_bad_sections_are_refused(message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message):
        plan(tmp_path, comparison=BAD_SECTIONS[message])


def test_what_only_a_run_would_refuse_is_found_before_the_first(tmp_path):
    arms = {
        "fine": {},
        "last": {"optimizer": {"name": "muon", "group_overrides": [{"params": ["x"], "opts": {}}]}},
    }
    found = plan(tmp_path, comparison={"arms": arms})
    with pytest.raises(OLMoConfigurationError, match="comparison.arms.last.optimizer: .*'x'"):
        check_arms(found)
    with pytest.raises(OLMoConfigurationError, match="comparison.arms.ext_adamw.global_batch_size"):
        check_arms(found, world_size=3)
    decaying = plan(tmp_path, flags("schedule_free"))
    with pytest.raises(OLMoConfigurationError, match="comparison.arms.schedule_free.stages.1"):
        check_arms(decaying)


def test_the_loss_of_an_evaluation_is_the_mean_over_sources():
    key = "eval/validation/{}/CE loss".format
    rows = [
        {"step": 1, "train/CE loss": 9.0},
        {"step": 2, key("a"): 1.0, key("b"): 2.0},
        {"step": 3, key("a"): 1.0},
        {"step": 4, key("a"): math.nan, key("b"): 2.0},
    ]
    assert validation_losses(rows[:3], ["a", "b"]) == [(2, 1.5)]
    assert math.isnan(validation_losses(rows, ["a", "b"])[-1][1])


# The folder.


def test_a_comparison_is_extended_and_keeps_its_identity(tmp_path):
    first = claim_folder(plan(tmp_path, flags("adamw", lrs=2, seeds=1)))
    (tmp_path / "run" / "runs").mkdir()
    assert claim_folder(plan(tmp_path, flags("adamw", lrs=2, seeds=1))) == first
    assert claim_folder(plan(tmp_path, flags("soap", "adamw", lrs=3, seeds=2))) == first
    changes = {"checkpoint": {"every": 5}, "optimizer": {"name": "sgd"}}
    assert claim_folder(plan(tmp_path, flags("soap", "adamw"), **changes)) == first


CONTRADICTIONS: Dict[str, Any] = {
    "arm soap left out": ({}, flags("adamw")),
    "rate 0.0005 of adamw left out": ({}, flags("adamw", "soap", lrs=1)),
    "seed 43 left out": ({}, flags("adamw", "soap", seeds=1)),
    "tune False -> True": ({}, flags("adamw", "soap", tune=True)),
    "seed 42 -> 41": ({"seed": 41}, flags("adamw", "soap")),
    "max_grad_norm 1.0 -> 2.0": ({"max_grad_norm": 2.0}, flags("adamw", "soap")),
    "evaluation ": ({"evaluation": {"every": 3, "tokens": 512}}, flags("adamw", "soap")),
    "comparison.arms.adamw.optimizer": (
        {"optimizer": {"name": "adamw", "eps": 1e-6}},
        flags("adamw", "soap"),
    ),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_contradiction_is_refused_once_something_was_run(message, tmp_path):
    before = claim_folder(plan(tmp_path, flags("adamw", "soap")))
    changes, others = CONTRADICTIONS[message]
    (tmp_path / "run" / "runs").mkdir()
    with pytest.raises(OLMoConfigurationError, match=f"output: .*{message}"):
        claim_folder(plan(tmp_path, others, **changes))
    (tmp_path / "run" / "runs").rmdir()
    assert claim_folder(plan(tmp_path, others, **changes)) != before


def test_a_search_takes_more_arms_but_no_other_budget(tmp_path):
    first = claim_folder(plan(tmp_path, flags("adamw", tune=True)))
    (tmp_path / "run" / "runs").mkdir()
    assert claim_folder(plan(tmp_path, flags("adamw", "soap", tune=True))) == first
    for others in (
        flags("adamw", "soap", tune=True, lrs=5),
        flags("adamw", "soap", tune=True, seeds=3),
    ):
        with pytest.raises(OLMoConfigurationError, match="lrs|seeds"):
            claim_folder(plan(tmp_path, others))


def test_a_damaged_comparison_is_named(tmp_path):
    comparison = plan(tmp_path, flags("adamw"))
    claim_folder(comparison)
    (comparison.folder / "comparison.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(OLMoConfigurationError, match="comparison.yaml is damaged"):
        claim_folder(comparison)


def test_an_arm_without_overrides_is_found_by_its_name(tmp_path):
    section = {"arms": {"base": {}, "muon": {}}, "baseline": "base"}
    optimizer = {"name": "muon", "lr": 0.04, "momentum": 0.5}
    found = plan(tmp_path, flags("base", "muon"), comparison=section, optimizer=optimizer)
    assert [spec.optimizer for spec in found.specs.values()] == [optimizer, optimizer]
