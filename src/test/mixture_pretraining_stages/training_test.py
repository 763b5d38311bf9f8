"""
Reading a spec, and refusing one.
"""

import os
from pathlib import Path
from typing import Any, Dict

import pytest
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import WSD, AdamWConfig, ConstantScheduler

import olmo_optim_ext
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.schedule import StageScheduler
from mixture_pretraining_stages.spec_parts import OptimizerMetricsSpec
from mixture_pretraining_stages.training import (
    JolmoModel,
    _build_optimizer_spec,
    _optimizer_class_name,
)

from .spec import tiny_spec, write_spec

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def load(folder: Path, *overrides: str, **changes: Any) -> JolmoModel:
    spec = load_spec(write_spec(folder / "spec.yaml", tiny_spec(folder, **changes)), overrides)
    spec.check()
    return spec


def test_the_quickstart_is_what_it_says():
    spec = load_spec(QUICKSTART)
    spec.check()
    assert isinstance(spec.optimizer_config(), olmo_optim_ext.MuonConfig)
    assert isinstance(spec.scheduler_config(), WSD)
    assert spec.output == "runs/quickstart"
    config = spec.model_config(258)
    assert (config.vocab_size, config.init_seed) == (384, 42)


def test_overrides_reach_any_depth(tmp_path):
    spec = load(
        tmp_path,
        "optimizer.lr=1e-3",
        "optimizer.adamw_betas=[0.8, 0.9]",
        "stages.0.tokens=5_000",
        "stages[1].mixture.first=2",
        "scheduler=null",
        "name=a b",
    )
    assert spec.optimizer["lr"] == 0.001
    assert spec.optimizer_config().adamw_betas == (0.8, 0.9)  # type: ignore[attr-defined]
    assert spec.stages[0].tokens == 5000
    assert spec.stages[1].mixture == {"second": 1.0, "first": 2.0}
    assert spec.name == "a b"
    assert isinstance(spec.scheduler_config(), ConstantScheduler)


@pytest.mark.parametrize("written", [{}, {"optimizer_metrics": None}])
def test_optimizer_metrics_are_off_and_one_override_turns_them_on(written, tmp_path):
    assert load(tmp_path, **written).optimizer_metrics is None
    spec = load(tmp_path, "optimizer_metrics.every=5", **written)
    assert spec.optimizer_metrics == OptimizerMetricsSpec(every=5, per_layer=True)


def test_files_are_included_and_interpolated(tmp_path):
    write_spec(tmp_path / "base.yaml", tiny_spec(tmp_path))
    path = tmp_path / "spec.yaml"
    path.write_text(
        "include: base.yaml\nname: derived\noutput: runs/${name}\noptimizer: {lr: 0.5}\n"
    )
    spec = load_spec(path)
    assert (spec.name, spec.output) == ("derived", "runs/derived")
    assert spec.optimizer == {"name": "muon", "lr": 0.5}

    path.write_text("include: spec.yaml\n")
    with pytest.raises(OLMoConfigurationError, match="circular"):
        load_spec(path)


def test_models_are_factories_with_arguments_or_full_configs(tmp_path):
    factory = load(tmp_path).model_config(258)
    assert (factory.d_model, factory.n_layers) == (16, 1)
    full = TransformerConfig.olmo2_1M(vocab_size=512).as_config_dict()
    assert load(tmp_path, model=full).model_config(258).vocab_size == 512


def test_the_batch_factor_of_sophia_is_the_global_batch(tmp_path):
    def factor(*overrides: str) -> Any:
        spec = load(tmp_path, *overrides, optimizer={"name": "sophia", "lr": 0.001})
        config: Any = spec.optimizer_config()
        return config.batch_tokens

    assert factor() == 256
    assert factor("global_batch_size=512") == 512
    assert factor("optimizer.batch_tokens=1") == 1


def test_the_batch_factor_is_also_that_of_sophia_inside_another(tmp_path):
    def factor(*overrides: str) -> Any:
        optimizer = {"name": "lookahead", "k": 3, "inner": {"name": "sophia", "rho": 0.1}}
        config: Any = load(tmp_path, *overrides, optimizer=optimizer).optimizer_config()
        assert (config.k, config.rule_config.rho) == (3, 0.1)
        return config.rule_config.batch_tokens

    assert factor() == 256
    assert factor("global_batch_size=512") == 512
    assert factor("optimizer.inner.batch_tokens=1") == 1


def test_names_become_configs_without_a_list_of_names():
    for name in olmo_optim_ext.list_optimizers():
        cls: Any = olmo_optim_ext.get_config_class(name)
        assert _optimizer_class_name(name) == f"{cls.__module__}.{cls.__name__}"
        spec: Any = _build_optimizer_spec(name, lr=0.5)
        assert type(spec) is cls and spec.lr == 0.5
        if hasattr(spec, "weight_decay"):
            assert _build_optimizer_spec(name, weight_decay=0.25) == cls(weight_decay=0.25)
        # SOAP has betas of its own, beside AdamW's for what it leaves.
        betas = next((b for b in ("betas", "adamw_betas") if hasattr(spec, b)), None)
        if betas is not None:
            some = (0.5, 0.75, 0.8)[: len(getattr(spec, betas))]
            assert _build_optimizer_spec(name, betas=list(some)) == cls(**{betas: some})
    assert _optimizer_class_name("adamw") == "olmo_optim_ext.elementwise.adamw.AdamWConfig"
    assert isinstance(_build_optimizer_spec("olmo_core.adamw", lr=0.5), AdamWConfig)


BAD: Dict[str, Dict[str, Any]] = {
    "optimizer.name.*'mun'.*did you mean ext_muon": {"optimizer.name": "mun"},
    "optimizer.name.*OLMo-core has no optimizer 'ext_muon'": {
        "optimizer.name": "olmo_core.ext_muon"
    },
    "optimizer.name: None": {"optimizer": "{lr: 1}"},
    "optimizer.momentm: .*momentum": {"optimizer.momentm": 0.9},
    "optimizer.lr: 'fast'.*a number": {"optimizer.lr": "fast"},
    "optimizer.lr: True.*a number": {"optimizer.lr": "true"},
    "'lr' is -1.0.*>= 0": {"optimizer.lr": -1},
    "'adamw_betas' is .0.9,..*two numbers": {"optimizer.betas": "[0.9]"},
    "'adamw_betas' is .*two numbers in": {"optimizer.adamw_betas": "[0.9, 0.95, 0.99]"},
    "optimizer.adamw_betas: 0.9.*a list": {"optimizer.adamw_betas": 0.9},
    "optimizer.lr_scaling: 'rms'.*spectral": {"optimizer.lr_scaling": "rms"},
    "optimizr: there is no such key.*did you mean optimizer": {"optimizr.lr": 1},
    "scheduler.type: 'wsq'.*did you mean wsd": {"scheduler.type": "wsq"},
    "scheduler.warmp: there is no such key.*warmup": {"scheduler.warmp": 1},
    "scheduler: .*decay_fraction": {"scheduler.decay_fraction": 2},
    "stages.0.mixture.third: .*first, second": {"stages.0.mixture.third": 1},
    "stages.0.mixture.first: -1.0.*>= 0": {"stages.0.mixture.first": -1},
    "stages.0.mixture.first: nan.*>= 0": {"stages.0.mixture.first": ".nan"},
    "stages.1.mixture: .*sum > 0": {"stages.1.mixture.second": 0},
    "stages.0.tokens: 0.*>= 1": {"stages.0.tokens": 0},
    "stages.0.tokens: 1.5.*an integer": {"stages.0.tokens": 1.5},
    "stages.0.name: 'two'.*of its own": {"stages.0.name": "two"},
    "stages.0.name: 'a/b'.*folder": {"stages.0.name": "a/b"},
    "stages.0.lr_scale: -1.0": {"stages.0.lr_scale": -1},
    "stages: .*at least one": {"stages": "[]"},
    "stages.2.tokens=1: list index": {"stages.2.tokens": 1},
    "sources.first: 'x'.*a mapping": {"sources.first": "x"},
    "sources.first.pth: there is no such key.*path": {"sources.first.pth": "x"},
    "sequence_length: 0": {"sequence_length": 0},
    "rank_microbatch_size: 100.*multiple of sequence_length .32": {"rank_microbatch_size": 100},
    "global_batch_size: 300.*multiple of .*128 x 1": {"global_batch_size": 300},
    "model: .*'olmo9'.*olmo2_1M": {"model": "olmo9"},
    "model: llama_like refuses.*d_modl": {"model.d_modl": 3},
    "model.attn_backend: 'flash'.*torch": {"model.attn_backend": "flash"},
    "model: 3 is not allowed": {"model": 3},
    "model: it is no TransformerConfig": {"model": "{d_model: 3}"},
    "precision: it is 'float16'.*float32 or bfloat16": {"precision": "float16"},
    "precision: 'float8'.*bfloat16": {"precision": "float8"},
    "parallelism.pipeline.*not supported": {"parallelism.pipeline": 2},
    "parallelism.data: 'zero'.*hsdp": {"parallelism.data": "zero"},
    "parallelism.replicas: 0": {"parallelism.replicas": 0},
    "max_grad_norm: 0.0": {"max_grad_norm": 0},
    "evaluation.tokens: 8.*sequence_length": {"evaluation.tokens": 8},
    "checkpoint.every: 0": {"checkpoint.every": 0},
    "optimizer_metrics.every: 0.*>= 1": {"optimizer_metrics.every": 0},
    "optimizer_metrics.layers: there is no such key.*per_layer": {"optimizer_metrics.layers": 1},
    "optimizer_metrics: 'all'.*a mapping": {"optimizer_metrics": "all"},
    "optimizer_metrics: .* 'adamw' has no rule for matrices.*null.*ext_muon": {
        "optimizer_metrics": "{}",
        "optimizer": "{name: adamw}",
    },
    "optimizer_metrics: .* 'olmo_core.adamw' has no rule": {
        "optimizer_metrics.every": 5,
        "optimizer": "{name: olmo_core.adamw}",
    },
    "compile: 'maybe'.*true or false": {"compile": "maybe"},
    "activation_checkpointing: .*block_interval": {
        "activation_checkpointing": "{mode: selected_blocks}"
    },
    "Interpolation key 'nowhere' not found": {"output": "${nowhere}"},
    "sequence_length: inf.*an integer": {"sequence_length": ".inf"},
    "stages.0.tokens: nan.*an integer": {"stages.0.tokens": ".nan"},
    "stages.0.lr_scale: inf.*finite": {"stages.0.lr_scale": ".inf"},
    "stages.0.mixture.second: 1e-09.*enough for a sequence": {"stages.0.mixture.second": 1e-9},
    "seed: -1.*0 to 2": {"seed": -1},
    "parallelism: 5.*a mapping": {"parallelism": 5},
    "parallelism: 'pipeline'.*a mapping": {"parallelism": "pipeline"},
    "model: a dtype is 'float16'": {"model.dtype": "float16"},
    "model.dtype: 'float12'.*bfloat16": {"model.dtype": "float12"},
    "model: llama_like refuses.*ZeroDivisionError|model: it cannot be built": {"model.n_heads": 0},
    "model: .*": {"model.vocab_size": "abc"},
    "optimizer: it cannot be built: ImportError": {"optimizer": "{name: olmo_core.muon}"},
    "optimizer: it cannot be built: ValueError": {"optimizer": "{name: olmo_core.adamw, lr: -1}"},
    "optimizer: .*'lr' is None": {
        "optimizer.group_overrides": "[{params: ['*norm*'], opts: {lr: null}}]"
    },
    "optimizer: .*nothing.*does not match": {
        "optimizer.group_overrides": "[{params: [nothing], opts: {lr: 1}}]"
    },
    "optimizer.group_overrides.0.params.0: 1.*a text": {
        "optimizer.group_overrides": "[{params: [1], opts: {lr: 1}}]"
    },
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_value_names_the_key_the_value_and_what_is_allowed(message, tmp_path):
    overrides = [f"{key}={value}" for key, value in BAD[message].items()]
    with pytest.raises(OLMoConfigurationError, match=message) as caught:
        load(tmp_path, *overrides).build_on_meta(258)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["lr", "=3", "optimizer.lr=[1", "optimizer..lr=3", "stages.x=1"]
)
def test_a_bad_override_is_named(override, tmp_path):
    with pytest.raises(OLMoConfigurationError) as caught:
        load(tmp_path, override)
    assert override.split("=")[0] in str(caught.value) or override in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "is empty"),
        (b"# nothing\n", "not a mapping"),
        (b"just words", "not a mapping"),
        (b"- a\n- b\n", "not a mapping"),
        (b"a: [1, 2\nb: 3", "is no YAML"),
        (b"a: 1\na: 2\n", "is no YAML"),
        (bytes(range(256)), "is no YAML"),
    ],
)
def test_a_file_that_is_no_spec_is_named(content, message, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(OLMoConfigurationError, match=f"spec.yaml: .*{message}"):
        load_spec(path)


@pytest.mark.parametrize("include", ["5", "[5, {a: 1}]", "nowhere.yaml", "true"])
def test_a_bad_include_is_named(include, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(f"include: {include}\nname: a\n")
    with pytest.raises(OLMoConfigurationError, match="include|nowhere.yaml|5"):
        load_spec(path)


def test_full_model_configs_of_float16_are_refused(tmp_path):
    full = TransformerConfig.olmo2_1M(vocab_size=512, dtype=DType.float16).as_config_dict()
    with pytest.raises(OLMoConfigurationError, match="float16"):
        load(tmp_path, model=full).model_config(258)


def test_nested_schedulers_and_their_units_are_kept(tmp_path):
    spec = load(
        tmp_path,
        scheduler={
            "type": "sequential",
            "units": "tokens",
            "schedulers": [{"type": "linear_with_warmup", "warmup": 512}, {"type": "constant"}],
            "schedulers_max": [1024],
        },
    )
    inner = spec.scheduler_config()
    assert [type(s).__name__ for s in inner.schedulers] == [  # type: ignore[attr-defined]
        "LinearWithWarmup",
        "ConstantScheduler",
    ]
    scaled = StageScheduler(inner=inner, scale=0.5)
    assert scaled.units == "tokens"
    assert scaled.get_lr(1.0, 256, 4096) == pytest.approx(0.25)


def test_a_missing_key_and_a_missing_file_are_named(tmp_path):
    spec = tiny_spec(tmp_path)
    del spec["stages"]
    with pytest.raises(OLMoConfigurationError, match="stages: this key is required"):
        load_spec(write_spec(tmp_path / "spec.yaml", spec))
    with pytest.raises(OLMoConfigurationError, match="none.yaml: No such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(OLMoConfigurationError, match="Is a directory"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "parallelism,ranks,message",
    [
        ({"data": "none"}, 2, "parallelism.data: 'none'"),
        ({"data": "hsdp", "replicas": 3}, 4, "parallelism.replicas: 3.*divisor of 4"),
        ({"data": "fsdp", "replicas": 2}, 4, "parallelism.replicas: 2.*1, but for hsdp"),
        ({"data": "ddp", "tensor": 2}, 4, "parallelism.data: 'ddp'.*tensor"),
        ({"tensor": 3}, 4, "parallelism.tensor: 3.*divisor of 4"),
        ({}, 4, "global_batch_size: 256.*128 x 4"),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(parallelism, ranks, message, tmp_path):
    spec = load(tmp_path, parallelism=parallelism)
    with pytest.raises(OLMoConfigurationError, match=message):
        spec.check(ranks)


def test_parallelism_becomes_olmo_cores(tmp_path):
    spec = load(tmp_path, parallelism={"data": "hsdp", "replicas": 2, "tensor": 2})
    one = spec.train_module_config(1)
    assert one.dp_config is None and one.tp_config is None
    eight = spec.train_module_config(8)
    assert eight.dp_config is not None and eight.tp_config is not None
    assert (str(eight.dp_config.name), eight.dp_config.num_replicas) == ("hsdp", 2)
    assert eight.tp_config.degree == 2


def test_the_environment_is_left_alone(tmp_path):
    before = dict(os.environ)
    load(tmp_path)
    assert dict(os.environ) == before
