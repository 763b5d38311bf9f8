"""
Which checkpoints of a run are whole, and which fit.

OLMo-core writes a checkpoint's ``.metadata.json`` last, so a folder without it is what a killed
save has left behind.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from olmo_core.distributed.checkpoint import get_checkpoint_metadata
from olmo_core.distributed.utils import barrier, get_fs_local_rank
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.checkpoint import Checkpointer
from olmo_core.train.train_module import TransformerTrainModule
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = ["Saved", "check_fits", "latest", "remove_half_written"]

log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A whole checkpoint."""

    step: int
    path: str


def latest(folder: Path) -> Optional[Saved]:
    """The whole checkpoint of the highest step in a stage's folder."""
    if not folder.is_dir():
        return None
    return max((Saved(*found) for found in Checkpointer.find_checkpoints(folder)), default=None)


def remove_half_written(folder: Path) -> None:
    """Remove what killed saves have left in a stage's folder. All ranks call it."""
    if get_fs_local_rank() == 0 and folder.is_dir():
        for path in folder.glob("step*"):
            if path.is_dir() and not Checkpointer.dir_is_checkpoint(path):
                log.warning(f"Removing '{path}', which a killed save has left behind")
                shutil.rmtree(path)
    barrier()


def check_fits(path: str, train_module: TransformerTrainModule) -> None:
    """
    Check that a checkpoint has what the model and the optimizer will load, and nothing else.

    :raises OLMoConfigurationError: Names the checkpoint and the first thing that does not fit.
    """
    metadata = get_checkpoint_metadata(f"{path}/model_and_optim").state_dict_metadata
    for what in ("model", "optim"):
        expected = train_module.state_dict_to_save()[what]
        problems = _problems(what, expected, metadata)
        prefix = f"{what}."
        known = {f"{prefix}{key}" for key in expected}
        problems += [
            f"it also has {key.removeprefix(prefix)}"
            for key in metadata
            if key.startswith(prefix) and key not in known
        ]
        if problems:
            owner = "optimizer" if what == "optim" else "model"
            raise OLMoConfigurationError(
                f"the checkpoint {path} was saved with another {owner}: {problems[0]}"
                + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
                + "; allowed is one of the same, or another output folder"
            )


def _problems(what: str, expected: Dict[str, Any], metadata: Dict[str, Any]) -> List[str]:
    problems = []
    for key, value in expected.items():
        saved = metadata.get(f"{what}.{key}")
        if saved is None:
            problems.append(f"it has no {key}")
        elif isinstance(value, torch.Tensor) and isinstance(saved, TensorStorageMetadata):
            if tuple(saved.size) != tuple(value.shape):
                problems.append(
                    f"its {key} has shape {tuple(saved.size)} instead of {tuple(value.shape)}"
                )
    return problems
