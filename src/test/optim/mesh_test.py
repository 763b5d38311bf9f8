"""
The contracts across meshes, for every catalogue name: C2, C4 across numbers of ranks, and the work
of C7. One group of processes of two ranks and one of four serve all of them.
"""

import json
import math
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)

from olmo_optim_ext.config import ExtOptimConfig
from olmo_optim_ext.engine.exchange import assign_owners

from ..ranks import run_on_ranks
from .case import STEPS, equal, relative_error, train, weights
from .cases import CASES
from .models import LargeShapes
from .variants import (
    MUON_LIKE,
    ONE_OF_A_LOOP,
    ONE_OF_EACH,
    PRECONDITIONED,
    ROUTES,
    VARIANTS,
    WITH_WORK_SPACE,
    depends_on_layout,
    routes_of,
    runs_everywhere,
    tolerance,
)

NAMES = list(CASES)


@pytest.fixture(scope="module")
def mesh_results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    for name, model, config in SAVED_ALONE:
        whole = model(0)
        optim = config.build(whole)
        train(whole, optim, 0, STEPS // 2)
        save_model_and_optim_state(
            folder / f"{name}-from1", whole, optim, flatten_optimizer_state=True
        )
    for world_size in (2, 4):
        run_on_ranks(world_size, Path(__file__).with_name("mesh_worker.py"), folder)
    return folder


SAVED_ALONE = [(each.name, each.model, each.config) for each in VARIANTS if "4to1" in each.routes]


def mesh_error(folder: Path, name: str, label: str, against: str) -> float:
    got = torch.load(folder / f"{name}-{label}.pt", weights_only=True)
    alone = torch.load(folder / f"{against}-alone.pt", weights_only=True)
    if equal(got, alone["end"]):
        return 0.0
    return relative_error(got, alone["end"], alone["start"])


LABELS = {
    "mixed": ["fsdp2", "ddp2", "fsdp4", "hsdp2x2", "columns4", "tp2xfsdp2", "ddp4", "replicate4"],
    "experts": ["fsdp2", "ddp2", "ep2", "fsdp4", "hsdp2x2", "ep2xfsdp2", "ddp4", "replicate4"],
}


@pytest.mark.parametrize("name", [*NAMES, "whitening"])
def test_no_mesh_changes_the_update(name, mesh_results):
    done = [
        (variant, label, bitwise)
        for size in (2, 4)
        for variant, label, bitwise in json.loads((mesh_results / f"done{size}.json").read_text())
        if variant == name or variant.startswith(f"{name}_")
    ]
    labels = {label for variant, label, _ in done if variant == name}
    everywhere = name == "whitening" or runs_everywhere(name)
    mixed = {each for each in LABELS["mixed"] if everywhere or each in ONE_OF_EACH}
    routes = ROUTES if name == "whitening" else routes_of(name)
    assert labels >= {*mixed, *routes} - {"4to1"}
    labels = {label for variant, label, _ in done if variant == f"{name}_experts"}
    everywhere = name in (*ONE_OF_A_LOOP, "whitening")
    experts = {each for each in LABELS["experts"] if everywhere or each in ONE_OF_EACH}
    if name == "whitening" or depends_on_layout(name):
        assert labels >= experts
    for variant, label, bitwise in done:
        error = mesh_error(mesh_results, variant, label, variant)
        assert error == 0.0 if bitwise else error < tolerance(name), (variant, label)


@pytest.mark.parametrize("label", ["fsdp4", "hsdp2x2"])
@pytest.mark.parametrize("name,model,config", SAVED_ALONE, ids=[case[0] for case in SAVED_ALONE])
def test_what_four_ranks_saved_continues_on_one(name, model, config, label, mesh_results):
    whole = model(1)
    optim = config.build(whole)
    load_model_and_optim_state(
        mesh_results / f"{name}-{label}-later", whole, optim, flatten_optimizer_state=True
    )
    train(whole, optim, STEPS - 5, STEPS)
    alone = torch.load(mesh_results / f"{name}-alone.pt", weights_only=True)
    got = weights(whole)
    if CASES[name].bitwise if name in CASES else False:
        assert equal(got, alone["end"])
    assert relative_error(got, alone["end"], alone["start"]) < tolerance(name)


@pytest.mark.parametrize(
    "name,against", [("shard_local_polar", "ext_muon"), ("per_shard_mask", "cautious_adamw")]
)
@pytest.mark.parametrize("label", ["fsdp2", "fsdp4"])
def test_a_rule_that_depends_on_the_mesh_fails(name, against, label, mesh_results):
    assert mesh_error(mesh_results, name, label, against) > 1e-2


def test_paths_are_the_intended_ones(mesh_results):
    def paths(variant: str, label: str):
        found = torch.load(mesh_results / f"{variant}-{label}.paths", weights_only=True)
        return {name: path for name, (path, _) in found.items()}, found

    for label in ("ddp2", "ddp4", "replicate4"):
        assert set(paths("ext_muon", label)[0].values()) == {"broadcast"}
        assert set(paths("ext_muon_redundant", label)[0].values()) == {"local"}
        assert set(paths("whitening", label)[0].values()) == {"local"}  # factors must not differ
    for label in ("fsdp2", "fsdp4", "hsdp2x2"):
        assert set(paths("ext_muon", label)[0].values()) == {"rows"}
    mixed, _ = paths("ext_muon", "tp2xfsdp2")
    assert mixed["square.weight"] == mixed["wide.weight"] == "redistribute"
    assert mixed["few_rows.weight"] == "rows"
    # Of six experts over two ranks three are each rank's own.
    experts, found = paths("ext_muon_experts", "ep2")
    assert set(experts.values()) == {"rows"}
    assert all(owners == (0, 0, 0, 1, 1, 1) for _, owners in found.values())
    experts, found = paths("ext_muon_experts", "ep2xfsdp2")
    assert set(experts.values()) == {"rows"}
    assert all(len(owners) == 3 for _, owners in found.values())


@pytest.fixture(scope="module")
def counts(mesh_results) -> Dict[str, Dict[str, List[Tuple[float, List[str], int]]]]:
    """
    By name and mesh, for each rank the bytes that it sends, the matrices that it computes, and the
    bytes of their factors.
    """
    return json.loads((mesh_results / "counts.json").read_text())


MATRICES = [param for param in LargeShapes().parameters() if param.ndim == 2]


@pytest.mark.parametrize("name", MUON_LIKE)
def test_each_matrix_is_computed_once_and_little_is_sent(name, counts):
    ranks = counts[name]["fsdp4"]
    computed = [name for _, names, _ in ranks for name in names]
    assert len(computed) == len(set(computed)) == len(MATRICES)
    share = sum(param.nbytes for param in MATRICES) / len(ranks)
    allowed = 1.05 * max(2 * share, max(param.nbytes for param in MATRICES))
    assert all(0 < sent <= allowed + reduced(name) for sent, _, _ in ranks)


def reduced(name: str) -> int:
    """Bytes that a rank sends at most of what some names add up of each matrix."""
    return 2 * len(MATRICES) * {"muon_nolah": 4 * 2 * 256 * 8}.get(name, 8)


def total(counts, name: str, label: str) -> float:
    return sum(sent for sent, _, _ in counts[name][label])


@pytest.mark.parametrize("label", ["fsdp4", "hsdp2x2"])
@pytest.mark.parametrize("name", MUON_LIKE)
def test_variants_of_muon_send_what_muon_sends(name, label, counts):
    muon = total(counts, "ext_muon", label)
    assert muon <= total(counts, name, label) <= muon + 4 * reduced(name)


@pytest.mark.parametrize("label,n_owners", [("fsdp4", 4), ("hsdp2x2", 2)])
@pytest.mark.parametrize("name", PRECONDITIONED)
def test_factors_are_divided_among_owners(name, label, n_owners, counts):
    """A rank has its share and one matrix's more at the most; all have each once, and replicas."""
    matrices = {
        key: CASES[name].factor_bytes(*p.shape) + 4 * p.numel() * MOMENTS[name]
        for key, p in LargeShapes().named_parameters()
        if p.ndim == 2
    }
    total, largest = sum(matrices.values()), max(matrices.values())
    held = [n_bytes for _, _, n_bytes in counts[name][label]]
    assert max(held) <= total / n_owners + largest
    assert sum(held) == total * 4 / n_owners
    for _, computed, n_bytes in counts[name][label]:
        assert n_bytes == sum(matrices[key] for key in computed)


MOMENTS = {"soap": 2, "kron": 1}
"""Numbers of the state of an element, which are on the owner too."""


PACKED: Dict[str, ExtOptimConfig] = {
    **{name: CASES[name].config for name in MUON_LIKE},
    "soap_one_sided": CASES["soap"].config.replace(one_sided=True),
    "soap_without_sides": CASES["soap"].config.replace(max_precond_dim=16),
    "kron_diagonal": CASES["kron"].config.replace(memory_save_mode="all_diag"),
}


@pytest.mark.parametrize("n_owners", [2, 4, 8, 16])
@pytest.mark.parametrize("name", PACKED)
def test_owners_have_like_work_where_shapes_allow(name, n_owners):
    """Of the matrices of 16 layers, of which no one is more than a few percent of a share."""
    with torch.device("meta"):
        model = LargeShapes(width=256, layers=16)
    optim: Any = PACKED[name].build(model)
    costs = [optim.cost(group, *shape) for group, shape in optim.all_matrices().values()]
    load = [0.0] * n_owners
    for cost, owner in zip(costs, assign_owners(costs, n_owners)):
        load[owner] += cost
    assert 0 < max(load) <= 1.1 * sum(costs) / n_owners


@pytest.mark.parametrize("label", ["fsdp4", "hsdp2x2", "ddp4"])
@pytest.mark.parametrize("side", ["longer", "inputs"])
def test_dion_sends_thin_factors(side, label, counts):
    """The formula of its plan page, and what is left of Muon's bytes."""
    name = {"longer": "ext_dion", "inputs": "ext_dion_inputs"}[side]
    replicas, ranks = {"fsdp4": (1, 4), "hsdp2x2": (2, 2), "ddp4": (1, 4)}[label]
    n_floats = 0.0
    for param in MATRICES:
        n_out, n_in = param.shape
        rank = math.ceil(min(n_out, n_in) / 4)
        if label == "ddp4":
            n_floats += (ranks - 1) * rank * (n_out + n_in + 1)
        elif side == "inputs" or n_out < n_in:  # the basis is with its rows
            n_floats += 2 * (ranks - 1) * rank * (n_in + 2)  # lengths in float64
        else:
            n_floats += (ranks - 1) * rank * (3 * n_in + 2 * n_out / ranks + 1)
    sent = total(counts, name, label)
    assert sent == pytest.approx(4 * replicas * n_floats, rel=1e-6)
    # Two products are added up by ranks that each have summands of all of one side: with r columns
    # this is 2 (ranks - 1) r numbers for each of its units, whoever adds, which for a square matrix
    # is ranks * rank_fraction of what Muon sends.
    allowed = {
        ("longer", "fsdp4"): 1.05,
        ("inputs", "fsdp4"): 0.66,
        ("longer", "hsdp2x2"): 0.65,
        ("inputs", "hsdp2x2"): 0.4,
        ("longer", "ddp4"): 0.4,
        ("inputs", "ddp4"): 0.4,
    }
    assert sent <= allowed[side, label] * total(counts, "ext_muon", label)


def test_a_step_holds_two_buckets_and_two_matrices(mesh_results):
    ranks = json.loads((mesh_results / "memory.json").read_text())
    for peak, largest, bucket, n_buckets, n_broadcasts, alive, _ in ranks:
        assert n_buckets >= 3 and n_broadcasts >= 3
        assert largest < peak <= 2 * bucket + 2 * largest
        assert alive == 2


@pytest.mark.parametrize("name", WITH_WORK_SPACE)
def test_a_step_with_factors_holds_two_buckets_and_the_work_space_of_two_matrices(
    name, mesh_results
):
    """The work space of a matrix is what a step allocates that updates nothing but it."""
    for _, _, bucket, *_, peaks in json.loads((mesh_results / "memory.json").read_text()):
        peak, work_space = peaks[name]
        assert work_space < peak <= 2 * bucket + 2 * work_space
