"""
The output folder of a run: whose it is, and which config it has.
"""

from pathlib import Path
from typing import Optional, Sequence

from filelock import FileLock, Timeout
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.exceptions import OLMoConfigurationError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from . import checkpoints
from .drafts import write_whole
from .plans import StagePlan
from .training import JolmoModel

__all__ = ["MAY_CHANGE", "claim", "write_config"]

MAY_CHANGE = frozenset(
    {
        *("name", "output", "cache", "wandb", "comet", "parallelism", "rank_microbatch_size"),
        *("evaluation", "checkpoint", "optimizer_metrics"),
        *("compile", "activation_checkpointing"),
    }
)
"""Keys whose values may change when a run continues: they do not say what is trained on what."""


def claim(spec: JolmoModel, plans: Sequence[StagePlan]) -> Optional[FileLock]:
    """
    Take the output folder for this process. All ranks call it.

    :returns: On rank 0 the lock, to be released at the end.

    :raises OLMoConfigurationError: If another process has it, another config has trained there, or
        it cannot be written.
    """
    output = Path(spec.output)
    lock: Optional[FileLock] = None
    problem: Optional[str] = None
    if get_rank() == 0:
        lock = FileLock(output / ".lock")
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            _compare_config(spec, plans)
        except Timeout:
            problem = f"output: another process is running in {output}, allowed is one at a time"
        except OSError as error:
            problem = (
                f"output: {output} cannot be written ({error.strerror}), allowed is a folder that "
                "can"
            )
        except OLMoConfigurationError as error:
            problem = str(error)
    problem = broadcast_object(problem)  # or the other ranks would wait for this one
    if problem is not None:
        if lock is not None:
            lock.release()
        raise OLMoConfigurationError(problem)
    return lock


def _compare_config(spec: JolmoModel, plans: Sequence[StagePlan]) -> None:
    path = Path(spec.output) / "config.yaml"
    if not path.exists() or all(checkpoints.latest(p.folder) is None for p in plans):
        return  # nothing has been trained here, so nothing is lost
    try:
        before = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(before, dict)
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException, AssertionError):
        raise OLMoConfigurationError(
            f"output: {path} is damaged, allowed is the one that the run wrote, or another "
            "folder: output=FOLDER"
        ) from None
    changed = [
        f"{key} {before.get(key)!r} -> {value!r}"
        for key, value in spec.as_plain().items()
        if key not in MAY_CHANGE and before.get(key) != value
    ]
    if changed:
        raise OLMoConfigurationError(
            f"output: {spec.output} has a run with another config ({'; '.join(changed)}), "
            "allowed is the same config or another folder: output=FOLDER"
        )


def write_config(spec: JolmoModel) -> None:
    """Write the resolved spec. All ranks call it."""
    if get_rank() == 0:
        text = OmegaConf.to_yaml(OmegaConf.create(spec.as_plain()))
        write_whole(Path(spec.output) / "config.yaml", text)
