"""
What a run was made with and what it needs: ``run.json`` in its folder.
"""

import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Optional

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor, get_rank, get_world_size, is_distributed
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerTrainModule

from .drafts import write_whole

__all__ = ["RunFacts", "read_facts", "state_bytes"]

PACKAGES = ("torch", "ai2-olmo-core", "olmo-optim-ext")


@dataclass
class RunFacts(Callback):
    """
    Writes ``run.json``: ``parameters``; by stage ``state_bytes`` of the optimizer and the mixture
    that was ``asked`` for; ``ranks``, ``device``, ``versions``, ``command`` and ``time`` (UTC) of
    the last start.

    :param path: Of the file.
    :param stage: Its name.
    :param asked: The share of each source in the stage's tokens.
    """

    path: Path = Path("run.json")
    stage: str = ""
    asked: Dict[str, float] = field(default_factory=dict)

    _counted: bool = False

    def pre_train(self):
        self._write(None)

    def post_train_batch(self):
        # After a step: optimizers that are not of this package have no state before it.
        if self._counted:
            return
        self._counted = True
        module = self.trainer.train_module
        assert isinstance(module, TransformerTrainModule) and module.optim is not None
        self._write(state_bytes(module.optim))

    def _write(self, its_state: Optional[int]) -> None:
        if get_rank() != 0:
            return
        module = self.trainer.train_module
        assert isinstance(module, TransformerTrainModule)
        before = read_facts(self.path)
        states = before.get("state_bytes", {})
        if its_state is not None:
            states[self.stage] = its_state
        facts = {
            "parameters": sum(param.numel() for param in module.model.parameters()),
            "state_bytes": states,
            "asked": {**before.get("asked", {}), self.stage: self.asked},
            "ranks": get_world_size(),
            "device": {"type": self.trainer.device.type, "name": _name_of(self.trainer.device)},
            "versions": {"python": platform.python_version(), **_versions()},
            "command": shlex.join(sys.argv),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_whole(self.path, json.dumps(facts, indent=2) + "\n")


def read_facts(path: Path) -> Dict[str, Any]:
    """What ``run.json`` says; empty if there is none that can be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def state_bytes(optim: torch.optim.Optimizer) -> int:
    """
    Bytes of all tensors of an optimizer's state, on all ranks together: copies that several ranks
    hold count as often. All ranks call it.
    """
    local = [
        get_local_tensor(value)
        for state in optim.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    total = torch.tensor(sum(x.numel() * x.element_size() for x in local))
    if is_distributed():
        dist.all_reduce(total)
    return int(total)


def _versions() -> Dict[str, Optional[str]]:
    out: Dict[str, Optional[str]] = {}
    for package in PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            out[package] = None
    return out


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
