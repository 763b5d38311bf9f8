"""
Corners of elementwise rules that the contracts do not come to.
"""

from typing import Any, Dict, List, Tuple

import pytest
import torch
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.moe.v2.routed_experts import RoutedExperts

from olmo_optim_ext import (
    AdafactorConfig,
    AdamConfig,
    AdamMiniConfig,
    AdanConfig,
    AdoptConfig,
    LambConfig,
    LarsConfig,
    Mars,
    MarsConfig,
    ProdigyConfig,
    RMSpropConfig,
    SGDConfig,
)
from olmo_optim_ext.elementwise.adam_mini import blocks_of
from olmo_optim_ext.engine.roles import classify
from olmo_optim_ext.engine.rowwise import RowwiseOptimizer

from .case import MixedShapes, equal, grads_at, train, weights


def steps(config: Any, grads: List[torch.Tensor]) -> Tuple[Any, Any]:
    """A matrix that starts at 0 under the gradients given."""
    model = nn.Linear(grads[0].shape[1], grads[0].shape[0], bias=False)
    nn.init.zeros_(model.weight)
    optim = config.build(model)
    for grad in grads:
        model.weight.grad = grad.clone()
        optim.step()
    return model, optim


# What contradicts itself


@pytest.mark.parametrize("config", [LambConfig, LarsConfig, AdanConfig, SGDConfig, AdafactorConfig])
def test_a_mask_of_decay_that_is_no_decay_of_weights_is_refused(config):
    fields = {"decoupled_weight_decay": False} if config is AdafactorConfig else {}
    with pytest.raises(OLMoConfigurationError, match="cautious_weight_decay.*allowed"):
        config(cautious_weight_decay=True, **fields).build(MixedShapes())


@pytest.mark.parametrize(
    "fields,named",
    [
        ({"momentum": 0.0}, "nesterov"),
        ({"dampening": 0.1}, "nesterov"),
    ],
)
def test_nesterov_without_its_momentum_is_refused(fields: Dict[str, Any], named: str):
    with pytest.raises(OLMoConfigurationError, match=f"'{named}' is True"):
        SGDConfig(nesterov=True, **fields).build(MixedShapes())


def test_mars_knows_its_rules_and_first_steps():
    params = [("w", nn.Parameter(torch.ones(2, 3)))]
    for bad in ({"algorithm": "lion"}, {"first_step": "currant"}):
        with pytest.raises(OLMoConfigurationError, match=f"'{next(iter(bad))}' is"):
            Mars([{"params": params, **bad}])
    with pytest.raises(OLMoConfigurationError, match="'first_step' is 'current' with 'exact'"):
        MarsConfig(exact=True, first_step="current").build(MixedShapes())  # type: ignore[arg-type]


def test_prodigy_wants_one_rate():
    from olmo_core.optim import OptimGroupOverride

    overrides = [OptimGroupOverride(["norm.*"], {"lr": 0.5})]
    with pytest.raises(OLMoConfigurationError, match="'lr' of a group is"):
        ProdigyConfig(group_overrides=overrides).build(MixedShapes())


# Values at the edge


def test_rows_that_never_had_a_gradient_stay_finite():
    grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for grad in grads:
        grad[2] = 0
    for config in (AdoptConfig(), AdafactorConfig(), AdamMiniConfig(eps=1e-30)):
        model, optim = steps(config, grads)
        assert all(torch.isfinite(x).all() for x in optim.state[model.weight].values())
        assert torch.equal(model.weight[2].detach(), torch.zeros(3))
        assert (model.weight[[0, 1, 3]] != 0).all()


def test_a_centered_variance_is_not_of_rounded_moments():
    generator = torch.Generator().manual_seed(0)
    grads = [1e-3 + 1e-4 * torch.randn(6, 5, generator=generator) for _ in range(60)]
    config = RMSpropConfig(centered=True, lr=1e-3)
    plain, _ = steps(config, grads)
    rounded, optim = steps(config.replace(state_dtype="bfloat16", momentum=0.5), grads)
    dtypes = {key: x.dtype for key, x in optim.state[rounded.weight].items()}
    assert dtypes["exp_avg_sq"] == dtypes["exp_avg"] == torch.float32
    assert dtypes["momentum"] == torch.bfloat16
    assert rounded.weight.abs().max() < 4 * plain.weight.abs().max()


def test_prodigy_does_nothing_at_a_rate_of_zero():
    config = ProdigyConfig(d0=0.03, d_coef=20.0, weight_decay=0.1)
    model, paused = MixedShapes(), MixedShapes()
    optim, other = config.build(model), config.build(paused)
    train(model, optim, 0, 6)
    for step in range(6):
        for idle in (True, False) if step in (0, 3) else (False,):
            for group in other.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = 0.0 if idle else group["initial_lr"] * (1.0 - 0.01 * step)
            for name, grad in grads_at(step, paused).items():
                paused.get_parameter(name).grad = grad
            other.step()
    assert equal(weights(paused), weights(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_do_not_take_the_default_dtype(dtype: torch.dtype):
    """Constants of rules are those of the parameters, whatever torch would make of a number."""

    def run() -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        train(model, SGDConfig(lr=0.05, dampening=0.3).build(model), 0, 3)
        return weights(model)

    expected = run()
    model, grads = MixedShapes(), [grads_at(step, MixedShapes()) for step in range(3)]
    optim = SGDConfig(lr=0.05, dampening=0.3).build(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for step in range(3):
            for group in optim.param_groups:
                group["lr"] = 0.05 * (1.0 - 0.01 * step)
            for name, grad in grads[step].items():
                model.get_parameter(name).grad = grad
            optim.step()
    finally:
        torch.set_default_dtype(before)
    assert equal(weights(model), expected)


# Blocks of Adam-mini


def blocks(model: nn.Module) -> Dict[str, int]:
    """How many second moments each parameter has."""
    return {
        name: sum(m.n_rows // m.shared_by for m in blocks_of(row).matrices)
        for name, row in classify(model).items()
    }


def test_blocks_of_a_transformer_follow_from_roles():
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.transformer import TransformerConfig

    config = TransformerConfig.llama_like(
        d_model=16,
        vocab_size=40,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        hidden_size_multiple_of=16,
        attn_backend=AttentionBackendName.torch,
    )
    found = blocks(config.build(init_device="meta"))
    hidden = found["blocks.0.feed_forward.w1.weight"]
    assert found == {
        "embeddings.weight": 40,
        "blocks.0.attention.w_q.weight": 4,
        "blocks.0.attention.w_k.weight": 2,
        "blocks.0.attention.w_v.weight": 8,
        "blocks.0.attention.w_out.weight": 16,
        "blocks.0.attention_norm.weight": 1,
        "blocks.0.feed_forward.w1.weight": hidden,
        "blocks.0.feed_forward.w2.weight": 16,
        "blocks.0.feed_forward.w3.weight": hidden,
        "blocks.0.feed_forward_norm.weight": 1,
        "lm_head.norm.weight": 1,
        "lm_head.w_out.weight": 40,
    }
    assert hidden >= 16


def test_fused_projections_have_heads_of_queries_and_keys_only():
    attention = nn.MultiheadAttention(8, 2)
    found = blocks(attention)
    assert found["in_proj_weight"] == 2 + 2 + 8
    assert found["in_proj_bias"] == 24 and found["out_proj.weight"] == 8


def test_an_expert_shares_no_block_with_another():
    from .models import ExpertShapes

    found = blocks(ExpertShapes())
    # Six experts of 4 inputs and 5 hidden units: each output of each expert.
    assert found["dropless.w1"] == found["with_capacity.w1"] == 6 * 5
    assert found["dropless.w2"] == found["with_capacity.w2"] == 6 * 4


def test_biases_of_experts_are_elements():
    experts: Any = RoutedExperts(4, 5, 3, bias=True, dtype=DType.float32, init_device="meta")
    found = blocks(experts)
    assert found["b_down"] == experts.b_down.numel() == 3 * 4
    assert found["b_up_gate"] == experts.b_up_gate.numel()


def test_biases_are_elements_and_gains_are_one_block():
    assert blocks(MixedShapes())["norm.weight"] == 1
    assert blocks(MixedShapes())["norm.bias"] == 8
    assert blocks(MixedShapes())["row.weight"] == 1
    assert blocks(MixedShapes())["square.bias"] == 8


def test_rows_without_blocks_are_adam():
    """Of matrices with one column each row is an element."""
    grads = [torch.randn(5, 1, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    optims: List[RowwiseOptimizer] = []
    found = []
    for config in (AdamMiniConfig(lr=0.01), AdamConfig(lr=0.01)):
        param = nn.Parameter(torch.zeros(5, 1))
        optim: Any = config.optimizer()([("w", param)], lr=0.01)
        for grad in grads:
            param.grad = grad.clone()
            optim.step()
        optims.append(optim)
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
