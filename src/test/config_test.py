import copy
import json
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Sequence, Set, Tuple

import pytest
import torch
import torch.nn as nn
from olmo_core.config import Config, DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.moe.mlp import DroplessMoEMLP, MoEMLP
from olmo_core.nn.moe.v2.routed_experts import RoutedExpertsConfig
from olmo_core.nn.moe.v2.shared_experts import SharedExpertsConfig
from olmo_core.optim import LinearWithWarmup, OptimConfig, OptimGroupOverride
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from olmo_optim_ext import (
    AdamW,
    AdamWConfig,
    CautiousAdamWConfig,
    LRScaling,
    Muon,
    MuonConfig,
    NAdamW,
    NAdamWConfig,
    NesterovForm,
    get_config_class,
    list_optimizers,
    optimizer_info,
)
from olmo_optim_ext.config import ExtOptimConfig

from .optim.case import MixedShapes, train, weights

CONFIGS = [AdamWConfig, NAdamWConfig, CautiousAdamWConfig, MuonConfig]

every_config = pytest.mark.parametrize("config_class", CONFIGS)


def override(*params: str, **opts: Any) -> OptimGroupOverride:
    return OptimGroupOverride(params=list(params), opts=opts)


def field_by_name(optim: torch.optim.Optimizer, model: nn.Module, field: str) -> Dict[str, Any]:
    """The group's value of a field for each parameter."""
    of_param = {p: group[field] for group in optim.param_groups for p in group["params"]}
    return {name: of_param[param] for name, param in model.named_parameters()}


def names_with(optim: torch.optim.Optimizer, model: nn.Module, field: str, value: Any) -> Set[str]:
    return {name for name, v in field_by_name(optim, model, field).items() if v == value}


def all_names(model: nn.Module) -> Set[str]:
    return {name for name, _ in model.named_parameters()}


MATRICES = {"square.weight", "tall.weight", "wide.weight", "few_rows.weight"}
"""Of :class:`MixedShapes`."""


# Registration


def test_import_changes_no_registration_of_olmo_core():
    script = """
import json
from olmo_core.optim import OptimConfig
before = dict(OptimConfig._registry), OptimConfig._default_type
import olmo_optim_ext
after = dict(OptimConfig._registry), OptimConfig._default_type
print(json.dumps({
    "before": len(before[0]),
    "same": all(after[0][name] is cls for name, cls in before[0].items()),
    "default": before[1] == after[1],
    "new": sorted(after[0].keys() - before[0].keys()),
    "classes": all(
        after[0][name] is olmo_optim_ext.get_config_class(name)
        and after[0][name].registered_name == name
        for name in olmo_optim_ext.list_optimizers()
    ),
    "listed": sorted(olmo_optim_ext.list_optimizers()),
}))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["before"] > 0
    assert found["same"] and found["default"] and found["classes"]
    assert found["new"] == found["listed"] == sorted(list_optimizers())


def test_bare_names_mean_the_optimizers_of_this_package():
    assert optimizer_info("muon") is optimizer_info("ext_muon")
    assert get_config_class("muon") is MuonConfig
    assert get_config_class("adamw") is AdamWConfig
    assert get_config_class("nadamw") is NAdamWConfig
    for name in list_optimizers():
        assert optimizer_info(name).name == name


@pytest.mark.parametrize(
    "name,hint", [("muno", "ext_muon"), ("nadam", "nadamw"), ("cautios_adamw", "cautious_adamw")]
)
def test_unknown_names_are_answered_with_the_closest(name: str, hint: str):
    for lookup in (optimizer_info, get_config_class):
        with pytest.raises(OLMoConfigurationError, match=f"did you mean {hint}") as error:
            lookup(name)
        assert repr(name) in str(error.value)
        assert all(allowed in str(error.value) for allowed in list_optimizers())


def test_names_like_no_other_are_answered_with_all():
    with pytest.raises(OLMoConfigurationError, match="allowed are ext_adamw") as error:
        optimizer_info("zzz")
    assert "did you mean" not in str(error.value)


# From and to dictionaries


def test_configs_are_decoded_by_registered_name():
    config: Config = OptimConfig.from_dict(
        {
            "type": "ext_muon",
            "lr": 0.1,
            "adamw_betas": [0.8, 0.9],
            "lr_scaling": "spectral",
            "polar_dtype": "bfloat16",
            "group_overrides": [{"params": ["norm.*"], "opts": {"lr": 0.2}}],
        }
    )
    assert config == MuonConfig(
        lr=0.1,
        adamw_betas=(0.8, 0.9),
        lr_scaling=LRScaling.spectral,
        polar_dtype=DType.bfloat16,
        group_overrides=[override("norm.*", lr=0.2)],
    )
    assert type(config) is MuonConfig


def test_configs_are_decoded_by_class_name():
    config = Config.from_dict(
        {"_CLASS_": "olmo_optim_ext.MuonConfig", "type": "ext_muon", "adamw_betas": [0.8, 0.9]}
    )
    assert type(config) is MuonConfig
    assert config == MuonConfig(adamw_betas=(0.8, 0.9))


@pytest.mark.parametrize(
    "name,class_name,field",
    [
        ("ext_adamw", "AdamWConfig", "betas"),
        ("nadamw", "NAdamWConfig", "betas"),
        ("ext_muon", "MuonConfig", "adamw_betas"),
    ],
)
@pytest.mark.parametrize("betas", [[], [0.9], [1], [0.9, 0.95, 0.99]], ids=str)
def test_betas_are_two_also_when_decoded(
    betas: List[float], name: str, class_name: str, field: str
):
    for data in ({"type": name}, {"_CLASS_": f"olmo_optim_ext.{class_name}"}):
        with pytest.raises(OLMoConfigurationError, match=f"'{field}' is .*two numbers"):
            OptimConfig.from_dict({**data, field: betas})


@pytest.mark.parametrize("data", [{"type": "ext_adamw"}, {"type": "ext_muon"}], ids=str)
def test_unknown_fields_are_refused_when_decoded(data: Dict[str, Any]):
    with pytest.raises(TypeError, match="learning_rate"):
        OptimConfig.from_dict({**data, "learning_rate": 0.1})


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(lr=0.1, betas=(0.8, 0.9), compile=True),
        NAdamWConfig(nesterov=NesterovForm.dozat, eps=1e-20),
        MuonConfig(
            adamw_lr=0.2,
            adamw_weight_decay=0.0,
            lr_scaling=LRScaling.original,
            polar_dtype=DType.bfloat16,
            muon_on_lm_head=True,
            group_overrides=[override("norm.*", "row.*", weight_decay=0.0)],
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_config_survives_its_dictionary(config: ExtOptimConfig):
    data = json.loads(json.dumps(config.as_config_dict()))
    assert data["type"] == type(config).registered_name
    for decoded in (Config.from_dict(data), OptimConfig.from_dict(data)):
        assert type(decoded) is type(config)
        assert decoded == config
    del data["_CLASS_"]
    assert OptimConfig.from_dict(data) == config


def test_strings_and_lists_become_what_the_field_says():
    config = MuonConfig(
        lr_scaling="spectral",  # type: ignore[arg-type]
        polar_dtype="bfloat16",  # type: ignore[arg-type]
        adamw_betas=[0.8, 0.9],  # type: ignore[arg-type]
    )
    assert type(config.lr_scaling) is LRScaling
    assert type(config.polar_dtype) is DType
    assert config.adamw_betas == (0.8, 0.9)


# Building


@every_config
def test_a_config_builds_twice_the_same_and_stays_as_it_was(config_class):
    config = config_class(
        group_overrides=[override("norm.*", lr=0.02), override("tall.weight", weight_decay=0.0)]
    )
    before = copy.deepcopy(config)
    models = [MixedShapes(), MixedShapes()]
    optims = []
    for model in models:
        optims.append(config.build(model))
        train(model, optims[-1], 0, 2)
        assert config == before
    fields = [
        [{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optims
    ]
    assert fields[0] == fields[1]
    assert not torch.equal(models[0].square.weight, MixedShapes().square.weight)
    for name, weight in weights(models[0]).items():
        assert torch.equal(models[1].get_parameter(name), weight), name


@pytest.mark.parametrize(
    "config,cls", [(AdamWConfig(), AdamW), (NAdamWConfig(), NAdamW), (MuonConfig(), Muon)]
)
def test_every_trainable_parameter_is_in_one_group_by_its_name(config: ExtOptimConfig, cls):
    model = MixedShapes()
    model.tall.weight.requires_grad_(False)
    optim = config.build(model)
    assert type(optim) is cls
    params = [p for group in optim.param_groups for p in group["params"]]
    names = [optim.name_of(p) for p in params]
    assert len(set(names)) == len(names)
    assert set(names) == all_names(model) - {"tall.weight"}
    assert all(model.get_parameter(name) is p for name, p in zip(names, params))


@every_config
def test_a_model_without_trainable_parameters_is_refused(config_class):
    with pytest.raises(OLMoConfigurationError, match="no trainable parameter"):
        config_class().build(MixedShapes().requires_grad_(False))


def test_a_model_without_matrices_is_refused_by_muon():
    with pytest.raises(OLMoConfigurationError, match="no parameter has the role 'matrix'"):
        MuonConfig().build(nn.LayerNorm(4))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("cls,config", [(AdamW, AdamWConfig()), (NAdamW, NAdamWConfig())])
def test_elementwise_optimizers_need_no_config(cls, config: ExtOptimConfig, named: bool):
    model, reference = MixedShapes(), MixedShapes()
    optim = cls(model.named_parameters() if named else model.parameters())
    for index, (name, param) in enumerate(model.named_parameters()):
        assert optim.name_of(param) == (name if named else f"param.{index}")
    train(model, optim, 0, 2)
    train(reference, config.build(reference), 0, 2)
    for name, weight in weights(reference).items():
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("named", [True, False])
def test_muon_without_its_config_says_what_makes_the_groups(named: bool):
    model = MixedShapes()
    with pytest.raises(OLMoConfigurationError, match=r"MuonConfig\.build\(model\)"):
        Muon(model.named_parameters() if named else model.parameters())


@every_config
def test_initial_lr_is_set_in_each_group(config_class):
    model = MixedShapes()
    config = config_class(lr=0.01, group_overrides=[override("norm.*", lr=0.02)])
    optim = config.build(model)
    assert len(optim.param_groups) >= 2
    for group in optim.param_groups:
        assert group["initial_lr"] == group["lr"]
    expected = {name: 0.02 if name.startswith("norm.") else 0.01 for name in all_names(model)}
    assert field_by_name(optim, model, "initial_lr") == expected


@every_config
def test_with_compile_the_schedule_fills_the_lr_in_place(config_class):
    model = MixedShapes()
    config = config_class(compile=True, lr=0.01, group_overrides=[override("norm.*", lr=0.02)])
    optim = config.build(model)
    tensors = [group["lr"] for group in optim.param_groups]
    assert all(isinstance(lr, torch.Tensor) and lr.ndim == 0 for lr in tensors)
    assert len({id(lr) for lr in tensors}) == len(tensors)
    initial = [group["initial_lr"] for group in optim.param_groups]
    assert sorted(set(initial)) == [0.01, 0.02]

    scheduler = LinearWithWarmup(warmup=10)
    trainer: Any = SimpleNamespace(global_step=5, max_steps=100)
    for group in optim.param_groups:
        scheduler.set_lr(group, trainer)
    assert all(group["lr"] is lr for group, lr in zip(optim.param_groups, tensors))
    assert [float(lr) for lr in tensors] == pytest.approx([lr / 2 for lr in initial])

    # A checkpoint replaces neither the tensors nor where the schedule starts.
    saved = config_class(lr=0.5, group_overrides=[override("norm.*", lr=0.7)]).build(MixedShapes())
    optim.load_state_dict(saved.state_dict())
    assert all(group["lr"] is lr for group, lr in zip(optim.param_groups, tensors))
    assert [float(lr) for lr in tensors] == pytest.approx(initial)
    assert [group["initial_lr"] for group in optim.param_groups] == initial


# Overrides


@every_config
def test_overrides_set_lr_and_weight_decay_by_name(config_class):
    model = MixedShapes()
    config = config_class(
        lr=0.01,
        weight_decay=0.1,
        group_overrides=[
            override("embeddings.weight", weight_decay=0.0),
            override("*.bias", "norm.*", lr=0.03, weight_decay=0.2),
            override("tall.*", lr=0.02),
        ],
    )
    optim = config.build(model)
    biases = {name for name in all_names(model) if name.endswith(".bias")} | {"norm.weight"}
    expected = {
        name: (
            (0.01, 0.0)
            if name == "embeddings.weight"
            else (0.03, 0.2)
            if name in biases
            else (0.02, 0.1)
            if name == "tall.weight"
            else (0.01, 0.1)
        )
        for name in all_names(model)
    }
    lrs, decays = (field_by_name(optim, model, field) for field in ("lr", "weight_decay"))
    assert {name: (lrs[name], decays[name]) for name in lrs} == expected


@every_config
def test_overrides_take_the_names_of_the_model_without_wrappers(config_class):
    model = MixedShapes()
    square = model.square.weight
    model.set_submodule("square", checkpoint_wrapper(model.square))
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    optim = config_class(lr=0.01, group_overrides=[override("square.*", lr=0.02)]).build(compiled)
    lrs = {optim.name_of(p): g["lr"] for g in optim.param_groups for p in g["params"]}
    assert {name for name, lr in lrs.items() if lr == 0.02} == {"square.weight", "square.bias"}
    assert optim.name_of(square) == "square.weight"


def test_one_override_may_span_both_rules_of_muon():
    model = MixedShapes()
    optim = MuonConfig(
        lr=0.01, adamw_lr=0.002, group_overrides=[override("square.*", lr=0.05)]
    ).build(model)
    assert names_with(optim, model, "lr", 0.05) == {"square.weight", "square.bias"}
    assert names_with(optim, model, "algorithm", "muon") == MATRICES
    assert names_with(optim, model, "lr", 0.01) == MATRICES - {"square.weight"}


def test_roles_may_be_overridden():
    model = MixedShapes()
    config = MuonConfig(
        lr=0.01,
        adamw_lr=0.002,
        group_overrides=[
            override("square.weight", role="vector"),
            override("embeddings.weight", role="matrix", lr=0.03),
        ],
    )
    optim = config.build(model)
    muon = MATRICES - {"square.weight"} | {"embeddings.weight"}
    assert names_with(optim, model, "algorithm", "muon") == muon
    assert names_with(optim, model, "algorithm", "adamw") == all_names(model) - muon
    lrs = field_by_name(optim, model, "lr")
    assert lrs["square.weight"] == 0.002
    assert lrs["embeddings.weight"] == 0.03
    assert all("role" not in group for group in optim.param_groups)
    roles = {name: str(row.role) for name, row in config.roles(model).items()}
    assert (roles["square.weight"], roles["embeddings.weight"]) == ("vector", "matrix")


@every_config
@pytest.mark.parametrize("second", ["square.weight", "*.weight", "sq*"])
def test_two_overrides_of_one_parameter_are_refused(second: str, config_class):
    config = config_class(group_overrides=[override("square.*", lr=0.1), override(second, lr=0.2)])
    with pytest.raises(OLMoConfigurationError, match="'square.weight' matches 'group_overrides' 1"):
        config.build(MixedShapes())


def test_patterns_of_one_override_may_overlap():
    model = MixedShapes()
    config = AdamWConfig(lr=0.01, group_overrides=[override("square.*", "*.weight", lr=0.1)])
    optim = config.build(model)
    expected = {name for name in all_names(model) if name.endswith(".weight")} | {"square.bias"}
    assert names_with(optim, model, "lr", 0.1) == expected


@every_config
def test_unknown_roles_are_refused(config_class):
    config = config_class(group_overrides=[override("square.weight", role="matrices")])
    with pytest.raises(OLMoConfigurationError, match="square.weight: role' is 'matrices', allowed"):
        config.build(MixedShapes())


@pytest.mark.parametrize("config_class", [AdamWConfig, NAdamWConfig])
def test_roles_are_no_option_of_elementwise_optimizers(config_class):
    config = config_class(group_overrides=[override("square.weight", role="vector")])
    with pytest.raises(OLMoConfigurationError, match="'role' is not a field"):
        config.build(MixedShapes())


@pytest.mark.parametrize("role", ["matrix", "head"])
def test_only_what_stores_matrices_can_be_made_a_matrix(role: str):
    overrides = [override("norm.weight", role=role)]
    config = MuonConfig(group_overrides=overrides, muon_on_lm_head=True)
    with pytest.raises(OLMoConfigurationError, match="'norm.weight' of shape .* store matrices"):
        config.build(MixedShapes())


def test_overrides_of_frozen_parameters_have_no_effect(caplog: pytest.LogCaptureFixture):
    model = MixedShapes()
    model.tall.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        AdamWConfig(group_overrides=[override("tall.*", lr=0.1)]).build(model)
    assert "frozen parameter" in caplog.text


class WithExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in = nn.Linear(4, 4, bias=False)
        self.experts = MoEMLP(d_model=4, hidden_size=6, num_experts=2)
        for param in self.experts.parameters():
            nn.init.normal_(param)


def test_experts_can_be_left_to_adamw():
    model = WithExperts()
    optim = MuonConfig().build(model)
    assert names_with(optim, model, "algorithm", "muon") == all_names(model)
    model = WithExperts()
    optim = MuonConfig(group_overrides=[override("experts.*", role="vector")]).build(model)
    assert names_with(optim, model, "algorithm", "muon") == {"w_in.weight"}
    assert type(AdamWConfig().build(WithExperts())) is AdamW


class Apart(nn.Module):
    """Some matrices, each a parameter of its own."""

    def __init__(self, matrices: Sequence[torch.Tensor]):
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(m.shape[1], m.shape[0], bias=False) for m in matrices
        )
        with torch.no_grad():
            for param, matrix in zip(self.linears.parameters(), matrices):
                param.copy_(matrix)


def steps_alike(
    model: nn.Module,
    config: MuonConfig,
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> None:
    """A stacked parameter moves as its matrices, which ``split`` gives as ``(out, in)``, would."""
    (param,) = (p for p in model.parameters() if p.requires_grad)
    apart: Any = Apart(split(param.detach()))
    optim, apart_optim = config.build(model), config.replace(group_overrides=None).build(apart)
    for step in range(3):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        for linear, grad in zip(apart.linears, split(param.grad)):
            linear.weight.grad = grad.contiguous()
        optim.step()
        apart_optim.step()
    for linear, matrix in zip(apart.linears, split(param.detach())):
        torch.testing.assert_close(linear.weight.detach(), matrix, rtol=1e-5, atol=1e-6)


class Alone(nn.Module):
    def __init__(self, module: nn.Module, keep: str):
        super().__init__()
        self.module = module
        for name, param in list(module.named_parameters()):
            param.requires_grad_(name == keep)
            nn.init.normal_(param)


# Scales that depend on which side is out.
SPECTRAL = MuonConfig(lr=0.1, lr_scaling=LRScaling.spectral)


def test_each_expert_stored_in_out_is_a_matrix():
    model = Alone(MoEMLP(d_model=4, hidden_size=6, num_experts=3), "w1")
    steps_alike(model, SPECTRAL, lambda x: [m.mT for m in x.view(3, 4, 6)])


def test_each_expert_stored_out_in_is_a_matrix():
    model = Alone(DroplessMoEMLP(d_model=4, hidden_size=6, num_experts=3), "w1")
    steps_alike(model, SPECTRAL, lambda x: list(x.view(3, 6, 4)))


def test_experts_in_three_dimensions_may_be_split_into_gate_and_up():
    config = RoutedExpertsConfig(4, 6, num_experts=3, bias=False, dtype=DType.float32)
    model = Alone(config.build(), "w_up_gate")
    fused = SPECTRAL.replace(row_blocks="fused")
    steps_alike(model, SPECTRAL, lambda x: list(x))
    steps_alike(model, fused, lambda x: [half for m in x for half in m.chunk(2)])


def test_experts_side_by_side_are_matrices():
    config = SharedExpertsConfig(4, 6, num_experts=2, bias=False, dtype=DType.float32)
    model = Alone(config.build(), "w_up_gate")
    steps_alike(model, SPECTRAL, lambda x: [m.mT for m in x.chunk(2, dim=1)])


@pytest.mark.parametrize("blocks,sizes", [(2, [4, 4]), ([2, 6], [2, 6])])
def test_row_blocks_are_matrices(blocks, sizes):
    config = SPECTRAL.replace(group_overrides=[override("*", row_blocks=blocks)])
    steps_alike(nn.Linear(5, 8, bias=False), config, lambda x: x.split(sizes))


def test_a_convolution_is_a_matrix_if_asked():
    model = nn.Conv2d(3, 5, 2, bias=False)
    with pytest.raises(OLMoConfigurationError, match="no parameter has the role 'matrix'"):
        MuonConfig().build(model)
    config = SPECTRAL.replace(group_overrides=[override("*", role="matrix")])
    steps_alike(model, config, lambda x: [x.reshape(5, 12)])


def test_row_blocks_of_what_follows_no_matrix_rule_are_refused():
    config = MuonConfig(group_overrides=[override("norm.*", row_blocks=2)])
    with pytest.raises(OLMoConfigurationError, match="'row_blocks' is set for parameter 'norm"):
        config.build(MixedShapes())
    config = MuonConfig(group_overrides=[override("square.weight", row_blocks=3)])
    with pytest.raises(OLMoConfigurationError, match="square.weight"):
        config.build(MixedShapes())


# Muon's two rules


@pytest.mark.parametrize("on_head", [True, False])
def test_muon_takes_the_head_when_asked(on_head: bool):
    model = MixedShapes()
    optim = MuonConfig(muon_on_lm_head=on_head).build(model)
    expected = MATRICES | ({"lm_head.weight"} if on_head else set())
    assert names_with(optim, model, "algorithm", "muon") == expected
    assert names_with(optim, model, "algorithm", "adamw") == all_names(model) - expected


@pytest.mark.parametrize("on_head", [True, False])
def test_muon_never_takes_a_tied_embedding(on_head: bool):
    model = MixedShapes()
    model.lm_head.weight = model.embeddings.weight
    optim = MuonConfig(muon_on_lm_head=on_head).build(model)
    assert names_with(optim, model, "algorithm", "muon") == MATRICES
    assert field_by_name(optim, model, "algorithm")["embeddings.weight"] == "adamw"


def adamw_fields(optim: Muon) -> Dict[str, Tuple[Any, ...]]:
    """By algorithm."""
    return {
        group["algorithm"]: tuple(group[k] for k in ("lr", "betas", "eps", "weight_decay"))
        for group in optim.param_groups
    }


def test_adamw_fields_reach_the_groups_of_adamw():
    config = MuonConfig(
        lr=0.01,
        weight_decay=0.1,
        adamw_lr=0.002,
        adamw_betas=(0.8, 0.9),
        adamw_eps=1e-6,
        adamw_weight_decay=0.0,
    )
    fields = adamw_fields(config.build(MixedShapes()))
    assert fields["adamw"] == (0.002, (0.8, 0.9), 1e-6, 0.0)
    assert (fields["muon"][0], fields["muon"][3]) == (0.01, 0.1)


def test_adamw_takes_lr_and_weight_decay_of_muon_by_default():
    fields = adamw_fields(MuonConfig(lr=0.03, weight_decay=0.2).build(MixedShapes()))
    assert fields["adamw"] == (0.03, (0.9, 0.95), 1e-8, 0.2)
    assert (fields["muon"][0], fields["muon"][3]) == (0.03, 0.2)


def test_what_muon_leaves_moves_as_under_adamw():
    model, reference = MixedShapes(), MixedShapes()
    fields: Dict[str, Any] = dict(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    train(reference, AdamWConfig(lr=0.002, **fields).build(reference), 0, 3)
    config = MuonConfig(lr=0.01, adamw_lr=0.002, **{f"adamw_{k}": v for k, v in fields.items()})
    train(model, config.build(model), 0, 3)
    for name in all_names(model):
        same = torch.equal(model.get_parameter(name), reference.get_parameter(name))
        assert same == (name not in MATRICES), name


# Loading


CHANGED: List[Tuple[ExtOptimConfig, ExtOptimConfig, List[str]]] = [
    (
        AdamWConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.2),
        AdamWConfig(lr=0.02, betas=(0.9, 0.99), weight_decay=0.2, eps=1e-6),
        [
            "group 0 betas: (0.8, 0.9) -> (0.9, 0.99)",
            "group 0 eps: 1e-08 -> 1e-06",
            "group 0 initial_lr: 0.01 -> 0.02",
        ],
    ),
    (
        NAdamWConfig(nesterov=NesterovForm.dozat),
        NAdamWConfig(nesterov=NesterovForm.torch),
        ["group 0 nesterov: dozat -> torch"],
    ),
    (
        MuonConfig(momentum=0.9, adamw_eps=1e-7),
        MuonConfig(momentum=0.95, adamw_eps=1e-6),
        [
            f"group {group} {change}"
            for group in (0, 1)
            for change in ("momentum: 0.9 -> 0.95", "eps: 1e-07 -> 1e-06")
        ],
    ),
]


@pytest.mark.parametrize(
    "saved,config,changes", CHANGED, ids=[type(row[0]).__name__ for row in CHANGED]
)
def test_the_config_wins_over_the_checkpoint_and_says_so_once(
    saved: ExtOptimConfig,
    config: ExtOptimConfig,
    changes: List[str],
    caplog: pytest.LogCaptureFixture,
):
    model = MixedShapes()
    old = saved.build(model)
    train(model, old, 0, 3)  # moves lr as a schedule does, which is no difference

    optim = config.build(MixedShapes())
    expected = [
        {**{k: v for k, v in group.items() if k != "params"}, "calls": 3}
        for group in optim.param_groups
    ]
    with caplog.at_level(logging.WARNING):
        optim.load_state_dict(old.state_dict())
    assert [
        {k: v for k, v in group.items() if k != "params"} for group in optim.param_groups
    ] == expected

    (record,) = [r for r in caplog.records if r.name.startswith("olmo_optim_ext")]
    message = record.getMessage()
    assert message.startswith("The checkpoint was saved with other hyperparameters")
    assert sorted(message.split(": ", 1)[1].split("; ")) == sorted(changes)


@every_config
def test_loading_the_same_hyperparameters_logs_nothing(
    config_class, caplog: pytest.LogCaptureFixture
):
    model = MixedShapes()
    old = config_class().build(model)
    train(model, old, 0, 3)
    optim = config_class().build(MixedShapes())
    with caplog.at_level(logging.WARNING):
        optim.load_state_dict(old.state_dict())
    assert [group["calls"] for group in optim.param_groups] == [3] * len(optim.param_groups)
    assert not [r for r in caplog.records if r.name.startswith("olmo_optim_ext")]
