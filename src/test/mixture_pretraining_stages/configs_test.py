"""
The ready experiments under ``configs/``: each is a spec that could start.
"""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from mixture_pretraining_stages.comparing.comparison import check_arms, plan_comparison
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.tokenizers import load_tokenizer
from mixture_pretraining_stages.training import JolmoModel
from olmo_optim_ext.catalog import list_optimizers
from olmo_optim_ext.matrix.muon import MuonConfig

CONFIGS = Path(__file__).parents[3] / "configs"
WORLD_SIZES = {"olmo2_1B": 64, "olmo2_7B": 64, "olmo3_7B": 64}
"""Of the configs that name a number of GPUs; the others are for one rank."""


def read(name: str, *overrides: str) -> JolmoModel:
    return load_spec(CONFIGS / f"{name}.yaml", overrides)


def build(spec: JolmoModel, world_size: int = 1) -> Tuple[torch.nn.Module, torch.optim.Optimizer]:
    spec.check(world_size)
    return spec.build_on_meta(load_tokenizer(spec.tokenizer).config.vocab_size)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_can_be_built(name, monkeypatch):
    monkeypatch.delenv("OLMO_DATA", raising=False)
    spec = read(name)
    if spec.comparison is None:
        build(spec, WORLD_SIZES.get(name, 1))
    else:
        plan_comparison(spec)  # a model of each arm is built in the tests below
    assert spec.output == f"runs/{spec.name}"


def test_the_comparison_of_the_catalogue_has_all_of_it():
    comparison = plan_comparison(read("catalogue"))
    assert list(comparison.arms) == list_optimizers()
    for name, overrides in comparison.arms.items():
        assert overrides["optimizer"] == {"name": name}
    check_arms(comparison)


def arms(study: str) -> Dict[str, Any]:
    """The optimizers of a study, all that its arms differ in."""
    comparison = plan_comparison(read(study))
    assert all(list(overrides) == ["optimizer"] for overrides in comparison.arms.values())
    for arm in comparison.specs.values():
        arm.check()
    build(arm)
    return {name: arm.optimizer_config() for name, arm in comparison.specs.items()}


def test_the_noise_study_has_a_baseline_two_kinds_of_noise_and_an_annealed_one():
    found = arms("noise_study")
    assert list(found) == ["muon", "orthonoise", "isotropic", "annealed"]
    assert type(found["muon"]) is MuonConfig
    noisy = [found[name] for name in ("orthonoise", "isotropic", "annealed")]
    assert {(arm.lr, arm.weight_decay, arm.alpha) for arm in noisy} == {(0.01, 0.1, 0.01)}
    assert [str(arm.annealing) for arm in noisy] == ["none", "none", "exponential"]
    spec = read("noise_study")
    assert found["annealed"].anneal_steps * spec.global_batch_size == spec.stages[0].tokens


def test_sweeps_change_one_field_each():
    def values(study: str, field: str) -> List[Any]:
        found = [arm for name, arm in arms(study).items() if name != "muon"]
        base = {**found[0].as_dict(), field: None}
        assert all({**arm.as_dict(), field: None} == base for arm in found)
        return [getattr(arm, field) for arm in found]

    assert values("noise_alpha_sweep", "alpha") == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 5e-2]
    assert values("noise_thresholds", "rank_threshold") == [0.3, 0.5, 0.7, None]


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_cluster_configs_have_three_stages_of_which_the_last_decays(name, monkeypatch):
    monkeypatch.setenv("OLMO_DATA", "/data")
    spec = read(name)
    assert [stage.name for stage in spec.stages] == ["pretrain", "midtrain", "anneal"]
    assert spec.sources["web"].path == "/data/web/**/*.npy"
    tokens = [stage.tokens for stage in spec.stages]
    scheduler, lr, total = spec.scheduler_config(), spec.optimizer["lr"], sum(tokens)

    def rate(at: int) -> float:
        return float(scheduler.get_lr(lr, at, total))

    assert rate(0) == 0
    assert rate(tokens[0]) == rate(tokens[0] + tokens[1]) == lr
    assert rate(total - tokens[2] // 2) == pytest.approx(lr / 2)
    assert rate(total) == 0


def test_a_part_of_a_cluster_run_has_its_decay_too():
    spec = read("olmo2_1B", "stages.2.tokens=4194304")
    assert spec.scheduler_config().decay == 4_194_304  # type: ignore[attr-defined]
