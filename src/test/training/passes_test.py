"""
Further passes over a batch, and range tests, on two ranks.
"""

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest

from ..ranks import run_on_ranks
from .passes_worker import RANGE_TESTS, WITH_PASSES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> List[Dict[str, Any]]:
    """For each rank the weights at the end of each run, and what it saw of range tests."""
    folder = tmp_path_factory.mktemp("passes")
    run_on_ranks(2, Path(__file__).with_name("passes_worker.py"), folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_exact_mars_has_the_gradient_at_the_last_weights(found):
    for of_rank in found:
        assert of_rank["exact"] == of_rank["approximate"]


@pytest.mark.parametrize("name", WITH_PASSES)
def test_an_evaluation_changes_nothing(name, found):
    """After it FSDP has whole parameters, which further passes must not take for the model's."""
    for of_rank in found:
        assert of_rank[name] == of_rank[f"{name}, looked at"]


@pytest.mark.parametrize("name", RANGE_TESTS)
def test_a_range_test_leaves_nothing_and_all_ranks_see_the_same(name, found):
    first, second = (of_rank[f"range test of {name}"] for of_rank in found)
    for seen in (first, second):
        assert seen["after"] == seen["before"]
    assert first["losses"] == second["losses"]
    assert abs(first["losses"][-1] - first["losses"][0]) > 0.5  # it has moved far
