"""
What is recorded of matrices: in runs of OLMo-core's trainer on one rank and on two, sharded and
replicated, against an SVD of the whole matrices.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import AdamWConfig as OLMoCoreAdamWConfig

from olmo_optim_ext import (
    AdamWConfig,
    MuonConfig,
    MuonNolahConfig,
    NorMuonConfig,
    ScionConfig,
)
from olmo_optim_ext.linalg import spectrum
from olmo_optim_ext.linalg.polar import PolarMethod, polar
from olmo_optim_ext.matrix import orthogonal
from olmo_optim_ext.matrix.reports import FAILED, has_failed
from olmo_optim_ext.training import MatrixMetricsCallback, matrix_metric, matrix_metrics

from ..ranks import run_on_ranks
from .matrix_metrics_worker import BAD_STEP, CONFIGS, INTERVAL, STEPS

WORKER = Path(__file__).with_name("matrix_metrics_worker.py")
LAYER = ["effective rank", "stable rank", "orthogonality error", "update RMS"]
ROLE = ["relative effective rank", "relative stable rank", *LAYER[2:]]
DUE = [step for step in range(INTERVAL, STEPS + 1, INTERVAL) if step != BAD_STEP]
ONE, FSDP, DDP = "None", "fsdp", "ddp"
RUNS = [
    (name, kind)
    for kind in (ONE, FSDP, DDP)
    for name in CONFIGS
    if name != "muon_on_all" or kind == DDP
]

Record = Dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Dict[int, List[Dict[str, Record]]]:
    """By number of ranks, the records of each rank."""
    out = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp("matrix_metrics")
        run_on_ranks(world_size, WORKER, folder)
        files = [folder / f"rank{rank}.json" for rank in range(world_size)]
        out[world_size] = [json.loads(file.read_text()) for file in files]
    return out


def records_of(ranks, name: str, kind: str, suffix: str = "") -> List[Record]:
    """Of a run, one a rank."""
    return [rank[f"{name} {kind}{suffix}"] for rank in ranks[1 if kind == ONE else 2]]


def measured(metrics: Dict[str, float]) -> Dict[str, float]:
    """Those that are of matrices."""
    kinds = {*LAYER, *ROLE, "noise scale", "noise fired"}
    return {name: x for name, x in metrics.items() if name.split("/")[:2][-1] in kinds}


def means(expected: Dict[str, List[Dict[str, float]]], role: str) -> Dict[str, float]:
    """What should be recorded of parameters of one role."""
    out, of_role = {}, []
    for parameter, matrices in expected.items():
        for x in matrices:
            short = x.pop("short")
            x.update({f"relative {rank}": x[rank] / short for rank in LAYER[:2]})
        numbers = {key: sum(x[key] for x in matrices) / len(matrices) for key in matrices[0]}
        of_role.append(numbers)
        for measure, value in numbers.items():
            if not measure.startswith("relative"):
                out[matrix_metric(measure, parameter)] = value
    for measure in of_role[0].keys() - set(LAYER[:2]):
        value = sum(numbers[measure] for numbers in of_role) / len(of_role)
        out[matrix_metric(measure, role)] = value
    return out


@pytest.mark.parametrize("name,kind", RUNS)
def test_metrics_are_what_an_svd_says(name, kind, ranks):
    for record in records_of(ranks, name, kind):
        assert [int(step) for step in record["expected"]] == DUE
        for step, expected in record["expected"].items():
            assert len(expected) == 14
            got = measured(record["metrics"][step])
            fired = {key: got.pop(key) for key in list(got) if "noise fired" in key}
            assert bool(fired) == (name == "noise")
            assert got == pytest.approx(means(expected, "matrix"), rel=2e-3)


@pytest.mark.parametrize("name,kind", RUNS)
def test_they_are_recorded_at_the_asked_steps_only_and_not_of_a_skipped_one(name, kind, ranks):
    for record in records_of(ranks, name, kind):
        metrics = {int(step): row for step, row in record["metrics"].items()}
        assert metrics.keys() >= set(range(1, STEPS + 1))
        assert [step for step, row in metrics.items() if measured(row)] == DUE
        assert metrics[BAD_STEP]["optim/step skipped"] == 1.0


@pytest.mark.parametrize("name,kind", RUNS)
def test_all_ranks_record_the_same_and_as_many_as_one_rank(name, kind, ranks):
    first, *others = [
        [measured(row) for row in record["metrics"].values()]
        for record in records_of(ranks, name, kind)
    ]
    assert all(other == first for other in others)
    if name != "muon_on_all":
        (alone,) = records_of(ranks, name, ONE)
        for row, its in zip(first, alone["metrics"].values()):
            assert row == pytest.approx(measured(its), rel=1e-3)


@pytest.mark.parametrize("kind", [ONE, FSDP, DDP])
def test_noise_fired_is_the_share_of_calls_with_noise(kind, ranks):
    # The first call is without noise, and that of the bad step was skipped.
    shares = {3: 2 / 3, 9: 7 / 9}
    for record in records_of(ranks, "noise", kind):
        for step in DUE:
            row = record["metrics"][str(step)]
            fired = [value for key, value in row.items() if "/noise fired/" in key]
            assert fired == pytest.approx([shares[step]] * 15)


@pytest.mark.parametrize("kind", [ONE, FSDP, DDP])
@pytest.mark.parametrize("name", ["muon", "noise"])
def test_the_run_is_bitwise_as_without(name, kind, ranks):
    with_metrics = records_of(ranks, name, kind)
    for record, without in zip(with_metrics, records_of(ranks, name, kind, " without")):
        assert len(record["end"]) > 50
        assert record["end"] == without["end"]
        assert not any(measured(row) for row in without["metrics"].values())


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_layers_only_roles_are_recorded(world_size, ranks):
    for rank in ranks[world_size]:
        for step in DUE:
            names = measured(rank["per role"]["metrics"][str(step)])
            assert set(names) == {matrix_metric(measure, "matrix") for measure in ROLE}


@pytest.mark.parametrize("world_size", [1, 2])
def test_experts_are_averaged(world_size, ranks):
    for rank in ranks[world_size]:
        record = rank["experts"]
        (expected,), (got,) = record["expected"].values(), record["metrics"].values()
        assert [len(matrices) for matrices in expected.values()] == [6] * 6
        assert measured(got) == pytest.approx(means(expected, "experts"), rel=2e-3)
        assert got[matrix_metric(FAILED, "experts")] == 0


def test_a_rank_without_matrices_records_the_same(ranks):
    for world_size in (1, 2):
        for rank in ranks[world_size]:
            record = rank["one matrix"]
            (expected,), (got,) = record["expected"].values(), record["metrics"].values()
            assert measured(got) == pytest.approx(means(expected, "matrix"), rel=2e-3)


# On one rank, without a trainer


def attached(callback: MatrixMetricsCallback, model: nn.Module, optim: Any) -> Dict[str, float]:
    """What the callback will record."""
    recorded: Dict[str, float] = {}
    callback.trainer = SimpleNamespace(  # type: ignore[assignment]
        train_module=SimpleNamespace(optim=optim, model=model),
        global_step=1,
        record_metric=lambda name, value: recorded.update({name: value}),
    )
    callback.post_attach()
    return recorded


def two_linear(device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5, device=device), nn.Linear(5, 4, device=device))


def set_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def test_optimizers_without_a_rule_for_matrices_are_refused():
    model = two_linear()
    for config in (AdamWConfig(), OLMoCoreAdamWConfig()):
        with pytest.raises(OLMoConfigurationError, match="is a .*AdamW, allowed are .* matrices"):
            attached(MatrixMetricsCallback(), model, config.build(model))
    callback = MatrixMetricsCallback()
    pipeline = SimpleNamespace(optimizers=[MuonConfig().build(model)])
    callback.trainer = SimpleNamespace(train_module=pipeline)  # type: ignore[assignment]
    with pytest.raises(OLMoConfigurationError, match="allowed are .* matrices"):
        callback.post_attach()


@pytest.mark.parametrize("interval", [0, -3])
def test_an_interval_below_one_is_refused(interval):
    model = two_linear()
    with pytest.raises(OLMoConfigurationError, match=f"'interval' is {interval}, .*>= 1"):
        attached(MatrixMetricsCallback(interval=interval), model, MuonConfig().build(model))


def test_of_a_step_that_the_trainer_skips_nothing_is_exchanged(monkeypatch):
    def forbidden(obj):
        raise AssertionError("exchanged")

    monkeypatch.setattr(matrix_metrics, "all_gather_object", forbidden)
    model = two_linear()
    callback = MatrixMetricsCallback(interval=1)
    recorded = attached(callback, model, MuonConfig().build(model))
    callback.post_train_batch()
    assert not recorded


def test_the_host_reads_values_only_after_a_step_with_a_report(monkeypatch):
    def forbidden(self, *args, **kwargs):
        raise AssertionError("host-device sync")

    model = two_linear()
    optim = MuonConfig().build(model)
    callback = MatrixMetricsCallback(interval=2)
    recorded = attached(callback, model, optim)
    with monkeypatch.context() as patched:
        for method in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__"):
            patched.setattr(torch.Tensor, method, forbidden)
        for step in (1, 2):
            set_gradients(model)
            callback.trainer.global_step = step
            callback.pre_optim_step()
            optim.step()
            if step == 1:
                callback.post_train_batch()
        assert not recorded
        with pytest.raises(AssertionError, match="sync"):
            callback.post_train_batch()


def test_of_a_matrix_that_is_not_finite_only_that_its_orthogonalisation_failed():
    model = two_linear()
    optim = MuonConfig(skip_step=False).build(model)
    callback = MatrixMetricsCallback(interval=1)
    recorded = attached(callback, model, optim)
    set_gradients(model)
    grad = model.get_parameter("0.weight").grad
    assert grad is not None
    grad[0, 0] = math.nan
    callback.pre_optim_step()
    optim.step()
    callback.post_train_batch()
    assert set(recorded) == {
        matrix_metric(FAILED, "0.weight"),
        *(matrix_metric(measure, "1.weight") for measure in [*LAYER, FAILED]),
        *(matrix_metric(measure, "matrix") for measure in [*ROLE, FAILED]),
    }
    assert recorded[matrix_metric(FAILED, "0.weight")] == 1
    assert recorded[matrix_metric(FAILED, "1.weight")] == 0
    assert recorded[matrix_metric(FAILED, "matrix")] == 1


@pytest.mark.parametrize("method", list(PolarMethod))
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_no_polar_factor_of_a_finite_matrix_counts_as_failed(method, scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, 20, generator=generator)
    x[1] = x[1, :, :1] @ x[1, :1]  # rank 1
    x[2] = 0
    x = x * scale
    assert not has_failed(x, polar(x, method)).any()
    half = x.bfloat16()
    assert method == PolarMethod.svd or not has_failed(half, polar(half, method)).any()


def test_what_diverged_vanished_or_is_not_finite_counts_as_failed():
    x = torch.ones(4, 3, 5)
    updates = polar(x, PolarMethod.svd)
    updates[0] *= 1.5 * 3**0.5 + 0.01  # a lone singular value against the mean of three
    updates[1] = 0
    updates[2, 0, 0] = math.nan
    assert has_failed(x, updates).tolist() == [True, True, True, False]


def diverging(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return x * (3 / torch.linalg.matrix_norm(x, 2, keepdim=True))


def test_a_run_records_an_orthogonalisation_that_diverges(monkeypatch):
    monkeypatch.setattr(orthogonal, "polar", diverging)
    for config in (MuonConfig(), NorMuonConfig(), MuonNolahConfig(), ScionConfig()):
        model = two_linear()
        optim = config.build(model)
        callback = MatrixMetricsCallback(interval=1)
        recorded = attached(callback, model, optim)
        for param in model.parameters():
            param.grad = torch.linspace(1, 2, param.numel()).sin().view(param.shape)
        callback.pre_optim_step()
        optim.step()
        callback.post_train_batch()
        assert recorded[matrix_metric(FAILED, "matrix")] == 2, config


def test_a_report_is_taken_once_and_leaves_nothing(monkeypatch):
    evaluated: List[int] = []
    decompose = spectrum._decompose

    def counting(item: Any) -> Any:
        evaluated.append(1)
        return decompose(item)

    monkeypatch.setattr(spectrum, "_decompose", counting)
    model = two_linear()
    optim = MuonConfig().build(model)
    callback = MatrixMetricsCallback(interval=2)
    attached(callback, model, optim)
    counts = []
    for step in range(1, 5):
        set_gradients(model)
        callback.trainer.global_step = step
        callback.pre_optim_step()
        optim.step()
        callback.post_train_batch()
        counts.append(len(evaluated))
        assert optim.reports is None
    assert counts[0] == 0 < counts[1] == counts[2] < counts[3]
