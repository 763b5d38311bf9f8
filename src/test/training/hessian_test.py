"""
Estimates of the Hessian's diagonal: against the exact one, in OLMo-core's trainer, and on two ranks
against one.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.moe.router import MoERouter
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from olmo_optim_ext import AdamWConfig, Sophia, SophiaConfig
from olmo_optim_ext.engine.random import stream
from olmo_optim_ext.training import CLIPPED_METRIC, HESSIAN_SHARE_METRIC, SophiaCallback
from olmo_optim_ext.training import hessian as hessian_module
from olmo_optim_ext.training.hessian import estimate_hessian, sample_labels
from olmo_optim_ext.training.passes import backward_again, gradients_apart

from ..ranks import run_on_ranks
from .bad_batch_worker import INSTANCES, LENGTH
from .hessian_worker import (
    INTERVAL,
    MESHES,
    SAVE_AT,
    STEP,
    STEPS,
    VOCAB_SIZE,
    build_module,
    estimate,
    fit,
    optim_of,
    tokens,
)

WORKER = Path(__file__).with_name("hessian_worker.py")
GNB, HUTCHINSON = "gauss_newton_bartlett", "hutchinson"
LABELLED = INSTANCES * (LENGTH - 1)
"""Tokens of the batch that have a label."""

Tensors = Dict[str, torch.Tensor]


def error(got: Tensors, expected: Tensors) -> float:
    """The largest relative error of a parameter."""
    assert got.keys() == expected.keys()
    return max(float((got[k] - expected[k]).norm() / expected[k].norm()) for k in expected)


def params_of(module: Any) -> Tensors:
    optim = optim_of(module)
    return {optim.name_of(param): param for param in optim.state}


# What is drawn


def test_labels_are_drawn_with_the_probabilities_of_the_predictions():
    n, vocabulary = 40_000, 7
    scores = torch.tensor([0.0, 2.0, -1.0, 1.0, -torch.inf, 0.5, -9.0])
    places = torch.arange(n).view(2, -1)
    drawn = sample_labels(scores.expand(2, n // 2, vocabulary), places, -100, key=5)
    frequency = torch.bincount(drawn.view(-1), minlength=vocabulary) / n
    spread = (scores.softmax(0) / n).sqrt()
    assert ((frequency - scores.softmax(0)).abs() <= 4 * spread).all()

    again = sample_labels(scores.expand(2, n // 2, vocabulary), places, -100, key=6)
    assert 0.2 < (drawn == again).float().mean() < 0.6  # of another step
    assert (drawn[0] == drawn[1]).float().mean() < 0.6  # of another place


def test_what_has_no_label_gets_none():
    places = torch.tensor([[3, -100, 5], [-100, -100, 6]])
    drawn = sample_labels(torch.zeros(2, 3, 4), places, -100, key=0)
    assert torch.equal(drawn == -100, places == -100)


def test_probes_are_signs_that_no_sharding_changes():
    param = torch.zeros(40, 50)
    probe = hessian_module._probe(param, 9)
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(probe.mean())) < 4 / math.sqrt(2000)
    assert not torch.equal(probe, hessian_module._probe(param, 10))


# Against the exact diagonal


def gauss_newton_by_hand(module: Any, labels: torch.Tensor, key: int, z_loss: float = 0) -> Tensors:
    """The estimate written out: one pass over the whole batch."""
    del z_loss
    params = params_of(module)
    rows = torch.arange(INSTANCES).unsqueeze(1) * LENGTH
    places = torch.where(labels == -100, labels, rows + torch.arange(LENGTH))
    logits = module.model_forward(tokens())
    drawn = sample_labels(logits.detach(), places, -100, key)
    loss = nn.functional.cross_entropy(logits.float().view(-1, VOCAB_SIZE), drawn.view(-1))
    grads = torch.autograd.grad(loss, list(params.values()))
    n = int((labels != -100).sum())
    return {name: n * grad**2 for name, grad in zip(params, grads)}


SETTINGS: List[Dict[str, Any]] = [
    {},
    {"microbatch": 1},
    {"z_loss": 10.0},
    {"autocast": DType.bfloat16},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gauss_newton_bartlett_is_tokens_times_the_squared_mean_gradient(setting):
    module = build_module(**setting)
    labels = hessian_module.get_labels({"input_ids": tokens()})
    expected = gauss_newton_by_hand(module, labels, stream(0, STEP, "labels"))
    tolerance = 0.1 if "autocast" in setting else 1e-4
    assert error(estimate(module), expected) < tolerance


def test_a_compiled_head_draws_labels_too_and_is_not_compiled_anew():
    module = build_module()
    expected = [estimate(module, step=step) for step in (1, 2)]
    module.model.lm_head.compile(backend="eager")
    compiled = module.model.lm_head._compiled_call_impl
    with gradients_apart(module):
        backward_again(module, {"input_ids": tokens()})
    counters.clear()
    got = [estimate(module, step=step) for step in (1, 2)]
    assert max(map(error, got, expected)) < 1e-6
    assert counters["stats"]["unique_graphs"] == 0
    assert module.model.lm_head._compiled_call_impl is compiled is not None


def test_tokens_without_a_label_do_not_count():
    module = build_module()
    mask = torch.rand(INSTANCES, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    instances = torch.tensor([True, True, False, True])
    batch = {"input_ids": tokens(), "label_mask": mask, "instance_mask": instances}
    labels = hessian_module.get_labels(batch)
    expected = gauss_newton_by_hand(module, labels, stream(0, STEP, "labels"))
    assert error(estimate(module, batch), expected) < 1e-4
    assert list(batch) == ["input_ids", "label_mask", "instance_mask"]


def test_gauss_newton_bartlett_estimates_the_diagonal_of_the_gauss_newton_matrix():
    module = build_module()
    params = params_of(module)
    log_p = module.model(tokens())[:, :-1].log_softmax(-1).reshape(-1, VOCAB_SIZE)
    exact = {name: torch.zeros_like(p) for name, p in params.items()}
    for token in log_p:
        rows = torch.autograd.grad(
            token,
            list(params.values()),
            torch.eye(VOCAB_SIZE),
            retain_graph=True,
            is_grads_batched=True,
        )
        for name, row in zip(params, rows):
            p = token.detach().exp().view(-1, *[1] * params[name].ndim)
            exact[name] += (p * row**2).sum(0) / LABELLED
    samples = [estimate(module, step=step) for step in range(150)]
    for name, diagonal in exact.items():
        sums = torch.stack([sample[name].sum() for sample in samples])
        spread = float(sums.std()) / math.sqrt(len(sums))
        assert spread < 0.1 * float(diagonal.sum())
        assert abs(float(sums.mean() - diagonal.sum())) < 4 * spread, name
        mean = torch.stack([sample[name] for sample in samples]).mean(0)
        assert torch.cosine_similarity(mean.view(-1), diagonal.view(-1), 0) > 0.97, name


def hessian_products(module: Any, directions: Tensors) -> Tensors:
    """With the Hessian of the mean loss, for a batch of directions, by double backward."""
    params = params_of(module)
    with sdpa_kernel(SDPBackend.MATH):
        labels = hessian_module.get_labels({"input_ids": tokens()})
        loss = module.model(tokens(), labels=labels, loss_reduction="mean").loss
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        products = torch.autograd.grad(
            grads,
            list(params.values()),
            [directions[name] for name in params],
            is_grads_batched=True,
        )
    return dict(zip(params, products))


def test_hutchinson_is_the_probe_times_its_product_with_the_hessian():
    module = build_module(estimator=HUTCHINSON)
    probes = {
        name: hessian_module._probe(param, stream(0, STEP, name, "probe"))
        for name, param in params_of(module).items()
    }
    products = hessian_products(module, {k: v.unsqueeze(0) for k, v in probes.items()})
    expected = {name: probes[name] * products[name][0] for name in probes}
    assert error(estimate(module), expected) < 0.02
    assert any((x < 0).any() for x in expected.values())


@pytest.mark.parametrize("name", ["lm_head.norm.weight", "lm_head.w_out.weight"])
def test_hutchinson_estimates_the_diagonal_of_the_hessian(name, monkeypatch):
    module = build_module(estimator=HUTCHINSON)
    params = params_of(module)
    n = params[name].numel()
    units = {k: torch.zeros(n, *p.shape) for k, p in params.items()}
    units[name].view(n, n).copy_(torch.eye(n))
    exact = hessian_products(module, units)[name].view(n, n).diagonal()
    # Of the others nothing is moved: their share of the noise is larger than a diagonal.
    probe = hessian_module._probe
    moved = params[name]
    monkeypatch.setattr(hessian_module, "_probe", lambda p, key: probe(p, key) * (p is moved))
    samples = torch.stack([estimate(module, step=i)[name].view(-1) for i in range(100)])
    spread = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - exact).abs() < 4.5 * spread + 0.02 * exact.abs().max()).all()
    assert spread.mean() < 0.5 * exact.abs().mean()


# A part of the batch, and the batch factor


@pytest.mark.parametrize("kind", [GNB, HUTCHINSON])
@pytest.mark.parametrize("fraction,instances", [(0.5, 2), (0.7, 3), (0.01, 1)])
def test_a_fraction_is_the_first_instances_at_their_own_scale(kind, fraction, instances):
    part = build_module(estimator=kind, hessian_batch_fraction=fraction)
    whole = build_module(estimator=kind)
    expected = estimate(whole, {"input_ids": tokens()[:instances]})
    assert error(estimate(part, {"input_ids": tokens()}), expected) < 1e-5


def test_the_batch_factor_scales_what_the_tokens_say():
    expected = estimate(build_module())
    for factor, fraction in ((INSTANCES * LENGTH, 1.0), (1, 1.0), (1, 0.5)):
        module = build_module(batch_tokens=factor, hessian_batch_fraction=fraction)
        scale = factor / (INSTANCES * LENGTH)
        if fraction < 1:
            expected = estimate(build_module(hessian_batch_fraction=fraction))
        scaled = {name: scale * x for name, x in expected.items()}
        assert error(estimate(module), scaled) < 1e-5


@pytest.mark.parametrize("kind", [GNB, HUTCHINSON])
def test_an_estimate_leaves_everything_else_as_it_was(kind):
    module = build_module(moe=True, estimator=kind, batch_tokens=32)
    recorded: List[str] = []
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        record_metric=lambda name, *args, **kwargs: recorded.append(name),
        record_ce_loss=lambda *args, **kwargs: recorded.append("loss"),
    )
    module.train_batch({"input_ids": tokens()})
    params = dict(module.model.named_parameters())
    grads = {name: (p.grad, p.grad.clone()) for name, p in params.items() if p.grad is not None}
    loss = optim_of(module).latest_loss
    before = {name: x.clone() for name, x in module.model.state_dict().items()}
    metrics = {k: float(v[0]) for k, v in module.model.compute_auxiliary_metrics(False).items()}
    recorded.clear()

    batch = {"input_ids": tokens()}
    estimate_hessian(module, optim_of(module), batch, 1)
    assert recorded == []
    assert list(batch) == ["input_ids"]
    for name, (grad, copy) in grads.items():
        assert params[name].grad is grad and torch.equal(grad, copy)
    assert optim_of(module).latest_loss is loss
    after = module.model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    still = {k: float(v[0]) for k, v in module.model.compute_auxiliary_metrics(False).items()}
    assert still == pytest.approx(metrics, nan_ok=True)
    module.record_metric("again", 1.0)
    assert recorded == ["again"]


def routers_of(module: Any) -> List[MoERouter]:
    return [each for each in module.model.modules() if isinstance(each, MoERouter)]


def test_what_balances_experts_is_no_part_of_the_estimate():
    module, without = build_module(moe=True), build_module(moe=True)
    for router in routers_of(without):
        router.lb_loss_weight = router.z_loss_weight = None
    assert error(estimate(module), estimate(without)) < 1e-6
    assert [router.lb_loss_weight for router in routers_of(module)] == [5.0, 5.0]


def test_another_pass_adds_the_gradients_of_the_mean_loss():
    module = build_module(microbatch=1)
    with gradients_apart(module):
        backward_again(module, {"input_ids": tokens()[:3]})
        got = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
    labels = hessian_module.get_labels({"input_ids": tokens()[:3]})
    loss = module.model(tokens()[:3], labels=labels, loss_reduction="mean").loss
    expected = torch.autograd.grad(loss, list(module.model.parameters()))
    assert error(got, dict(zip(got, expected))) < 1e-5
    assert all(p.grad is None for p in module.model.parameters())


# In the trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, save=True)


UPDATED = [step for step in range(1, STEPS + 1) if (step - 1) % INTERVAL == 0]


def test_estimates_come_at_the_first_step_and_then_in_the_interval(whole):
    run = whole[1]
    assert run.error is None
    assert run.updates == [sum(at <= step for at in UPDATED) for step in range(1, STEPS + 1)]
    assert run.metrics[STEPS]["train/CE loss"] < run.metrics[1]["train/CE loss"] - 0.1


def test_cost_and_clipped_coordinates_are_metrics(whole):
    metrics = whole[1].metrics
    assert [step for step in metrics if CLIPPED_METRIC in metrics[step]] == UPDATED
    assert all(0 < metrics[step][HESSIAN_SHARE_METRIC] < 1 for step in range(1, STEPS + 1))
    shares = [metrics[step][HESSIAN_SHARE_METRIC] for step in (2, 3)]
    assert shares[1] < shares[0]


def test_coordinates_are_clipped_in_part_and_all_without_the_batch_factor(whole, tmp_path):
    at = UPDATED[-1]
    assert 0.1 < 1 - whole[1].metrics[at][CLIPPED_METRIC] < 0.9
    alone = fit(tmp_path, batch_tokens=1, rho=0.04)
    # What has no gradient, rows of tokens that never come, is not clipped.
    assert 1 - alone.metrics[at][CLIPPED_METRIC] < 0.15


@pytest.mark.parametrize("kind", [GNB, HUTCHINSON])
def test_a_resumed_run_is_the_same(kind, whole, tmp_path):
    if kind == GNB:
        folder, run = whole
    else:
        folder, run = tmp_path, fit(tmp_path, save=True, estimator=kind)
    resumed = fit(folder, resume_from=folder / f"step{SAVE_AT}", estimator=kind)
    assert resumed.error is run.error is None
    assert resumed.end == run.end


def test_without_the_callback_the_first_step_says_how_to_add_it(tmp_path):
    run = fit(tmp_path, driven=False)
    assert run.updates == []
    assert 'trainer_config.add_callback("sophia", SophiaCallback())' in (run.error or "")


def test_mixed_precision_learns(tmp_path):
    run = fit(tmp_path, autocast=DType.bfloat16)
    assert run.error is None
    assert run.metrics[STEPS]["train/CE loss"] < run.metrics[1]["train/CE loss"] - 0.1


def test_a_bad_first_batch_is_made_up_for_at_the_next_step(tmp_path):
    run = fit(tmp_path, spoil_at=1)
    assert run.error is None
    assert run.metrics[1]["optim/step skipped"] == 1
    assert run.updates[:3] == [1, 2, 2]
    assert run.metrics[STEPS]["train/CE loss"] < run.metrics[1]["train/CE loss"] - 0.1


def test_a_step_that_the_trainer_leaves_out_has_no_estimate(tmp_path):
    run = fit(tmp_path, skip=1)
    assert run.error is None
    assert run.updates[:4] == [0, 1, 1, 2]


def test_other_optimizers_and_train_modules_are_refused():
    module = build_module()
    module.optim = AdamWConfig().build(module.model)
    pipeline = SimpleNamespace(optimizers=[])
    for train_module, allowed in ((module, "Sophia"), (pipeline, "TransformerTrainModule")):
        callback = SophiaCallback()
        callback.trainer = SimpleNamespace(train_module=train_module)  # type: ignore[assignment]
        with pytest.raises(OLMoConfigurationError, match=f"allowed is {allowed}"):
            callback.post_attach()


# On two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_on_ranks(2, WORKER, folder)
    return folder


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", [GNB, HUTCHINSON])
def test_two_ranks_estimate_what_one_does(kind, mesh, two_ranks):
    expected = estimate(build_module(estimator=kind))
    got = torch.load(two_ranks / f"{mesh}-{kind}.pt")
    # The difference of two gradients has the rounding of each.
    assert error(got, expected) < (1e-3 if kind == GNB else 0.02)


def test_two_ranks_agree_and_resume(two_ranks, whole):
    ranks = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in range(2)]
    for runs in ranks:
        assert runs["whole"]["error"] is runs["resumed"]["error"] is None
        assert runs["whole"]["updates"] == whole[1].updates
        assert runs["whole"]["end"] == runs["resumed"]["end"]
    clipped = [runs["whole"]["metrics"][str(UPDATED[-1])][CLIPPED_METRIC] for runs in ranks]
    assert clipped[0] == clipped[1]
    assert 0.1 < clipped[0] < 0.9


# Of the optimizer alone


def stepped(optim: Sophia, model: nn.Module, scale: float = 1.0) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, scale)
    optim.step()


def small(**fields: Any):
    model = nn.Linear(3, 2, bias=False)
    fields = {"lr": 0.1, "betas": (0.0, 0.5), "rho": 1.0, "weight_decay": 0.0, **fields}
    return model, SophiaConfig(**fields).build(model)


def test_negative_curvature_and_none_give_steps_of_the_sign():
    model, optim = small()
    start = model.weight.detach().clone()
    curvature = torch.tensor([[4.0, -4.0, 0.0], [8.0, 1.0, 2.0]])
    optim.update_hessian_from_estimates({"weight": 2 * curvature})
    stepped(optim, model)
    expected = torch.tensor([[0.25, 1.0, 1.0], [0.125, 1.0, 0.5]])
    assert torch.allclose(start - model.weight, 0.1 * expected, atol=1e-7)
    assert float(optim.clipped_share()) == 0.5


@pytest.mark.parametrize("skip_step", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_an_estimate_that_is_not_finite_leaves_no_trace(bad, skip_step):
    model, optim = small(batch_tokens=10, skip_step=skip_step)
    start = model.weight.detach().clone()

    def give_bad() -> None:
        model.weight.grad = torch.ones(2, 3)
        model.weight.grad[1, 2] = bad  # its square is not finite
        optim.update_hessian()

    give_bad()
    stepped(optim, model)
    assert torch.equal(model.weight, start)  # not by the sign
    assert not optim.has_hessian()
    model.weight.grad = torch.ones(2, 3)
    optim.update_hessian()
    average = optim.state[model.weight]["hessian"]
    assert torch.equal(average, torch.full((2, 3), 5.0))
    stepped(optim, model)
    give_bad()
    assert torch.equal(average, torch.full((2, 3), 5.0))
    stepped(optim, model)
    assert not torch.equal(model.weight, start)


def test_an_estimate_goes_with_the_step_that_is_skipped():
    model, optim = small()
    for scale in (1.0, 3.0):
        optim.update_hessian_from_estimates({"weight": torch.full((2, 3), scale)})
        optim.update_hessian_from_estimates({"weight": torch.full((2, 3), scale)})
        stepped(optim, model, math.nan if scale == 3 else 1.0)
        assert torch.equal(optim.state[model.weight]["hessian"], torch.full((2, 3), 0.75))
    assert optim.step_skipped == 1.0
    assert optim.state[model.weight]["hessian_step"] == 2
    assert optim.hessian_updates == 4


def test_parameters_that_came_later_wait_for_an_estimate():
    model, optim = small()
    optim.update_hessian_from_estimates({"weight": torch.ones(2, 3)})
    later = nn.Parameter(torch.ones(4))
    optim.add_param_group({"params": [("later", later)]})
    for _ in range(2):
        later.grad = torch.ones(4)
        stepped(optim, model)
        assert torch.equal(later, torch.ones(4))
    optim.update_hessian_from_estimates({"later": torch.ones(4)})
    stepped(optim, model)
    assert (later < 1).all()


def test_bad_estimates_are_refused():
    model, optim = small()
    shape = torch.ones(3, 2)
    with pytest.raises(OLMoConfigurationError, match=r"'weight' has the shape \(3, 2\).*\(2, 3\)"):
        optim.update_hessian_from_estimates({"weight": shape})
    with pytest.raises(OLMoConfigurationError, match="for 'bias', allowed are names.*weight"):
        optim.update_hessian_from_estimates({"bias": shape})
    with pytest.raises(OLMoConfigurationError, match="'estimates' is empty"):
        optim.update_hessian_from_estimates({})
    with pytest.raises(OLMoConfigurationError, match="'batch_tokens' is None, allowed"):
        optim.update_hessian()
    with pytest.raises(OLMoConfigurationError, match="no parameter has a gradient"):
        optim.update_hessian(tokens=5)
    with pytest.raises(OLMoConfigurationError, match="before the first step.*SophiaCallback"):
        stepped(optim, model)
    assert optim.param_groups[0]["calls"] == 0
