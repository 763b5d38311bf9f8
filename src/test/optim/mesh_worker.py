"""
What each rank of the mesh tests runs, as a script under torchrun: one group of processes serves
all names, models and meshes.
"""

import gc
import json
import os
import sys
import weakref
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from olmo_optim_ext import MuonConfig
from olmo_optim_ext.engine.exchange import BroadcastExchange
from olmo_optim_ext.engine.matrix import MatrixOptimizer
from olmo_optim_ext.engine.matrix_base import MatrixBase

from .case import STEPS, grads_at, set_lr, take_step
from .case import train as train_alone
from .memory import peak_bytes, transfers_held_by_their_work
from .models import ExpertShapes, LargeShapes
from .variants import (
    BROKEN,
    COUNTED,
    ONE_OF_EACH,
    VARIANTS,
    WITH_WORK_SPACE,
    Variant,
)

Sharding = Callable[[Any], Any]

LATER = STEPS - 5
"""When four ranks save, for one to continue."""


def by_columns(param: nn.Parameter):
    """Shard matrices by columns: a sharding without a fast path."""
    return Shard(1) if param.ndim == 2 and param.shape[1] % 4 == 0 else Shard(0)


def tensor_parallel(model: nn.Module, grid: DeviceMesh) -> Any:
    """Uneven strided shards, both dimensions sharded, and layers that are only FSDP's."""
    plan = {
        "embeddings": RowwiseParallel(),
        "square": ColwiseParallel(),
        "tall": ColwiseParallel(),
        "wide": RowwiseParallel(),
    }
    parallelize_module(model, grid["tp"], plan)
    return fully_shard(model, mesh=grid["dp"])


def expert_parallel(model: Any, grid: DeviceMesh) -> Any:
    """Experts over one dimension, what each rank has of them over the other."""
    for layer in (model.dropless, model.with_capacity):
        layer.apply_ep(grid["tp"])
    return fully_shard(model, mesh=grid["dp"])


@lru_cache(maxsize=None)  # each mesh makes process groups, whose threads remain
def meshes(model: type) -> Dict[str, Sharding]:
    """All the ways to share a model that this number of ranks has."""
    size = dist.get_world_size()
    flat = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    out: Dict[str, Sharding] = {
        f"fsdp{size}": lambda m: fully_shard(m, mesh=flat),
        f"ddp{size}": DistributedDataParallel,
    }
    if size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        out["hsdp2x2"] = lambda m: fully_shard(m, mesh=grid)
        out["replicate4"] = lambda m: replicate(m, device_mesh=flat)
        if model is ExpertShapes:
            out["ep2xfsdp2"] = lambda m: expert_parallel(m, grid)
        else:
            out["columns4"] = lambda m: fully_shard(m, mesh=flat, shard_placement_fn=by_columns)
            out["tp2xfsdp2"] = lambda m: tensor_parallel(m, grid)
    elif model is ExpertShapes:
        ep = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))

        def experts_only(m: Any) -> Any:
            for layer in (m.dropless, m.with_capacity):
                layer.apply_ep(ep)
            return m

        out["ep2"] = experts_only
    return out


def named(model: nn.Module) -> Dict[str, nn.Parameter]:
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return dict(model.named_parameters())


def places(kind: Callable[[int], nn.Module], shard: Sharding) -> Dict[str, torch.Tensor]:
    """For each parameter the places in the whole of the elements that this rank has."""
    model = kind(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.arange(param.numel()).view(param.shape))
    params = named(shard(model))
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).detach().long()
        for name, p in params.items()
    }


def sharded_like(param: nn.Parameter, whole: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    local = whole.reshape(-1)[at]
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def train(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    whole: nn.Module,
    at: Dict[str, torch.Tensor],
    first: int,
    last: int,
) -> None:
    for step in range(first, last):
        set_lr(optim, step)
        grads = grads_at(step, whole)
        for name, param in named(model).items():
            param.grad = sharded_like(param, grads[name], at[name])
        take_step(optim)
        optim.zero_grad()


def whole_weights(model: nn.Module, at: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Every rank writes what it has to its places, rank by rank: replicas must agree bitwise."""
    out = {}
    for name, param in named(model).items():
        local = (param.to_local() if isinstance(param, DTensor) else param).detach()
        parts: List[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (at[name].reshape(-1), local.reshape(-1)))
        flat = torch.full((param.numel(),), torch.nan)
        for index, values in parts:
            known = ~flat[index].isnan()
            assert torch.equal(flat[index][known], values[known]), f"replicas of {name} differ"
            flat[index] = values
        assert not flat.isnan().any(), name
        out[name] = flat.view(param.shape)
    return out


def save(path: Path, value: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(value, path)
    dist.barrier()


def run(variant: Variant, shard: Sharding, path: Path) -> None:
    kind = variant.model
    model, at = shard(kind(0)), places(kind, shard)
    optim = variant.config.build(model)
    train(model, optim, kind(0), at, 0, STEPS)
    if isinstance(optim, MatrixBase):
        paths = {name: (str(p), owners) for name, (p, owners) in optim.placements().items()}
        save(path.with_suffix(".paths"), paths)
    save(path, whole_weights(model, at))


def run_alone(variant: Variant, path: Path) -> None:
    """The reference: one process, plain tensors. Start and end."""
    model = variant.model(0)
    start = {name: param.detach().clone() for name, param in named(model).items()}
    train_alone(model, variant.config.build(model), 0, STEPS)
    save(path, {"start": start, "end": {n: p.detach() for n, p in named(model).items()}})


def resume(variant: Variant, folder: Path) -> None:
    """On two ranks the first and the last half of a run; on four the last half of both."""
    name, kind, config, *_ = variant

    def start(label: str, seed: int) -> Tuple[nn.Module, Any, Dict[str, torch.Tensor]]:
        shard = meshes(kind)[label]
        model, at = shard(kind(seed)), places(kind, shard)
        return model, config.build(model), at

    def finish(label: str, checkpoint: Path, to: Path, save_at: int = STEPS) -> None:
        model, optim, at = start(label, seed=1)
        load_model_and_optim_state(checkpoint, model, optim, flatten_optimizer_state=True)
        train(model, optim, kind(0), at, STEPS // 2, save_at)
        if save_at < STEPS:
            where = folder / f"{name}-{label}-later"
            save_model_and_optim_state(where, model, optim, flatten_optimizer_state=True)
            train(model, optim, kind(0), at, save_at, STEPS)
        save(to, whole_weights(model, at))

    if dist.get_world_size() == 2:
        if "1tofsdp2" in variant.routes:
            finish("fsdp2", folder / f"{name}-from1", folder / f"{name}-1tofsdp2.pt")
        model, optim, at = start("fsdp2", seed=0)
        train(model, optim, kind(0), at, 0, STEPS // 2)
        checkpoint = folder / f"{name}-from2"
        save_model_and_optim_state(checkpoint, model, optim, flatten_optimizer_state=True)
    else:
        for label in ("fsdp4", "hsdp2x2"):
            if f"2to{label}" in variant.routes:
                checkpoint, end = folder / f"{name}-from2", folder / f"{name}-2to{label}.pt"
                finish(label, checkpoint, end, LATER if "4to1" in variant.routes else STEPS)


@contextmanager
def counted() -> Iterator[Dict[str, float]]:
    """Bytes that this rank sends to others, reductions and broadcasts as rings do them."""
    sent = {"bytes": 0.0}
    originals = dist.all_to_all_single, dist.all_reduce, dist.broadcast

    def all_to_all(output: Any, input: Any, coming: Any, splits: Any, *args: Any, **more: Any):
        group = more.get("group", args[0] if args else None)
        me = dist.get_rank(group)
        sent["bytes"] += sum(n for i, n in enumerate(splits) if i != me) * input.itemsize
        return originals[0](output, input, coming, splits, *args, **more)

    def all_reduce(tensor: Any, *args: Any, **more: Any):
        size = dist.get_world_size(more.get("group"))
        sent["bytes"] += 2 * (size - 1) / size * tensor.nbytes
        return originals[1](tensor, *args, **more)

    def broadcast(tensor: Any, source: int, *args: Any, **more: Any):
        size = dist.get_world_size(more.get("group"))
        sent["bytes"] += (size - 1) / size * tensor.nbytes  # all but one pass it on
        return originals[2](tensor, source, *args, **more)

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce  # type: ignore[assignment]
    dist.broadcast = broadcast  # type: ignore[assignment]
    yield sent
    dist.all_to_all_single, dist.all_reduce, dist.broadcast = originals


def note_computed(optim: Any) -> List[str]:
    """The names of the whole matrices that this rank computes from now on."""
    computed: List[str] = []
    if isinstance(optim, MatrixOptimizer):
        on_owner = optim.on_owner

        def noting(group: Any, owned: Any) -> Any:
            computed.extend(owned.names)
            return on_owner(group, owned)

        optim.on_owner = noting  # type: ignore[method-assign]
    return computed


def factor_bytes(optim: Any) -> int:
    """Bytes of the state of whole matrices that this rank has."""
    return sum(
        optim.state[param][name].nbytes
        for param, plan in optim._plans.items()
        for name in plan.factors.names
    )


def count(folder: Path) -> None:
    """What each rank sends in a step, which matrices it computes, and how much of their state."""
    kind = LargeShapes
    found: Dict[str, Dict[str, List[Any]]] = {}
    for name, config in COUNTED.items():
        for label in ("fsdp4", "hsdp2x2", "ddp4"):
            shard = meshes(kind)[label]
            model, at = shard(kind(0)), places(kind, shard)
            # The gate would send a flag of its own.
            optim: Any = config.replace(skip_step=False).build(model)
            computed = note_computed(optim)
            train(model, optim, kind(0), at, 0, 1)  # the second step may do more than the first
            computed.clear()
            with counted() as sent:
                train(model, optim, kind(0), at, 1, 2)
            parts: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (sent["bytes"], computed, factor_bytes(optim)))
            found.setdefault(name, {})[label] = parts
    if dist.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(found))


def measure(folder: Path) -> None:
    """What a step allocates, with several buckets."""
    like: Any = LargeShapes(width=128)
    largest = max(param.nbytes for param in like.parameters())

    def build(label: str, config: Any = None) -> Any:
        model = meshes(LargeShapes)[label](LargeShapes(width=128))
        optim: Any = (config or MuonConfig()).build(model)
        optim.bucket_bytes = 2 * largest
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        take_step(optim)
        return optim

    peaks: Dict[str, Tuple[int, int]] = {}
    for name, config in WITH_WORK_SPACE.items():
        optim, shape = build("fsdp4", config), like.layers[0]["up"].weight.shape
        alone = torch.nn.Linear(shape[1], shape[0], bias=False)
        alone.weight.grad = torch.ones_like(alone.weight)
        alone_optim = config.build(alone)
        alone_optim.step()
        work_space = peak_bytes(alone_optim.step)
        with transfers_held_by_their_work(largest):
            peaks[name] = (peak_bytes(optim.step), work_space)

    optim = build("fsdp4")
    with transfers_held_by_their_work(largest):
        peak = peak_bytes(optim.step)
    (exchange,) = optim._exchanges.values()

    # Under DDP what rules for coordinates allocate for a moment is as large as a matrix here.
    buffers: List[Any] = []
    alive: List[int] = []
    start = BroadcastExchange.start

    def noting(self: BroadcastExchange, bucket: Any, buffer: torch.Tensor) -> Any:
        assert buffer.nbytes <= 2 * largest
        buffers.append(weakref.ref(buffer))
        alive.append(sum(buffer() is not None for buffer in buffers))
        return start(self, bucket, buffer)

    optim = build("ddp4")
    BroadcastExchange.start = noting  # type: ignore[method-assign]
    with transfers_held_by_their_work(largest):
        take_step(optim)
    BroadcastExchange.start = start  # type: ignore[method-assign]

    parts: List[Any] = [None] * dist.get_world_size()
    buckets = (optim.bucket_bytes, len(exchange.buckets), len(alive))
    dist.all_gather_object(parts, (peak, largest, *buckets, max(alive), peaks))
    if dist.get_rank() == 0:
        (folder / "memory.json").write_text(json.dumps(parts))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # each load of a checkpoint collects garbage, and modules are most of what it sees
    dist.init_process_group("gloo")
    done: List[Tuple[str, str, bool]] = []
    for variant in VARIANTS:
        if dist.get_world_size() == 2:
            run_alone(variant, folder / f"{variant.name}-alone.pt")
        for label, shard in meshes(variant.model).items():
            if not variant.everywhere and label not in ONE_OF_EACH:
                continue
            run(variant, shard, folder / f"{variant.name}-{label}.pt")
            done.append((variant.name, label, variant.bitwise))
        if variant.routes:
            resume(variant, folder)
            here = ("1",) if dist.get_world_size() == 2 else ("2",)
            ways = [way for way in variant.routes if way.startswith(here)]
            done += [(variant.name, way, variant.bitwise) for way in ways]
    for variant in BROKEN:
        label = f"fsdp{dist.get_world_size()}"
        run(variant, meshes(variant.model)[label], folder / f"{variant.name}-{label}.pt")
    if dist.get_world_size() == 4:
        count(folder)
        measure(folder)
    if dist.get_rank() == 0:
        path = folder / f"done{dist.get_world_size()}.json"
        path.write_text(json.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
