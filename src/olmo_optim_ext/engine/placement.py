"""
Where the local part of a tensor lies in the whole, and sums over the parts.
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoError
from torch.distributed._composable.contract import _get_registry
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from .layout import MatrixLayout

__all__ = [
    "Groups",
    "Path",
    "Placing",
    "add_over_shards",
    "data_parallel_group",
    "element_index",
    "gather_whole",
    "local_part",
    "local_ranges",
    "placing_of",
    "ranges_at",
    "row_range",
    "sharding_dims",
    "sharding_group",
    "sum_over_shards",
]


class Path(StrEnum):
    """How a rule that needs the whole matrix gets it."""

    local = "local"
    """The whole matrix is on this rank."""

    rows = "rows"
    """Rows are shared by the ranks of a group: two all-to-alls, each matrix computed once."""

    broadcast = "broadcast"
    """All ranks of a group have the whole matrix: each matrix computed once, its update sent."""

    redistribute = "redistribute"
    """Any other sharding: DTensor gathers the matrix on every rank, which all compute it."""

    thin = "thin"
    """Any sharding: parts stay where they are, thin factors travel to an owner and back."""


@dataclass(frozen=True)
class Placing:
    """Which rows of a parameter, seen as ``(rows, cols)``, the ranks of a group share."""

    path: Path
    group: Optional[dist.ProcessGroup] = None
    """For :data:`Path.rows`, :data:`Path.broadcast` and :data:`Path.thin`."""

    first_row: int = 0
    """Of the rows that the group has."""

    rows_of: Tuple[int, ...] = ()
    """How many of these rows each rank of the group holds, in the order of ranks."""


def placing_of(
    param: torch.Tensor,
    layout: MatrixLayout,
    replicas: Optional[dist.ProcessGroup] = None,
    nested: bool = True,
) -> Placing:
    """
    Where the rows of a parameter are, read from its mesh and placements.

    :param replicas: The ranks that hold plain parameters alike and share the work on them.
    :param nested: Whether a group may have a part of the rows, as the experts of one rank of
        expert parallelism are, when nobody else needs these.
    """
    dims = sharding_dims(param)
    if not dims:
        shared = not isinstance(param, DTensor) and replicas is not None
        if shared and dist.get_world_size(replicas) > 1:
            return Placing(Path.broadcast, replicas)
        return Placing(Path.local)
    assert isinstance(param, DTensor)
    mesh, n = param.device_mesh, param.shape[0]
    per_index = layout.rows // n if n else 0  # rows of the view for an index of dimension 0
    first, inner = 0, dims[0]
    if len(dims) == 2 and nested:
        # The outer dimension is divided first: the left one, unless that one is strided.
        strided = type(param.placements[dims[0]]) is _StridedShard
        outer, inner = (dims[1], dims[0]) if strided else (dims[0], dims[1])
        kinds = (Shard, _StridedShard if strided else Shard)
        placements = (param.placements[outer], param.placements[inner])
        by_rows = all(type(p) is kind and p.dim == 0 for p, kind in zip(placements, kinds))
        borders = {block.first_row for block in layout.blocks()}
        n //= mesh.size(outer)
        parts = range(mesh.size(outer))
        if not by_rows or n * len(parts) != param.shape[0]:
            return Placing(Path.redistribute)
        if any(i * n * per_index not in borders for i in parts):
            return Placing(Path.redistribute)
        first = mesh.get_local_rank(outer) * n * per_index
    elif len(dims) > 1:
        return Placing(Path.redistribute)
    elif type(placement := param.placements[inner]) is not Shard or placement.dim != 0:
        # type() rather than isinstance(): _StridedShard has another order of rows.
        return Placing(Path.redistribute)
    size = mesh.size(inner)
    rows_of = tuple(row_range(n, size, rank)[1] * per_index for rank in range(size))
    return Placing(Path.rows, mesh.get_group(inner), first, rows_of)


def data_parallel_group(model: nn.Module) -> Optional[dist.ProcessGroup]:
    """The ranks among which DDP, or ``replicate`` as OLMo-core applies it, shares a model."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    if "replicate" not in (_get_registry(model) or {}):
        return None
    state = replicate.state(model)
    if state.has_initialized:
        return state._ddp.process_group
    mesh = state._init_kwargs.get("device_mesh")  # it makes its DDP at the first forward pass
    return dist.group.WORLD if mesh is None else mesh.get_group()


def gather_whole(local: torch.Tensor, param: DTensor) -> torch.Tensor:
    """The whole tensor of which ``local`` is this rank's part under the sharding of ``param``."""
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    ).full_tensor()


def local_part(whole: torch.Tensor, param: DTensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has whole, under the sharding of ``param``."""
    # DTensor itself cannot redistribute to uneven strided shards, which TP x FSDP makes.
    for dim, (first, n) in enumerate(local_ranges(param)):
        whole = whole.narrow(dim, first, n)
    return whole.contiguous()


def local_ranges(param: torch.Tensor) -> List[Tuple[int, int]]:
    """
    For each dimension of a parameter the first index that this rank has, and how many.

    :raises OLMoError: If its sharding is none of FSDP, HSDP, tensor and expert parallelism.
    """
    if not isinstance(param, DTensor):
        return [(0, n) for n in param.shape]
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    ranges = ranges_at(param, coordinate)
    shape = tuple(n for _, n in ranges)
    if shape != tuple(param.to_local().shape):
        raise OLMoError(
            f"a parameter of shape {tuple(param.shape)} with placements {param.placements} has the "
            f"local shape {tuple(param.to_local().shape)}, expected is {shape}"
        )
    return ranges


def ranges_at(param: DTensor, coordinate: Sequence[int]) -> List[Tuple[int, int]]:
    """As :func:`local_ranges`, for the rank at a coordinate of the mesh."""
    ranges = [(0, n) for n in param.shape]
    mesh, placements = param.device_mesh, param.placements
    # What is strided was divided last, whatever its place in the mesh.
    for dim in sorted(sharding_dims(param), key=lambda d: type(placements[d]) is _StridedShard):
        placement = placements[dim]
        if not isinstance(placement, (Shard, _StridedShard)):
            raise OLMoError(f"a parameter has the placement {placement}, known are shards")
        first, n = ranges[placement.dim]
        offset, n = row_range(n, mesh.size(dim), coordinate[dim])
        ranges[placement.dim] = (first + offset, n)
    return ranges


Groups = Dict[Tuple[DeviceMesh, Tuple[int, ...]], dist.ProcessGroup]


def sharding_group(param: torch.Tensor, known: Groups) -> Optional[dist.ProcessGroup]:
    """
    The ranks that together have a parameter; ``None`` if each has all of it. Called on all of them
    in the same order, as it may have to make the group.

    :param known: Groups that were made before; a new one is added.
    """
    dims = tuple(sharding_dims(param))
    if not dims:
        return None
    assert isinstance(param, DTensor)
    mesh = param.device_mesh
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if (mesh, dims) not in known:
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        at = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
        ranks = mesh.mesh[at].flatten().tolist()
        known[mesh, dims] = dist.new_group(ranks, use_local_synchronization=True)
    return known[mesh, dims]


def sharding_dims(param: torch.Tensor) -> List[int]:
    """The mesh dimensions over which a parameter is divided."""
    if not isinstance(param, DTensor):
        return []
    return [
        dim
        for dim, placement in enumerate(param.placements)
        if param.device_mesh.size(dim) > 1 and not isinstance(placement, Replicate)
    ]


def row_range(n_rows: int, size: int, rank: int) -> Tuple[int, int]:
    """First row and number of rows that ``Shard(0)`` over ``size`` ranks gives to a rank."""
    n, first = Shard.local_shard_size_and_offset(n_rows, size, rank)
    return int(first), int(n)


def element_index(param: torch.Tensor) -> torch.Tensor:
    """
    The places of the local elements in the whole parameter, in row-major order, int64: for
    consecutive elements only that of the first, 0-d, else all of them, flat.
    """
    ranges = local_ranges(param)
    if all(n == whole for (_, n), whole in zip(ranges[1:], param.shape[1:])):
        start = ranges[0][0] * math.prod(param.shape[1:]) if ranges else 0
        return torch.full((), start, dtype=torch.int64, device=param.device)
    index = torch.zeros((), dtype=torch.int64, device=param.device)
    for (first, n), size in zip(ranges, param.shape):
        index = index.unsqueeze(-1) * size + torch.arange(first, first + n, device=param.device)
    return index.reshape(-1)


def sum_over_shards(params: Sequence[torch.Tensor], local: torch.Tensor) -> torch.Tensor:
    """
    Sums over whole parameters.

    :param local: For each parameter the sums over its local part, ``(n, r)``.

    :returns: Shape ``(n, r)``, with one all-reduce for all parameters that are sharded alike.
    """
    return torch.stack(add_over_shards(params, local.unbind()))


def add_over_shards(
    params: Sequence[torch.Tensor], local: Sequence[torch.Tensor]
) -> List[torch.Tensor]:
    """
    As :func:`sum_over_shards`, for numbers of which each parameter has its own count.

    :param local: For each parameter a vector, of one dtype; on all ranks of the same length.
    """
    alike: Dict[Tuple[dist.ProcessGroup, ...], List[int]] = {}
    for i, param in enumerate(params):
        groups = tuple(
            param.device_mesh.get_group(dim)
            for dim in sharding_dims(param)
            if isinstance(param, DTensor)
        )
        alike.setdefault(groups, []).append(i)
    out = list(local)
    for groups, indices in alike.items():
        if not groups:
            continue
        total = torch.cat([local[i] for i in indices])
        for group in groups:
            dist.all_reduce(total, group=group)
        for i, part in zip(indices, total.split([local[i].numel() for i in indices])):
            out[i] = part
    return out
