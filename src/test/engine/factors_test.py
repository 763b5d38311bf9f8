import math
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Tuple

import torch
import torch.distributed.checkpoint as dcp

from olmo_optim_ext.engine.factors import FactorPlan

CPU = torch.device("cpu")

SHAPES: List[Mapping[str, Tuple[int, ...]]] = [
    {"left": (3, 3), "right": (2, 2)},
    {"left": (5, 5)},
    {"right": (4, 1), "few": (2,)},
    {},
    {"left": (0, 0), "right": (2, 2)},
    {"left": (2, 2), "right": (1, 1), "few": (1,)},
]
"""As in the worker."""

NUMEL = {"left": 38, "right": 13, "few": 3}


def held_by(plan: FactorPlan) -> Dict[str, torch.Tensor]:
    return {name: plan.new(name, torch.float32, CPU) for name in plan.names}


def test_names_are_those_of_any_matrix():
    assert FactorPlan(SHAPES).names == ["left", "right", "few"]
    assert FactorPlan([{}, {}]).names == []


def test_one_rank_holds_the_factors_of_all_matrices():
    plan = FactorPlan(SHAPES)
    for name, tensor in held_by(plan).items():
        assert tensor.shape == (NUMEL[name],) and plan.numel(name) == NUMEL[name]
        assert not tensor.any()
    assert plan.new("left", torch.float64, CPU).dtype == torch.float64


def test_views_cover_each_element_once():
    plan = FactorPlan(SHAPES)
    held = held_by(plan)
    for matrix, shapes in enumerate(SHAPES):
        views = plan.views(held, matrix)
        assert {name: tuple(view.shape) for name, view in views.items()} == shapes
        for view in views.values():
            view += 1
    assert all(torch.equal(x, torch.ones_like(x)) for x in held.values())


def test_a_checkpoint_of_one_rank_is_what_it_holds():
    plan = FactorPlan(SHAPES)
    held = plan.new("left", torch.float32, CPU).copy_(torch.arange(38))
    assert plan.to_checkpoint(torch.zeros(1), "left", held) is held
    read = plan.new("left", torch.float32, CPU)
    plan.from_checkpoint("left", read, held.double())
    assert torch.equal(read, held) and read.dtype == torch.float32


def test_factors_survive_a_change_of_owners(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("factors_survive_a_change_of_owners")


def test_factors_shared_by_rows_survive_a_change_of_ranks(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("factors_shared_by_rows_survive_a_change_of_ranks")


def test_factors_saved_by_four_ranks_are_read_by_one(passed_on_ranks: Callable[[str], Path]):
    folder = passed_on_ranks("factors_survive_a_change_of_owners")
    plan = FactorPlan(SHAPES)
    saved = {name: torch.zeros(plan.numel(name)) for name in plan.names}
    dcp.load(saved, checkpoint_id=folder / "factors", no_dist=True)
    held = held_by(plan)
    for name in plan.names:
        plan.from_checkpoint(name, held[name], saved[name])
    for matrix, shapes in enumerate(SHAPES):
        for name, view in plan.views(held, matrix).items():
            start = 100 * matrix + 1000 * len(name) + 1 / 3
            expected = start + torch.arange(math.prod(shapes[name])).view(shapes[name])
            assert torch.equal(view, expected), (matrix, name)
