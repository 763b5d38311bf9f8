"""
Which checkpoints of a run are whole, and which fit.

OLMo-core writes a checkpoint's ``.metadata.json`` last, so a folder without it is what a killed
save has left behind.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from olmo_core.distributed.checkpoint import get_checkpoint_metadata
from olmo_core.distributed.utils import barrier, get_fs_local_rank
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.checkpoint import Checkpointer
from olmo_core.train.train_module import TransformerTrainModule
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = [
    "Saved",
    "check_fits",
    "check_weights_fit",
    "has_optimizer_state",
    "latest",
    "misfit",
    "remove_half_written",
    "weights_of",
]

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


def has_optimizer_state(folder: str) -> bool:
    """Whether a ``model_and_optim`` has state of an optimizer, and not a model alone."""
    keys = get_checkpoint_metadata(folder).state_dict_metadata
    return any(key.startswith("optim.state.") for key in keys)


def weights_of(path: str) -> str:
    """
    The ``model_and_optim`` of a checkpoint of anybody's.

    :raises OLMoConfigurationError: If the folder has none.
    """
    for folder in (Path(path) / "model_and_optim", Path(path)):
        if (folder / ".metadata").is_file():
            return str(folder)
    raise OLMoConfigurationError(
        f"warm_start.path: {path} has no checkpoint, allowed is the folder of one of OLMo-core's, "
        "with model_and_optim in it"
    )


def check_fits(path: str, train_module: TransformerTrainModule) -> None:
    """
    Check that a checkpoint has what the model and the optimizer will load, and nothing else.

    :param path: Its folder, or its ``model_and_optim``.

    :raises OLMoConfigurationError: Names the checkpoint and the first thing that does not fit.
    """
    problem = misfit(path, train_module)
    if problem is not None:
        raise OLMoConfigurationError(problem)


def check_weights_fit(path: str, train_module: TransformerTrainModule) -> None:
    """As :func:`check_fits`, of the model alone."""
    problem = misfit(path, train_module, ("model",))
    if problem is not None:
        raise OLMoConfigurationError(problem)


def misfit(
    path: str, train_module: TransformerTrainModule, parts: Sequence[str] = ("model", "optim")
) -> Optional[str]:
    """What a checkpoint lacks, has besides, or has in another shape, in words."""
    metadata = get_checkpoint_metadata(weights_of(path)).state_dict_metadata
    state = train_module.state_dict_to_save(optim="optim" in parts)
    for what in parts:
        expected = state[what]
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
            return (
                f"the checkpoint {path} was saved with another {owner}: {problems[0]}"
                + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
                + "; allowed is one of the same, or another output folder"
            )
    return None


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
