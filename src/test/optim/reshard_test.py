"""
Long runs whose state of whole matrices is saved on some ranks and continued on others, twice.
"""

from pathlib import Path
from typing import Dict

import pytest
import torch
from olmo_core.distributed.checkpoint import load_model_and_optim_state

from olmo_optim_ext import KronFit
from olmo_optim_ext.config import ExtOptimConfig

from ..ranks import run_on_ranks
from .case import STEPS, MixedShapes, relative_error, train, weights
from .cases import CASES
from .variants import PRECONDITIONED

CONFIGS: Dict[str, ExtOptimConfig] = {
    **{name: CASES[name].config for name in PRECONDITIONED},
    "kron_pro": CASES["kron"].config.replace(update=KronFit.pro),
}

WAYS = {"fewer": ("fsdp4", "fsdp2", "alone"), "replicas": ("hsdp2x2", "fsdp4", "hsdp2x2")}
"""Where each third of the run is."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    for world_size in (4, 2):
        run_on_ranks(world_size, Path(__file__).with_name("reshard_worker.py"), folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_on_three_meshes_is_the_run_on_one_process(name: str, way: str, runs: Path):
    model = MixedShapes()
    start = weights(model)
    train(model, CONFIGS[name].build(model), 0, 3 * STEPS)
    if WAYS[way][-1] == "alone":
        last = MixedShapes(seed=2)
        optim = CONFIGS[name].build(last)
        where = runs / f"{name}-{way}-2"
        load_model_and_optim_state(where, last, optim, flatten_optimizer_state=True)
        train(last, optim, 2 * STEPS, 3 * STEPS)
        got = weights(last)
    else:
        got = torch.load(runs / f"{name}-{way}-3.pt", weights_only=True)
    assert relative_error(got, weights(model), start) < 1e-5
