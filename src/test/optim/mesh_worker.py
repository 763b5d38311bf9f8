"""
What each rank of the mesh tests runs, as a script under torchrun: one group of processes serves
all names and meshes.
"""

import os
import sys
from pathlib import Path
from typing import Any, Dict

import torch
import torch.distributed as dist
import torch.nn as nn
from cases import CASES, STEPS, MixedShapes, grads_at, set_lr
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from olmo_optim_ext import list_optimizers


def train(model: nn.Module, optim: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        set_lr(optim, step)
        grads = grads_at(step, MixedShapes())
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            grad = distribute_tensor(grads[name], param.device_mesh, param.placements)
            param.grad = grad
        optim.step()
        optim.zero_grad()


def whole_weights(model: nn.Module) -> Dict[str, torch.Tensor]:
    out = {}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        out[name] = param.full_tensor().detach().clone()
    return out


def assert_replicas_are_equal(model: nn.Module, grid: DeviceMesh) -> None:
    group = grid.get_group("replicate")
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        mine = param.to_local().detach().contiguous()
        theirs = [torch.empty_like(mine) for _ in range(grid.size(0))]
        dist.all_gather(theirs, mine, group=group)
        assert all(torch.equal(each, mine) for each in theirs), name


def save(path: Path, tensors: Dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        torch.save(tensors, path)
    dist.barrier()


def by_columns(param: nn.Parameter):
    """Shard matrices by columns: a sharding without a fast path."""
    return Shard(1) if param.ndim == 2 and param.shape[1] % 4 == 0 else Shard(0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    flat = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    shardings: Dict[str, Dict[str, Any]] = {f"fsdp{world_size}": dict(mesh=flat)}
    if world_size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        shardings["hsdp2x2"] = dict(mesh=grid)
        shardings["columns4"] = dict(mesh=flat, shard_placement_fn=by_columns)

    for name in list_optimizers():
        for label, sharding in shardings.items():
            model = fully_shard(MixedShapes(), **sharding)
            optim = CASES[name].config.build(model)
            train(model, optim, 0, STEPS)
            if label == "hsdp2x2":
                assert_replicas_are_equal(model, grid)
            save(folder / f"{name}-{label}.pt", whole_weights(model))
        checkpoint = folder / f"{name}-checkpoint"
        if world_size == 2:
            model = fully_shard(MixedShapes(), mesh=flat)
            optim = CASES[name].config.build(model)
            train(model, optim, 0, STEPS // 2)
            save_model_and_optim_state(checkpoint, model, optim, flatten_optimizer_state=True)
        else:
            model = fully_shard(MixedShapes(seed=1), mesh=flat)
            optim = CASES[name].config.build(model)
            load_model_and_optim_state(checkpoint, model, optim, flatten_optimizer_state=True)
            train(model, optim, STEPS // 2, STEPS)
            save(folder / f"{name}-resumed4.pt", whole_weights(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
