"""
From one optimizer to another: what goes over means the same on both sides.
"""

import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
import torch.distributed as dist
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, OptimConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from olmo_optim_ext import get_config_class, list_optimizers
from olmo_optim_ext.engine.base import DECOUPLED
from olmo_optim_ext.training import Decision, carry_over

from ..ranks import run_on_ranks

MODEL = TransformerConfig.llama_like(vocab_size=32, d_model=16, n_layers=1, n_heads=2)
MATRIX, EMBEDDING, NORM = (
    "blocks.0.attention.w_q.weight",
    "embeddings.weight",
    "blocks.0.attention_norm.weight",
)
STEPS = 7


def config(name: str, **fields: Any) -> OptimConfig:
    return get_config_class(name)(**fields)


def build(optim: OptimConfig, device: str = "cpu") -> Tuple[Any, Any]:
    torch.manual_seed(0)
    model = MODEL.build(init_device=device)
    if device != "meta":
        model.init_weights(max_seq_len=8, device=torch.device(device))
    return model, optim.build(model)


def left_by(optim: OptimConfig) -> Tuple[Any, Any]:
    """What is known of the optimizer that has left a checkpoint, and of its model."""
    model, before = build(optim, "meta")
    return before, model


def train(model: Any, optim: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            # Of a mean that is not zero, as gradients of training have.
            grad = torch.randn(param.shape, generator=generator) + 0.5
            param.grad = grad
        optim.step()


def by_name(optim: Any) -> Dict[str, Dict[str, torch.Tensor]]:
    return {optim.name_of(p): state for p, state in optim.state.items()}


def switched(
    source: OptimConfig, target: OptimConfig, folder: Path
) -> Tuple[Any, Any, Any, List[Decision]]:
    """The source after some steps, the target that continued it, and what was decided."""
    model, before = build(source)
    train(model, before, range(STEPS))
    save_model_and_optim_state(folder, model, before, flatten_optimizer_state=True)
    _, after = build(target)
    meta_model, meta = build(source, "meta")
    decisions = carry_over(after, meta, meta_model, str(folder))
    return model, before, after, decisions


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


def test_adamw_goes_on_as_adam_as_if_nothing_had_happened(tmp_path):
    adamw, adam = config("ext_adamw", weight_decay=0.0), config("ext_adam", weight_decay=0.0)
    model, before, after, _ = switched(adamw, adam, tmp_path)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, before, range(STEPS, STEPS + 3))
    other, _ = build(adam)
    with torch.no_grad():
        for name, param in other.named_parameters():
            param.copy_(weights[name])
    _, fresh = build(adam)
    continued = adam.build(other)
    for param, state in zip(other.parameters(), by_name(after).values()):
        for key, value in state.items():
            continued.state[param][key].copy_(value)
    train(other, continued, range(STEPS, STEPS + 3))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_adamw_to_muon_keeps_the_mean_and_both_moments_of_what_stays_with_adamw(tmp_path):
    adamw = config("ext_adamw", betas=(0.8, 0.95))
    _, before, after, decisions = switched(adamw, config("ext_muon"), tmp_path)
    old, new = by_name(before), by_name(after)
    mean = old[MATRIX]["exp_avg"] / (1 - 0.8**STEPS)
    same(new[MATRIX]["momentum"], mean)
    for name in (EMBEDDING, NORM):
        # Another beta: the mean is what stays, so that its correction gives the same again.
        corrected = new[name]["exp_avg"] / (1 - 0.9**STEPS)
        same(corrected, old[name]["exp_avg"] / (1 - 0.8**STEPS))
        assert torch.equal(new[name]["exp_avg_sq"], old[name]["exp_avg_sq"])
        assert new[name]["step"] == STEPS
    gone_over = {(d.source, d.state) for d in decisions if d.parameter == MATRIX}
    assert gone_over == {("exp_avg", "momentum"), ("step", "step")}


def test_muon_to_adamw_counts_momentum_as_one_gradient_where_the_squares_are_new(tmp_path):
    muon = config("ext_muon", momentum=0.9)
    _, before, after, decisions = switched(muon, config("ext_adamw", betas=(0.9, 0.95)), tmp_path)
    old, new = by_name(before), by_name(after)
    mean = old[MATRIX]["momentum"] / (1 - 0.9**STEPS)
    same(new[MATRIX]["exp_avg"], 0.1 * mean)
    assert not new[MATRIX]["exp_avg_sq"].any() and new[MATRIX]["step"] == 0
    for name in (EMBEDDING, NORM):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(new[name][key], old[name][key])
    anew = {d.state: d.why for d in decisions if d.parameter == MATRIX and d.source is None}
    assert anew.keys() == {"exp_avg_sq", "step"}
    assert "Muon has left no mean of squared gradients" in anew["exp_avg_sq"]


def test_the_first_steps_after_muon_are_no_larger_than_twice_adams(tmp_path):
    # The worst case: the gradients have always been the same.
    muon, adamw = config("ext_muon"), config("ext_adamw", lr=1.0, weight_decay=0.0, skip_step=False)
    _, _, after, _ = switched(muon, adamw, tmp_path)
    param = next(p for p in after.state if after.name_of(p) == MATRIX)
    mean = after.state[param]["exp_avg"] / 0.1
    before = param.detach().clone()
    param.grad = mean.clone()
    after.step()
    torch.testing.assert_close(before - param, 1.9 * mean.sign(), rtol=1e-3, atol=0)


def test_adamw_to_soap_turns_the_mean_into_the_basis_that_it_finds(tmp_path):
    soap = config("soap", betas=(0.9, 0.95))
    _, before, after, decisions = switched(config("ext_adamw"), soap, tmp_path)
    mean = by_name(before)[MATRIX]["exp_avg"] / (1 - 0.9**STEPS)
    param = next(p for p in after.state if after.name_of(p) == MATRIX)
    state = after.state[param]
    same(state["basis_exp_avg"].view(16, 16), 0.1 * mean)
    for each in after.state:
        each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(1))
    after.step()  # finds the basis
    left, right = state["eigvecs_left"].view(16, 16), state["eigvecs_right"].view(16, 16)
    assert not torch.allclose(left, torch.eye(16), atol=0.1)
    back = left.T @ state["basis_exp_avg"].view(16, 16) @ right
    torch.testing.assert_close(back, 0.1 * mean, rtol=1e-4, atol=1e-6)
    anew = {d.state for d in decisions if d.parameter == MATRIX and d.source is None}
    assert {"basis_exp_avg_sq", "gram_left", "eigvecs_left", "step"} <= anew


def test_heavy_ball_momentum_is_a_sum(tmp_path):
    sgd = config("sgd", momentum=0.9)
    _, before, after, _ = switched(config("ext_adamw"), sgd, tmp_path)
    mean = by_name(before)[MATRIX]["exp_avg"] / (1 - 0.9**STEPS)
    same(by_name(after)[MATRIX]["momentum"], mean / (1 - 0.9))
    _, before, after, _ = switched(sgd, config("ext_muon"), tmp_path / "back")
    total = (1 - 0.9**STEPS) / (1 - 0.9)
    same(by_name(after)[MATRIX]["momentum"], by_name(before)[MATRIX]["momentum"] / total)


def test_gradients_with_weight_decay_in_them_do_not_go_over(tmp_path):
    l2 = config("ext_adam", weight_decay=0.1)
    _, _, after, decisions = switched(l2, config("ext_adamw"), tmp_path)
    assert not by_name(after)[MATRIX]["exp_avg"].any()
    assert {d.state for d in decisions if d.source} == {"gate_count", "gate_history"}


def test_the_history_of_the_gate_goes_over(tmp_path):
    model, before = build(config("ext_adamw"))
    before.latest_loss, before.latest_grad_norm = torch.tensor(3.0), torch.tensor(0.5)
    train(model, before, range(1))
    save_model_and_optim_state(tmp_path, model, before, flatten_optimizer_state=True)
    _, after = build(config("soap"))
    carry_over(after, *left_by(config("ext_adamw")), str(tmp_path))
    assert after.shared["gate_count"].tolist() == [1, 1]
    assert after.shared["gate_history"][:, -1].tolist() == [3.0, 0.5]


def test_olmo_cores_adamw_goes_on_as_ours(tmp_path):
    model, before = build(AdamWConfig(lr=1e-3))
    train(model, before, range(STEPS))
    save_model_and_optim_state(tmp_path, model, before, flatten_optimizer_state=True)
    _, after = build(config("ext_adamw"))
    carry_over(after, *left_by(AdamWConfig(lr=1e-3)), str(tmp_path))
    new = by_name(after)
    for name, param in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(new[name][key], before.state[param][key].to(new[name][key])), key


@pytest.mark.parametrize("name", [n for n in list_optimizers() if n not in ("sam", "sophia")])
def test_state_that_a_rule_declares_a_mean_is_one(name):
    model, optim = build(config(name))
    gradients = {p: 0.01 * torch.randn_like(p) for p in model.parameters()}
    for _ in range(STEPS):
        for param, grad in gradients.items():
            param.grad = grad.clone()
        optim.step()
    for group in optim.param_groups:
        l2 = not group.get(DECOUPLED, True) and group["weight_decay"] != 0
        for moment in () if l2 else optim.moments(group):
            share = moment.gain(group) * (1 - moment.beta(group) ** STEPS)
            for param in group["params"]:
                state = optim.state[param][moment.key]
                if state.shape == param.shape:  # else of another layout, or in a basis
                    expected = share * gradients[param] ** moment.power
                    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-9)


def test_ademamix_takes_adams_moments_and_adan_the_first(adamw_checkpoint):
    for name, keys in (("ademamix", {"exp_avg", "exp_avg_sq"}), ("adan", {"exp_avg"})):
        after = build(config(name))[1]
        decisions = carry_over(after, *left_by(config("ext_adamw")), str(adamw_checkpoint))
        over = {d.state for d in decisions if d.source and d.parameter == MATRIX}
        assert over == keys
        (step,) = (d for d in decisions if (d.parameter, d.state) == (MATRIX, "step"))
        assert step.source is None and "not all of that goes over" in step.why  # AdamW has one


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_takes_adamws_state(name, adamw_checkpoint):
    model, after = build(config(name))
    decisions = carry_over(after, *left_by(config("ext_adamw")), str(adamw_checkpoint))
    states = {(d.parameter, d.state) for d in decisions}
    shared = {key for key in after.shared if key.startswith("gate_")}
    for param, state in after.state.items():
        for key in state.keys() - shared:
            assert (after.name_of(param), key) in states, key
    assert all(x.isfinite().all() for state in after.state.values() for x in state.values())


@pytest.fixture(scope="module")
def adamw_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adamw")
    model, before = build(config("ext_adamw"))
    train(model, before, range(STEPS))
    save_model_and_optim_state(folder, model, before, flatten_optimizer_state=True)
    return folder


RULES = ("ext_muon", "soap")


def carried(name: str, folder: Path) -> Any:
    """An optimizer that continues the checkpoint; on several ranks its parameters are shards."""
    torch.manual_seed(0)
    model = MODEL.build(init_device="cpu")
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optim = config(name).build(model)
    carry_over(optim, *left_by(config("ext_adamw")), str(folder))
    return optim


def test_on_two_ranks_the_same_goes_over(adamw_checkpoint, tmp_path):
    expected = {name: by_name(carried(name, adamw_checkpoint)) for name in RULES}
    assert all(any(s["step"] > 0 for s in states.values()) for states in expected.values())
    torch.save(expected, tmp_path / "expected.pt")
    run_on_ranks(2, Path(__file__), adamw_checkpoint, tmp_path / "expected.pt")


def compare_on_ranks(folder: Path, path: Path) -> None:
    expected = torch.load(path)
    for name in RULES:
        saved = carried(name, folder).state_dict()
        names = [n for group in saved["param_names"] for n in group]
        for index, state in saved["state"].items():
            for key, value in state.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if not key.startswith("gate_"):  # of one parameter
                    assert torch.equal(whole, expected[name][names[index]][key]), (name, key)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compare_on_ranks(*map(Path, sys.argv[1:]))
    dist.destroy_process_group()
