from pathlib import Path as FilePath
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import pytest
import torch
import torch.distributed as dist
from olmo_core.exceptions import OLMoError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from olmo_optim_ext.engine.layout import MatrixLayout
from olmo_optim_ext.engine.placement import (
    Path,
    Placing,
    data_parallel_group,
    element_index,
    local_ranges,
    placing_of,
    row_range,
    sharding_dims,
    sum_over_shards,
)

MATRIX = MatrixLayout.whole((8, 8))
R, S0, S1 = Replicate(), Shard(0), Shard(1)
STRIDED = _StridedShard(0, split_factor=2)


@pytest.fixture(params=[0, 3], ids=["rank0", "rank3"])
def fake_rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A rank of four, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


def mesh_of(grid: Tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", grid, mesh_dim_names=("outer", "inner")[: len(grid)])


def placed(mesh: DeviceMesh, placements: Sequence[Placement], *shape: int) -> DTensor:
    """Only metadata: nobody looks at the local part, which is that of no division by columns."""
    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    n = shape[0]
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard) and placement.dim == 0:
            n = row_range(n, mesh.size(dim), mesh.get_local_rank(dim))[1]
    local = torch.zeros(1).expand(n, *shape[1:])
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


# Paths


@pytest.mark.parametrize("nested", [True, False])
def test_a_plain_tensor_is_local(nested: bool):
    for param in (torch.zeros(8, 8), torch.nn.Parameter(torch.zeros(8, 8))):
        assert placing_of(param, MATRIX, nested=nested) == Placing(Path.local)


@pytest.mark.parametrize(
    "grid,placements,path,group_dim",
    [
        ((4,), [S0], Path.rows, 0),
        ((4,), [R], Path.local, None),
        ((4,), [S1], Path.redistribute, None),
        ((2, 2), [R, S0], Path.rows, 1),
        ((2, 2), [S0, R], Path.rows, 0),
        ((2, 2), [R, R], Path.local, None),
        ((2, 2), [S0, S0], Path.redistribute, None),
        ((2, 2), [S0, S1], Path.redistribute, None),
        ((2, 2), [S1, S0], Path.redistribute, None),
        ((2, 2), [R, S1], Path.redistribute, None),
        ((2, 2), [Partial(), S0], Path.redistribute, None),
        ((2, 2), [R, STRIDED], Path.redistribute, None),
        ((2, 2), [STRIDED, S0], Path.redistribute, None),
        ((2, 2), [STRIDED, S1], Path.redistribute, None),
        ((4, 1), [S0, S1], Path.rows, 0),
        ((1, 4), [S0, S0], Path.rows, 1),
        ((4, 1), [R, S0], Path.local, None),
    ],
    ids=str,
)
def test_path_is_read_from_mesh_and_placements(
    grid: Tuple[int, ...],
    placements: List[Placement],
    path: Path,
    group_dim: Optional[int],
    fake_rank: int,
):
    mesh = mesh_of(grid)
    placing = placing_of(placed(mesh, placements, 8, 8), MATRIX)
    assert placing.path == path
    assert placing.group == (None if group_dim is None else mesh.get_group(group_dim))
    if path == Path.rows:
        assert placing.first_row == 0
        assert placing.rows_of == ((2,) * 4 if mesh.size(group_dim) == 4 else (4, 4))
    else:
        assert placing == Placing(path)


@pytest.mark.parametrize("rows", range(10))
def test_rows_of_the_ranks_are_those_of_chunk(rows: int, fake_rank: int):
    param = placed(mesh_of((4,)), [S0], rows, 3)
    chunks = [len(x) for x in torch.chunk(torch.empty(rows), 4)] if rows else []
    expected = tuple(chunks + [0] * (4 - len(chunks)))
    assert placing_of(param, MatrixLayout.whole((rows, 3))).rows_of == expected
    firsts = [row_range(rows, 4, rank) for rank in range(4)]
    assert tuple(n for _, n in firsts) == expected
    assert [first for first, _ in firsts] == [sum(expected[:rank]) for rank in range(4)]


def test_rows_of_stacks_count_those_of_each_matrix(fake_rank: int):
    experts = placed(mesh_of((4,)), [S0], 6, 3, 2)
    placing = placing_of(experts, MatrixLayout.stacked((6, 3, 2), 6))
    assert (placing.path, placing.first_row, placing.rows_of) == (Path.rows, 0, (6, 6, 6, 0))
    # Trailing dimensions of a convolution are columns instead.
    kernel = placed(mesh_of((4,)), [S0], 6, 3, 2)
    assert placing_of(kernel, MatrixLayout.whole((6, 3, 2))).rows_of == (2, 2, 2, 0)


def test_expert_parallelism_alone_shares_rows(fake_rank: int):
    mesh = mesh_of((2, 2))
    param = placed(mesh, [R, S0], 4, 3, 2)
    placing = placing_of(param, MatrixLayout.stacked((4, 3, 2), 4))
    assert placing == Placing(Path.rows, mesh.get_group(1), 0, (6, 6))


NESTED = [
    # Shape, how many matrices are on top of each other, and rows of each rank of a group.
    pytest.param((4, 3, 2), 4, (3, 3), id="two experts each"),
    pytest.param((6, 3, 2), 6, (6, 3), id="three experts each"),
    pytest.param((2, 3, 2), 2, (3, 0), id="one expert each"),
    pytest.param((12, 2), 4, (3, 3), id="flat stack"),
    pytest.param((12, 2), 2, (3, 3), id="flat stack, experts cut by the inner one"),
]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape,n,rows_of", NESTED)
def test_experts_that_only_one_group_has_are_its_rows(
    shape: Tuple[int, ...], n: int, rows_of: Tuple[int, ...], strided: bool, fake_rank: int
):
    mesh = mesh_of((2, 2))
    param = placed(mesh, [STRIDED, S0] if strided else [S0, S0], *shape)
    layout = MatrixLayout.stacked(shape, n)
    # On the strided mesh dimension the group of the left one shares, else that of the right one.
    group = mesh.get_group(0 if strided else 1)
    first = layout.rows // 2 if fake_rank == 3 else 0
    assert placing_of(param, layout) == Placing(Path.rows, group, first, rows_of)
    assert placing_of(param, layout, nested=False) == Placing(Path.redistribute)


@pytest.mark.parametrize(
    "placements,shape,n",
    [
        ([S0, S0], (12, 2), 3),
        ([STRIDED, S0], (12, 2), 3),
        ([S0, S0], (12, 2), 1),
        ([S0, S0], (5, 3, 2), 5),  # uneven: the halves are not the same for both
        ([STRIDED, S0], (5, 3, 2), 5),
        ([S0, S1], (4, 3, 2), 4),
        ([S1, S0], (4, 3, 2), 4),
        ([STRIDED, S1], (4, 3, 2), 4),
        ([S1, STRIDED], (4, 3, 2), 4),
        ([STRIDED, STRIDED], (4, 3, 2), 4),
    ],
    ids=str,
)
def test_matrices_that_several_groups_share_are_redistributed(
    placements: List[Placement], shape: Tuple[int, ...], n: int, fake_rank: int
):
    param = placed(mesh_of((2, 2)), placements, *shape)
    assert placing_of(param, MatrixLayout.stacked(shape, n)) == Placing(Path.redistribute)


def test_three_divisions_are_redistributed():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2))
        param = placed(mesh, [S0, S0, S0], 8, 2, 2)
        assert placing_of(param, MatrixLayout.stacked((8, 2, 2), 8)) == Placing(Path.redistribute)
        replicated = placed(mesh, [R, S0, S0], 8, 2, 2)
        placing = placing_of(replicated, MatrixLayout.stacked((8, 2, 2), 8))
        assert placing == Placing(Path.rows, mesh.get_group(2), 0, (4, 4))
    finally:
        dist.destroy_process_group()


def test_replicas_share_the_work_on_plain_parameters(fake_rank: int):
    mesh = mesh_of((2, 2))
    group = mesh.get_group(0)
    plain = torch.zeros(8, 8)
    assert placing_of(plain, MATRIX, replicas=group) == Placing(Path.broadcast, group)
    assert placing_of(plain, MATRIX, group, nested=False) == Placing(Path.broadcast, group)
    for placements, path in (([R, R], Path.local), ([R, S0], Path.rows), ([R, S1], "redistribute")):
        assert placing_of(placed(mesh, placements, 8, 8), MATRIX, replicas=group).path == path


def test_one_replica_has_nobody_to_share_with(fake_rank: int):
    alone = mesh_of((4, 1)).get_group(1)
    assert placing_of(torch.zeros(8, 8), MATRIX, replicas=alone) == Placing(Path.local)


def test_rows_are_where_the_placing_says(passed_on_ranks: Callable[[str], FilePath]):
    passed_on_ranks("rows_are_where_the_placing_says")


# Parts and sums


def test_a_dimension_of_one_rank_divides_nothing(fake_rank: int):
    assert sharding_dims(torch.zeros(3)) == []
    assert sharding_dims(placed(mesh_of((4, 1)), [S0, S1], 8, 8)) == [0]
    assert sharding_dims(placed(mesh_of((1, 4)), [S0, STRIDED], 8, 8)) == [1]
    assert sharding_dims(placed(mesh_of((2, 2)), [R, Partial()], 8, 8)) == [1]


def test_consecutive_elements_have_the_index_of_the_first(fake_rank: int):
    for shape, first in (((8, 4), 24), ((9, 5), 45), ((6, 3, 2), 36), ((2,), 2)):
        index = element_index(placed(mesh_of((4,)), [S0], *shape))
        assert index.dtype == torch.int64 and index.ndim == 0
        assert index.item() == (first if fake_rank == 3 else 0)


def test_a_plain_parameter_starts_at_zero():
    assert torch.equal(element_index(torch.zeros(3, 4)), torch.tensor(0))


def test_element_index_may_exceed_32_bits(fake_rank: int):
    # Of 2^34 elements only the shape exists.
    param = placed(mesh_of((4,)), [S0], 2**17, 2**17)
    assert element_index(param).item() == (3 * 2**32 if fake_rank == 3 else 0)


def test_other_shardings_have_no_ranges(fake_rank: int):
    mesh = mesh_of((2, 2))
    with pytest.raises(OLMoError, match="has the placement .*, known are shards"):
        local_ranges(placed(mesh, [R, Partial()], 8, 4))
    # As tensor parallelism over a part of a fused weight would make.
    other = DTensor.from_local(
        torch.zeros(3, 4), mesh, [R, S0], run_check=False, shape=torch.Size((8, 4)), stride=(4, 1)
    )
    with pytest.raises(OLMoError, match=r"local shape \(3, 4\), expected is \(4, 4\)"):
        local_ranges(other)


def test_sums_over_plain_parameters_need_no_process_group():
    local = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out = sum_over_shards([torch.zeros(2), torch.zeros(3)], local)
    assert torch.equal(out, local)


def test_a_plain_model_has_no_replicas():
    assert data_parallel_group(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    "case",
    [
        "element_index_is_that_of_the_whole",
        "element_index_is_that_of_parameters_under_fsdp",
        "whole_and_part_are_inverse",
        "sums_count_each_shard_once",
        "data_parallel_group_is_read_from_the_model",
    ],
)
def test_on_ranks(case: str, passed_on_ranks: Callable[[str], FilePath]):
    passed_on_ranks(case)
