from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import OptimGroupOverride

from olmo_optim_ext import PolarMethod, Scion, ScionConfig, ScionNorm, optimizer_info

from ..ranks import run_on_ranks
from .case import MATRICES, MixedShapes, grads_at, train, weights
from .models import ExpertShapes
from .scion_cases import INITIALIZED, LR, RADII


def groups_by_name(optim: Scion) -> Dict[str, Dict[str, Any]]:
    return {optim.name_of(p): group for group in optim.param_groups for p in group["params"]}


def overridden(*params: str, **opts: Any) -> Dict[str, Any]:
    return {"group_overrides": [OptimGroupOverride(list(params), opts)]}


class TwoMatrices(nn.Module):
    """One to look at, and one so that there is a matrix whatever the first one's norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4, bias=False)
        self.second = nn.Linear(2, 2, bias=False)


def one_step(
    model: nn.Module, config: ScionConfig, grads: Dict[str, torch.Tensor]
) -> Dict[str, torch.Tensor]:
    """What an unconstrained step subtracts, per learning rate."""
    start = weights(model)
    optim = config.replace(constrained=False, momentum=1.0).build(model)
    for name, param in model.named_parameters():
        param.grad = grads[name]
    optim.step()
    lr = optim.param_groups[0]["lr"]
    return {name: (start[name] - param) / lr for name, param in weights(model).items()}


def test_each_role_has_its_norm_and_radius():
    groups = groups_by_name(ScionConfig().build(MixedShapes()))
    fields = {k: (g["norm"], g["radius"], g["fan_in"], g["algorithm"]) for k, g in groups.items()}
    assert fields["square.weight"] == ("spectral", 50.0, None, "scion")
    assert fields["embeddings.weight"] == ("sign", 3000.0, 8, "sign")
    assert fields["lm_head.weight"] == ("sign", 3000.0, 8, "sign")
    assert fields["norm.weight"] == fields["row.weight"] == ("rms", 1.0, None, "rms")
    assert all("weight_decay" not in group for group in groups.values())


def test_embeddings_and_head_are_never_exchanged():
    optim = ScionConfig().build(MixedShapes())
    assert set(optim.placements()) == set(MATRICES)


def test_overrides_set_norm_and_radius():
    model = MixedShapes()
    config = ScionConfig(**RADII, **overridden("tall.*", "lm_head.*", norm="row", radius=4.0))
    groups = groups_by_name(config.build(model))
    for name in ("tall.weight", "lm_head.weight"):
        assert groups[name]["norm"] == "row" and groups[name]["radius"] == 4.0
    assert groups["wide.weight"]["radius"] == RADII["spectral_scale"]
    config = ScionConfig(**RADII, **overridden("tall.*", norm="sign"))
    group = groups_by_name(config.build(model))["tall.weight"]
    assert (group["radius"], group["fan_in"], group["algorithm"]) == (16.0, 8, "sign")


@pytest.mark.parametrize(
    "opts,message",
    [
        ({"norm": "column"}, "norm of parameter 'norm.weight' .*'column', allowed .* sign and rms"),
        ({"norm": "l2"}, "norm' is 'l2', allowed are spectral, sign"),
        ({"norm": None}, "'norm' is None"),
        ({"radius": 0}, "'radius' is 0, allowed is a finite number > 0"),
        ({"fan_in": 1.5}, "'fan_in' is 1.5, allowed is an integer >= 1"),
        ({"constrained": 1}, "'constrained' is 1, allowed are true and false"),
        ({"weight_decay": 0.1}, "'weight_decay' is not a field of a parameter group"),
        ({"cautious_weight_decay": True}, "'cautious_weight_decay' is True, allowed is false"),
        ({"algorithm": "sign"}, "'algorithm' cannot be set"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(opts, message):
    with pytest.raises(OLMoConfigurationError, match=message):
        ScionConfig(**overridden("norm.*", **opts)).build(MixedShapes())


def test_groups_that_contradict_themselves_are_refused():
    param = nn.Parameter(torch.ones(3, 2))
    group = {"params": [param], "norm": "sign"}
    with pytest.raises(OLMoConfigurationError, match="'algorithm' of a group with norm 'sign'"):
        Scion([{**group, "algorithm": "scion"}])
    with pytest.raises(OLMoConfigurationError, match="'fan_in' of a group .*'sign' is None"):
        Scion([{**group, "algorithm": "sign"}])


def test_weight_decay_is_no_field():
    with pytest.raises(TypeError, match="weight_decay"):
        ScionConfig(weight_decay=0.1)  # type: ignore[call-arg]


def test_momentum_is_the_weight_of_the_new_gradient():
    model = MixedShapes()
    optim = ScionConfig(momentum=0.25).build(model)
    grads = [grads_at(step, model) for step in (0, 1)]
    for step in (0, 1):
        for name, param in model.named_parameters():
            param.grad = grads[step][name]
        optim.step()
    for name, param in model.named_parameters():
        expected = 0.75 * (0.25 * grads[0][name]) + 0.25 * grads[1][name]
        assert torch.allclose(optim.state[param]["momentum"], expected, rtol=1e-6)
        assert set(optim.state[param]) <= {"step", "momentum", "gate_count", "gate_history"}


@pytest.mark.parametrize("norm", ["spectral", "sign", "column", "row"])
def test_constrained_iterates_stay_in_the_ball_and_others_leave_it(norm):
    def largest(constrained: bool) -> float:
        model = TwoMatrices()
        config = ScionConfig(
            lr=0.05,
            constrained=constrained,
            polar_method=PolarMethod.svd,
            **overridden("first.*", norm=norm, radius=2.0),
        )
        config.initialize_weights(model)
        optim = config.build(model)
        found = 0.0
        for _ in range(200):
            model.first.weight.grad = torch.ones(4, 6) + torch.eye(4, 6)
            optim.step()
            w = model.first.weight.detach()
            sizes = {
                "spectral": torch.linalg.matrix_norm(w, 2) * (6 / 4) ** 0.5,
                "sign": w.abs().max() * 6,
                "column": w.norm(dim=0).max() / 2 * 6,
                "row": w.norm(dim=1).max() * 6**0.5,
            }
            found = max(found, float(sizes[norm]))
        return found

    assert largest(constrained=True) <= 2.0 * (1 + 1e-5)
    assert largest(constrained=False) > 10


def test_a_step_of_one_goes_all_the_way():
    model = nn.Linear(6, 4, bias=False)
    config = ScionConfig(lr=1.0, matrix_norm=ScionNorm.row, momentum=1.0)
    optim = config.build(model)
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model.weight.grad = grad
    optim.step()
    expected = -50 * grad / (grad.norm(dim=1, keepdim=True) * 6**0.5)
    assert torch.allclose(model.weight, expected, rtol=1e-5)


def test_the_columns_of_an_embedding_are_its_tokens():
    model = MixedShapes()
    grads = grads_at(0, model)
    grads["embeddings.weight"][3] = 0  # a token that is not in the batch
    update = one_step(model, ScionConfig(embedding_norm=ScionNorm.column), grads)[
        "embeddings.weight"
    ]
    assert not update[3].any()
    rms = update.square().mean(dim=1).sqrt()
    assert torch.allclose(rms[[0, 1, 2, 4]], torch.full((4,), 50.0), rtol=1e-3)


NO_FAN_IN_AND_ONE: List[Dict[str, Any]] = [{}, {"fan_in": 1}]


def test_fan_in_replaces_the_inputs():
    grads = grads_at(0, MixedShapes())
    for norm, factor in (("sign", 8), ("column", 8), ("row", 8**0.5), ("spectral", 8**0.5)):
        plain, one = (
            one_step(
                MixedShapes(),
                ScionConfig(lr=LR, **RADII, **overridden("tall.*", norm=norm, **opts)),
                grads,
            )["tall.weight"]
            for opts in NO_FAN_IN_AND_ONE
        )
        assert torch.allclose(one, plain * factor, rtol=1e-3), norm


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: ``(in, out)``."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.ones(nx, nf))


@pytest.mark.parametrize("norm", ["spectral", "sign", "column", "row"])
def test_matrices_stored_transposed_are_the_same_matrices(norm):
    linear, conv = TwoMatrices(), TwoMatrices()
    conv.first = Conv1D(4, 6)  # type: ignore[assignment]
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    config = ScionConfig(lr=LR, **overridden("first.*", norm=norm))
    ours, theirs = (
        one_step(model, config, {"first.weight": g, "second.weight": torch.ones(2, 2)})
        for model, g in ((linear, grad), (conv, grad.T.contiguous()))
    )
    allowed = 1e-3 * float(ours["first.weight"].abs().max())
    assert torch.allclose(ours["first.weight"], theirs["first.weight"].T, atol=allowed)


def test_experts_are_matrices_one_by_one():
    model = ExpertShapes()
    groups = {
        name: group
        for group in ScionConfig(matrix_norm=ScionNorm.sign).build_groups(model)
        for name, _ in group["params"]
    }
    for layer in ("dropless", "with_capacity"):
        inputs = {name: groups[f"{layer}.{name}"]["fan_in"] for name in ("w1", "w2", "w3")}
        assert inputs == {"w1": 4, "w2": 5, "w3": 4}


def test_the_rms_is_over_the_whole_parameter():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Conv1d(3, 2, 5))
    grads = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in model.named_parameters()
    }
    update = one_step(model, ScionConfig(bias_rms_scale=2.0), grads)
    for name in ("1.weight", "1.bias"):
        expected = 2.0 * grads[name] / grads[name].square().mean().sqrt()
        assert torch.allclose(update[name], expected, rtol=2e-3, atol=1e-3)


def test_the_preset_is_the_rule_it_was_tuned_with():
    """Levanter: ``p -= eta (s LMO(d) + wd p)``, and a fifth of ``eta`` for signs."""
    (preset,) = optimizer_info("scion").presets
    config = ScionConfig.from_dict(dict(preset.fields))
    shape: Dict[str, Any] = dict(d_model=24, vocab_size=64, n_layers=1, n_heads=2, qk_norm=True)
    model = TransformerConfig.llama_like(**shape).build(init_device="cpu")
    groups = groups_by_name(config.build(model))
    eta, wd = 0.016, 0.1
    for name, group in groups.items():
        of_matrix = name.startswith("blocks.") and "norm" not in name
        decays = of_matrix or name == "lm_head.w_out.weight"  # no embeddings and gains
        step = eta if of_matrix else 0.2 * eta
        assert group["norm"] == ("spectral" if of_matrix else "sign"), name
        assert group["fan_in"] == (None if of_matrix else 1), name
        assert group["lr"] * group["radius"] == pytest.approx(step), name
        shrink = group["lr"] if group["constrained"] else 0.0
        assert shrink == pytest.approx(step * wd if decays else 0.0), name
        assert group["momentum"] == pytest.approx(1 - 0.95) and group["spectral_max"], name
    assert sum("norm.weight" in name for name in groups) >= 3


# The initialisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialized_weights_are_on_the_border_and_vectors_are_left_alone(dtype):
    model = MixedShapes().to(dtype)
    start = weights(model)
    INITIALIZED.initialize_weights(model)
    got = {name: w.double() for name, w in weights(model).items()}
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for name in ("square", "tall", "wide", "few_rows"):
        w = got[f"{name}.weight"]
        n_out, n_in = w.shape
        expected = torch.full((min(w.shape),), RADII["spectral_scale"] * (n_out / n_in) ** 0.5)
        assert torch.allclose(torch.linalg.svdvals(w).float(), expected, rtol=tolerance)
    tokens = got["embeddings.weight"].square().mean(dim=1).sqrt()
    assert torch.allclose(tokens.float(), torch.tensor(RADII["column_scale"]), rtol=tolerance)
    assert torch.equal(got["lm_head.weight"].abs(), torch.full((11, 8), 16.0 / 8).double())
    for name in ("norm.weight", "norm.bias", "square.bias", "row.weight"):
        assert torch.equal(model.get_parameter(name), start[name])


def test_what_follows_the_rms_is_not_initialized():
    model = MixedShapes()
    start = weights(model)
    ScionConfig(**overridden("tall.*", "embeddings.*", norm="rms")).initialize_weights(model)
    unchanged = {name for name, w in weights(model).items() if torch.equal(w, start[name])}
    assert {"tall.weight", "embeddings.weight"} <= unchanged
    assert not {"square.weight", "wide.weight", "lm_head.weight"} & unchanged


def test_initialized_experts_are_each_on_the_border():
    model = ExpertShapes()
    INITIALIZED.initialize_weights(model)
    for n_in, layer, name in [
        (n_in, layer, name)
        for layer in (model.dropless, model.with_capacity)
        for name, n_in in (("w1", 4), ("w2", 5), ("w3", 4))
    ]:
        stack = getattr(layer, name).detach()
        shape = (4, 5) if name == "w2" else (5, 4)
        stored = (6, *shape)
        if layer is model.with_capacity or name == "w2":
            stored = (6, *shape[::-1])
        expected = RADII["spectral_scale"] * (shape[0] / n_in) ** 0.5
        values = torch.linalg.svdvals(stack.reshape(stored))
        assert torch.allclose(values, torch.tensor(expected), rtol=1e-5), name
        assert not torch.equal(*stack.reshape(stored)[:2].unbind())


def test_initialization_depends_on_seed_and_name_alone():
    def run(seed: int, model_seed: int) -> Dict[str, torch.Tensor]:
        model = MixedShapes(model_seed)
        INITIALIZED.replace(seed=seed).initialize_weights(model)
        return weights(model)

    one, again, other = run(0, 0), run(0, 1), run(1, 0)
    for name in ("square.weight", "embeddings.weight", "lm_head.weight"):
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    INITIALIZED.initialize_weights(twins)
    first, second = (twins.get_parameter(f"{i}.weight") for i in range(2))
    assert not torch.equal(first, second)


def test_nothing_initializes_by_itself():
    model = MixedShapes()
    start = weights(model)
    INITIALIZED.build(model)
    assert all(torch.equal(w, start[name]) for name, w in weights(model).items())


def test_every_mesh_is_initialized_alike(tmp_path: Path):
    for world_size in (2, 4):
        run_on_ranks(world_size, Path(__file__).with_name("scion_worker.py"), tmp_path)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in (MixedShapes, ExpertShapes):
        model = kind(0)
        INITIALIZED.initialize_weights(model)
        alone = weights(model)
        found = sorted(tmp_path.glob(f"{kind.__name__}-*.pt"))
        assert len(found) >= 6
        for path in found:
            got = torch.load(path, weights_only=True)
            assert all(torch.equal(got[name], alone[name]) for name in alone), path.stem
    torch.set_num_threads(torch_threads)


def test_bfloat16_state_follows_the_same_rule():
    def run(dtype: DType) -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        train(model, ScionConfig(lr=LR, state_dtype=dtype, **RADII).build(model), 0, 5)
        return weights(model)

    start, exact, rounded = weights(MixedShapes()), run(DType.float32), run(DType.bfloat16)
    for name in start:
        moved = (exact[name] - start[name]).norm()
        assert (rounded[name] - exact[name]).norm() < 0.1 * moved, name


def test_a_report_says_what_its_norm_has():
    optim = ScionConfig(embedding_norm=ScionNorm.column).build(model := MixedShapes())
    optim.ask_for_report()
    train(model, optim, 0, 1)
    report = optim.take_report()
    assert set(report) == {*MATRICES, "embeddings.weight"}
    spectral, column = report["tall.weight"], report["embeddings.weight"]
    expected = {"spectrum", "orthogonality error", "update RMS", "failed orthogonalisations"}
    assert set(spectral) == expected
    assert set(column) == {"update RMS"}
    # All columns of a one-hot map have the same RMS over its outputs: that of the radius.
    assert float(column["update RMS"]) == pytest.approx(50.0, rel=1e-5)


def test_a_model_of_signs_alone_is_none_without_matrices():
    model = MixedShapes()
    optim = ScionConfig(matrix_norm=ScionNorm.sign).build(model)
    train(model, optim, 0, 1)
    assert {group["algorithm"] for group in optim.param_groups} == {"sign", "rms"}
