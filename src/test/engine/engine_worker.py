"""
What each of 4 ranks runs for the engine tests, as a script under torchrun: one group of processes
serves all cases. Ends at the first case that fails.
"""

import datetime
import math
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from olmo_optim_ext import Muon
from olmo_optim_ext.engine import placement
from olmo_optim_ext.engine.elementwise import ElementwiseOptimizer, ElementwiseRule, WholeSums
from olmo_optim_ext.engine.exchange import BroadcastExchange, Matrix, RowExchange
from olmo_optim_ext.engine.factors import FactorPlan
from olmo_optim_ext.engine.gate import all_finite
from olmo_optim_ext.engine.layout import MatrixLayout
from olmo_optim_ext.engine.placement import (
    data_parallel_group,
    element_index,
    gather_whole,
    local_part,
    placing_of,
    sum_over_shards,
)
from olmo_optim_ext.engine.random import random_bits
from olmo_optim_ext.engine.thin import Thin, ThinExchange

R, S0, S1 = Replicate(), Shard(0), Shard(1)
STRIDED = _StridedShard(0, split_factor=2)

Order = Sequence[Tuple[int, int]]
"""Mesh dimension and tensor dimension of each division, the first one first."""

CASES: Dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


def chunk(x: torch.Tensor, size: int, rank: int, dim: int) -> torch.Tensor:
    chunks = torch.chunk(x, size, dim) if x.shape[dim] else (x,)
    return chunks[rank] if rank < len(chunks) else x.narrow(dim, 0, 0)


def divided(whole: torch.Tensor, mesh: DeviceMesh, order: Order) -> torch.Tensor:
    """This rank's part, by :func:`torch.chunk`, which is how shardings are defined."""
    for mesh_dim, dim in order:
        whole = chunk(whole, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim), dim)
    return whole


def sharded(
    whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], order: Order
) -> DTensor:
    # A copy, because a step writes into it.
    local = divided(whole, mesh, order).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def meshes() -> Tuple[DeviceMesh, DeviceMesh]:
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    return flat, init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


FLAT, GRID = 0, 1

SHARDINGS: Dict[str, Tuple[int, List[Placement], Order]] = {
    "replicated": (FLAT, [R], []),
    "fsdp": (FLAT, [S0], [(0, 0)]),
    "columns": (FLAT, [S1], [(0, 1)]),
    "hsdp": (GRID, [R, S0], [(1, 0)]),
    "outer": (GRID, [S0, R], [(0, 0)]),
    "rows and columns": (GRID, [S0, S1], [(0, 0), (1, 1)]),
    "columns and rows": (GRID, [S1, S0], [(0, 1), (1, 0)]),
    "rows twice": (GRID, [S0, S0], [(0, 0), (1, 0)]),
    "tensor parallel": (GRID, [STRIDED, S0], [(1, 0), (0, 0)]),
}


def whole_numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).view(shape)


# Exchange


def matrix_of(item: int, rows: int, cols: int) -> torch.Tensor:
    return 1000.0 * item + whole_numbers(rows, cols)


@case
def rows_travel_to_owners_and_back(folder: Path) -> None:
    flat, grid = meshes()
    for group in (dist.group.WORLD, flat.get_group(), grid.get_group(0), grid.get_group(1)):
        assert group is not None
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        # Uneven, on one rank only, empty, and owned by ranks without rows.
        rows_on = [(3, 2, 2, 1), (0, 4, 0, 1), (5, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 0)] * 2
        matrices = [
            Matrix(cols=2 + i % 3, rows_on=rows[:size], owner=(3 * i) % size)
            for i, rows in enumerate(rows_on)
        ]
        whole = [matrix_of(i, sum(m.rows_on), m.cols) for i, m in enumerate(matrices)]
        shards = [x.split(m.rows_on)[rank] for x, m in zip(whole, matrices)]
        like = torch.empty(0)
        for cap in (1, 100, 300, 2**20):
            exchange = RowExchange(matrices, group, like.itemsize, bucket_bytes=cap)
            # All buckets are under way at once: a message must not reach another one's buffer.
            gathers = [exchange.start_gather(b, shards.__getitem__, like) for b in exchange.buckets]
            scatters = []
            for bucket, gather in zip(exchange.buckets, gathers):
                buffer = gather.wait()
                for i in bucket[rank]:
                    assert torch.equal(exchange.whole(bucket, i, buffer), whole[i])
                for i in bucket[rank]:
                    exchange.replace(bucket, i, buffer, -exchange.whole(bucket, i, buffer))
                scatters.append(exchange.start_scatter(bucket, buffer))
            results: Dict[int, torch.Tensor] = {}
            for bucket, scatter in zip(exchange.buckets, scatters):
                results.update(exchange.shards(bucket, scatter.wait()))
                assert scatter.sent is None
            assert sorted(results) == list(range(len(matrices)))
            for i, result in results.items():
                assert torch.equal(result, -shards[i]), (i, cap)


@case
def buckets_of_a_step_do_not_mix(folder: Path) -> None:
    shapes = [(8, 8), (7, 3), (4, 12), (5, 2), (9, 4)] * 3
    flat, _ = meshes()
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]

    def train(params: List[nn.Parameter], shard: Callable[[torch.Tensor], torch.Tensor]) -> Muon:
        optim = Muon([{"params": params, "algorithm": "muon"}], lr=0.1)
        for its_grads in grads:
            for param, grad in zip(params, its_grads):
                param.grad = shard(grad)
            optim.step()
        return optim

    whole = [nn.Parameter(x.clone()) for x in start]
    train(whole, lambda x: x)
    for cap in (1, 600, 2**20):
        Muon.bucket_bytes = cap
        params = [nn.Parameter(sharded(x, flat, [S0], [(0, 0)])) for x in start]
        optim = train(params, lambda x: sharded(x, flat, [S0], [(0, 0)]))
        (exchange,) = optim._exchanges.values()
        assert (len(exchange.buckets) > 1) == (cap < 2**20)
        for param, expected in zip(params, whole):
            data = param.data
            assert isinstance(data, DTensor)
            assert torch.equal(data.full_tensor(), expected)


@case
def results_of_all_owners_reach_all_ranks(folder: Path) -> None:
    flat, grid = meshes()
    for group in (flat.get_group(), grid.get_group(0), grid.get_group(1)):
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        numels = [7, 1, 30, 0, 12, 12, 5]
        for owners in ([i % size for i in range(7)], [size - 1] * 7, [0, 1, 1, 1, 0, 0, 1]):
            for cap in (1, 200, 2**20):
                exchange = BroadcastExchange(numels, owners, group, 4, bucket_bytes=cap)
                under_way = []
                for bucket in exchange.buckets:
                    n = sum(numels[i] for items in bucket for i in items)
                    buffer = torch.full((n,), math.nan)
                    results = exchange.results(bucket, buffer)
                    for i in bucket[rank]:
                        results[i].copy_(matrix_of(i, 1, numels[i])[0])
                    under_way.append((bucket, exchange.start(bucket, buffer)))
                seen = []
                for bucket, broadcast in under_way:
                    for i, result in exchange.results(bucket, broadcast.wait()).items():
                        assert torch.equal(result, matrix_of(i, 1, numels[i])[0])
                        seen.append(i)
                assert sorted(seen) == list(range(7))


# Placement


@case
def rows_are_where_the_placing_says(folder: Path) -> None:
    both = meshes()
    layouts = [
        ((8, 3), MatrixLayout.whole((8, 3))),
        ((9, 3), MatrixLayout.whole((9, 3))),
        ((3, 2), MatrixLayout.whole((3, 2))),
        ((6, 2, 3), MatrixLayout.whole((6, 2, 3))),
        ((4, 3, 2), MatrixLayout.stacked((4, 3, 2), 4)),
        ((6, 3, 2), MatrixLayout.stacked((6, 3, 2), 6)),
        ((12, 2), MatrixLayout.stacked((12, 2), 4)),
        ((12, 2), MatrixLayout.stacked((12, 2), 3)),
    ]
    by_rows = 0
    for which, placements, order in SHARDINGS.values():
        mesh = both[which]
        for shape, layout in layouts:
            # Each element has the number of its row in the two-dimensional view.
            whole = torch.arange(layout.rows).unsqueeze(1).expand(layout.rows, layout.cols)
            param = sharded(whole.reshape(shape), mesh, placements, order)
            placing = placing_of(param, layout)
            if placing.path != placement.Path.rows:
                continue
            by_rows += 1
            assert placing.group is not None
            rank = dist.get_rank(placing.group)
            first = placing.first_row + sum(placing.rows_of[:rank])
            rows = param.to_local().reshape(-1, layout.cols)[:, 0]
            assert rows.tolist() == list(range(first, first + placing.rows_of[rank]))
    assert by_rows > 3 * len(layouts)  # FSDP, HSDP, the outer one; and nested experts


@case
def element_index_is_that_of_the_whole(folder: Path) -> None:
    both = meshes()
    scattered = {"columns", "rows and columns", "columns and rows"}
    for name, (which, placements, order) in SHARDINGS.items():
        for shape in ((8, 4), (9, 5), (2, 3), (5, 1), (6, 3, 2), (7, 2, 3)):
            whole = whole_numbers(*shape)
            param = sharded(whole, both[which], placements, order)
            expected = param.to_local().reshape(-1)
            index = element_index(param)
            assert index.dtype == torch.int64
            assert index.ndim == 0 or name in scattered, name
            if index.ndim == 0:
                index = index + torch.arange(expected.numel())
            assert torch.equal(index, expected), (name, shape, index, expected)
            bits = random_bits(index, torch.tensor(7))
            assert torch.equal(bits, random_bits(whole.view(-1), torch.tensor(7))[expected])


class OneWeight(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


@case
def element_index_is_that_of_parameters_under_fsdp(folder: Path) -> None:
    flat, grid = meshes()
    for shape in ((8, 4), (12, 3), (9, 5), (10, 2), (3, 2)):
        whole = whole_numbers(*shape).double()
        tensor_parallel = distribute_tensor(whole, grid["inner"], [S0])
        for mesh, weight in ((flat, whole), (grid["outer"], tensor_parallel)):
            model = OneWeight(weight.clone())
            fully_shard(model, mesh=mesh)
            (param,) = model.parameters()
            assert isinstance(param, DTensor)
            expected = param.to_local().reshape(-1).long()
            index = element_index(param)
            if index.ndim == 0:
                index = index + torch.arange(expected.numel())
            assert torch.equal(index, expected), (shape, param.placements, index, expected)


@case
def whole_and_part_are_inverse(folder: Path) -> None:
    both = meshes()
    for name, (which, placements, order) in SHARDINGS.items():
        for shape in ((8, 4), (9, 5), (2, 3)):
            whole = whole_numbers(*shape)
            param = sharded(whole, both[which], placements, order)
            # What travels need not have the dtype of the parameter.
            gathered = gather_whole(param.to_local().float() + 0.5, param)
            assert torch.equal(gathered, whole + 0.5), name
            assert torch.equal(local_part(whole, param), param.to_local()), name


@case
def sums_count_each_shard_once(folder: Path) -> None:
    both = meshes()
    reduces = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduces.append(tensor.shape)
        return all_reduce(tensor, *args, **kwargs)

    params: List[torch.Tensor] = [torch.zeros(3)]
    local = [torch.tensor([dist.get_rank(), 1.0], dtype=torch.float64)]
    expected = local.copy()  # of a plain parameter it is what this rank has
    for shape in ((8, 4), (9, 5), (3, 2)):
        whole = whole_numbers(*shape).double()
        for which, placements, order in SHARDINGS.values():
            param = sharded(whole, both[which], placements, order)
            params.append(param)
            part = param.to_local()
            local.append(torch.stack([part.sum(), part.square().sum()]))
            expected.append(torch.stack([whole.sum(), whole.square().sum()]))
    given = torch.stack(local)
    placement.dist.all_reduce = counted
    try:
        got = sum_over_shards(params, given)
    finally:
        placement.dist.all_reduce = all_reduce
    assert torch.equal(got, torch.stack(expected))
    assert torch.equal(given, torch.stack(local))
    # One for the world, one for each dimension alone, and the four nested ones together two each.
    assert len(reduces) <= 1 + 1 + 1 + 2 + 2, reduces
    assert torch.equal(sum_over_shards(params[:1], given[:1]), given[:1])


@case
def data_parallel_group_is_read_from_the_model(folder: Path) -> None:
    flat, grid = meshes()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    def ranks(model: nn.Module) -> List[int]:
        group = data_parallel_group(model)
        assert group is not None
        return dist.get_process_group_ranks(group)

    assert data_parallel_group(model()) is None
    sharded_model = model()
    fully_shard(sharded_model, mesh=flat)
    assert data_parallel_group(sharded_model) is None
    everyone, some = [0, 1, 2, 3], dist.get_process_group_ranks(grid.get_group(0))
    assert len(some) == 2
    assert ranks(DistributedDataParallel(model())) == everyone
    assert ranks(DistributedDataParallel(model(), process_group=grid.get_group(0))) == some
    for replicas, expected in (
        (replicate(model()), everyone),
        (replicate(model(), device_mesh=flat), everyone),
        (replicate(model(), device_mesh=grid["outer"]), some),
    ):
        assert ranks(replicas) == expected
        replicas(torch.ones(1, 3)).sum().backward()
        assert ranks(replicas) == expected


# Gate


@case
def all_ranks_agree_on_what_is_finite(folder: Path) -> None:
    flat, grid = meshes()
    me = dist.get_rank()
    weights: Dict[str, List[torch.Tensor]] = {}
    for name, (which, placements, order) in SHARDINGS.items():
        param = sharded(torch.zeros(8, 4), (flat, grid)[which], placements, order)
        weights[name] = [param]
    weights["two meshes"] = [
        sharded(torch.zeros(8, 4), grid["inner"], [S0], [(0, 0)]),
        sharded(torch.zeros(8, 4), grid["outer"], [S0], [(0, 0)]),
    ]
    weights["with a plain one"] = [torch.zeros(2), *weights["fsdp"]]
    for name, params in weights.items():
        for guilty in (None, 0, 1, 2, 3):
            for which in range(len(params)):
                grads = [
                    torch.ones_like(p.to_local() if isinstance(p, DTensor) else p) for p in params
                ]
                if me == guilty:
                    grads[which].view(-1)[-1] = math.nan
                finite = all_finite(params, grads)
                assert finite.dtype == torch.bool and finite.shape == ()
                assert finite.item() == (guilty is None), (name, guilty, which)


# Factors

SHAPES: List[Mapping[str, Tuple[int, ...]]] = [
    {"left": (3, 3), "right": (2, 2)},
    {"left": (5, 5)},
    {"right": (4, 1), "few": (2,)},
    {},
    {"left": (0, 0), "right": (2, 2)},
    {"left": (2, 2), "right": (1, 1), "few": (1,)},
]
"""Some matrices have no factor of a name; of ``few`` there are fewer elements than ranks."""


def factor(name: str, matrix: int, shape: Tuple[int, ...]) -> torch.Tensor:
    """Not a number that bfloat16 has."""
    start = 100 * matrix + 1000 * len(name)
    return start + 1 / 3 + whole_numbers(*shape).float()


def fill(plan: FactorPlan, held: Mapping[str, torch.Tensor], matrices: Sequence[int]) -> None:
    for matrix in matrices:
        for name, view in plan.views(held, matrix).items():
            view.copy_(factor(name, matrix, plan.shapes[matrix][name]))


def assert_filled(
    plan: FactorPlan, held: Mapping[str, torch.Tensor], matrices: Sequence[int]
) -> None:
    for matrix in matrices:
        for name, view in plan.views(held, matrix).items():
            assert torch.equal(view, factor(name, matrix, plan.shapes[matrix][name]))


def new(plan: FactorPlan) -> Dict[str, torch.Tensor]:
    return {name: plan.new(name, torch.float32, torch.device("cpu")) for name in plan.names}


@case
def factors_survive_a_change_of_owners(folder: Path) -> None:
    flat, grid = meshes()
    checkpoint: Dict[str, torch.Tensor] = {}
    for mesh, dim, placements in ((grid, 1, [R, S0]), (grid, 0, [S0, R]), (flat, 0, [S0])):
        group = mesh.get_group(dim)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        param = sharded(torch.zeros(9, 2).bfloat16(), mesh, placements, [(dim, 0)])
        for owners in ([3, 0, 0, 1, 3, 0], [2] * 6, [0, 1, 2, 3, 0, 1]):
            owners = [owner % size for owner in owners]
            plan = FactorPlan(SHAPES, owners, group)
            held = new(plan)
            fill(plan, held, [i for i in range(6) if owners[i] == rank])
            assert all(
                held[n].numel()
                == sum(
                    math.prod(shapes[n])
                    for shapes, owner in zip(SHAPES, owners)
                    if n in shapes and owner == rank
                )
                for n in plan.names
            )
            for name in plan.names:
                saved = plan.to_checkpoint(param, name, held[name])
                assert isinstance(saved, DTensor) and saved.dtype == torch.float32
                assert saved.shape == (plan.numel(name),)
                whole = torch.cat(
                    [factor(name, i, s[name]).view(-1) for i, s in enumerate(SHAPES) if name in s]
                )
                assert torch.equal(saved.full_tensor(), whole)
                # Evenly: as DTensor itself would shard it.
                local = chunk(whole, size, rank, 0)
                assert torch.equal(saved.to_local(), local)
                checkpoint[name] = saved
                for others in ([0, 3, 1, 1, 2, 3], [1] * 6):
                    others = [owner % size for owner in others]
                    other = FactorPlan(SHAPES, others, group)
                    mine = [i for i in range(6) if others[i] == rank]
                    for source in (saved, whole, whole.double()):
                        read = new(other)
                        for each in other.names:
                            if each != name:  # only this name is read
                                fill(other, read, mine)
                                read[name].zero_()
                        other.from_checkpoint(name, read[name], source)
                        assert read[name].dtype == torch.float32
                        assert_filled(other, read, mine)
                unshared = FactorPlan(SHAPES)
                held_alone = new(unshared)[name]
                unshared.from_checkpoint(name, held_alone, saved)
                assert torch.equal(held_alone, whole)
    dcp.save(checkpoint, checkpoint_id=folder / "factors")


@case
def factors_shared_by_rows_survive_a_change_of_ranks(folder: Path) -> None:
    """Some by rows, uneven and empty, some with owners; over one and over two dimensions."""
    shapes = [{"rows": (7, 3), "left": (2, 2)}, {"rows": (2, 3)}, {"rows": (5, 3), "left": (3, 1)}]
    rows_on = [[3, 0, 2, 2], [0, 2, 0, 0], [1, 1, 1, 2]]
    flat, grid = meshes()
    rank, group = dist.get_rank(), dist.group.WORLD
    other_rows = [[7, 0, 0, 0], [0, 0, 1, 1], [2, 0, 0, 3]]
    for mesh, placements, places in (
        (flat, [S0], ()),
        (grid, [S0, S0], [[(2, i), (2, j)] for i in range(2) for j in range(2)]),
    ):
        order = [(dim, 0) for dim in range(mesh.ndim)]
        param = sharded(torch.zeros(9, 2), mesh, placements, order)
        plan = FactorPlan(shapes, [1, 3, 1], group, {"rows": rows_on}, places)
        held = new(plan)
        for matrix in range(3):
            for name, view in plan.views(held, matrix).items():
                whole = factor(name, matrix, shapes[matrix][name])
                part = plan.held_part(name, matrix, whole)
                assert part.shape == view.shape
                if name == "rows":
                    first = sum(rows_on[matrix][:rank])
                    assert torch.equal(part, whole[first : first + rows_on[matrix][rank]])
                else:
                    assert plan.owners[matrix] == rank and torch.equal(part, whole)
                view.copy_(part)
        for name in plan.names:
            saved = plan.to_checkpoint(param, name, held[name])
            everything = [
                factor(name, i, s[name]).view(-1) for i, s in enumerate(shapes) if name in s
            ]
            assert isinstance(saved, DTensor)
            assert torch.equal(saved.full_tensor(), torch.cat(everything))
            other = FactorPlan(shapes, [0, 2, 3], group, {"rows": other_rows}, places)
            read = new(other)
            other.from_checkpoint(name, read[name], saved)
            for matrix, its in enumerate(shapes):
                views = other.views(read, matrix)
                if name in views:
                    whole = factor(name, matrix, its[name])
                    assert torch.equal(views[name], other.held_part(name, matrix, whole))


@case
def thin_factors_are_summed_and_spread(folder: Path) -> None:
    """Rows that overlap, that nobody has, and that all need; several owners, one with none."""
    rank, like = dist.get_rank(), torch.zeros(0)
    sources = [
        [(0, 4), (4, 7), (7, 7), (7, 9)],
        [(0, 5), (0, 5), (0, 0), (1, 3)],
        [(0, 0), (2, 3), (0, 0), (0, 0)],
    ]
    targets = [
        [(0, 9), (0, 9), (0, 9), (0, 9)],
        [(0, 0), (4, 5), (1, 3), (0, 5)],
        [(0, 3), (0, 0), (0, 3), (1, 2)],
    ]
    sizes = [(9, 2, 3), (5, 1, 0), (3, 4, 3)]
    factors = [Thin(*size, s, t) for size, s, t in zip(sizes, sources, targets)]

    def summand(i: int, rank: int) -> torch.Tensor:
        begin, end = sources[i][rank]
        return (whole_numbers(end - begin, sizes[i][1]) + 10 * i + rank).float()

    sums = []
    for i, (n_rows, n_cols, _) in enumerate(sizes):
        total = torch.zeros(n_rows, n_cols)
        for each in range(4):
            total[slice(*sources[i][each])] += summand(i, each)
        sums.append(total)
    assert dist.group.WORLD is not None
    exchange = ThinExchange(factors, dist.group.WORLD)
    owned = exchange.collect([summand(i, rank) for i in range(3)], like)
    assert set(owned) == {i for i, size in enumerate(sizes) if size[2] == rank}
    for i, total in owned.items():
        assert torch.equal(total, sums[i])
    received = exchange.spread(owned, like)
    for i, part in enumerate(received):
        assert torch.equal(part, sums[i][slice(*targets[i][rank])])


# Elementwise


def relative_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Any]:
    return (group["lr"], step)


def relative_sums(
    param: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    return grad.abs().sum(), (total + grad > 0).sum()


def relative_more(sums: Sequence[Any], numel: Any, scalars: Sequence[Any]) -> Tuple[Any, ...]:
    return sums[0] / numel, sums[1] * scalars[1]


def relative(
    param: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    lr, _, mean, positive = scalars.unbind()
    return lr * (grad / mean + positive), total + grad


class Relative(ElementwiseOptimizer):
    """Steps relative to the mean gradient of the whole parameter."""

    rule = ElementwiseRule(
        ("total",), relative_scalars, relative, WholeSums(relative_sums, relative_more)
    )

    def __init__(self, params: Any, **engine: Any):
        super().__init__(params, dict(lr=0.125, weight_decay=0.25), **engine)


@case
def sums_of_a_rule_are_over_the_whole_parameter(folder: Path) -> None:
    both = meshes()
    generator = torch.Generator().manual_seed(0)
    whole: List[nn.Parameter] = []
    params: List[nn.Parameter] = []
    for which, placements, order in SHARDINGS.values():
        for shape in ((8, 4), (9, 5), (2, 3)):
            # Whole numbers: their sums do not depend on the order.
            weight = torch.randint(-50, 50, shape, generator=generator).float()
            whole.append(nn.Parameter(weight))
            params.append(nn.Parameter(sharded(weight, both[which], placements, order)))
    # Two groups of different size, as scalars are put together over all groups.
    optims = [
        Relative([{"params": each[:7]}, {"params": each[7:], "lr": 0.5}])
        for each in (whole, params)
    ]
    for _ in range(3):
        for here, param in zip(whole, params):
            here.grad = torch.randint(-9, 9, here.shape, generator=generator).float()
            data = param.data
            assert isinstance(data, DTensor)
            param.grad = DTensor.from_local(
                local_part(here.grad, data).contiguous(),
                data.device_mesh,
                data.placements,
                run_check=False,
                shape=data.shape,
                stride=data.stride(),
            )
        for optim in optims:
            optim.step()
        for here, param in zip(whole, params):
            data = param.data
            assert isinstance(data, DTensor)
            assert torch.equal(local_part(here.detach(), data), data.to_local())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Ranks that wait for one that failed should not wait for long.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, function in CASES.items():
        function(folder)
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / f"{name}.passed").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
