import itertools
import random
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
import torch
import torch.distributed as dist
from olmo_core.exceptions import OLMoError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from olmo_optim_ext import MuonConfig
from olmo_optim_ext.engine import matrix as matrix_engine
from olmo_optim_ext.engine.exchange import Path, RowExchange, assign_owners, path_of

from ..optim.cases import MixedShapes, train, weights

# Owners


def loads(costs: Sequence[float], owners: Sequence[int], n_owners: int) -> List[float]:
    return [sum(c for c, o in zip(costs, owners) if o == owner) for owner in range(n_owners)]


def smallest_maximum(costs: Sequence[float], n_owners: int) -> float:
    """By trying all assignments."""
    return min(
        max(loads(costs, owners, n_owners))
        for owners in itertools.product(range(n_owners), repeat=len(costs))
    )


def random_costs(seed: int) -> List[float]:
    rng = random.Random(seed)
    return [rng.choice([1.0, 4.0, rng.uniform(0, 50)]) for _ in range(rng.randint(1, 30))]


@pytest.mark.parametrize("n_owners", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(10))
def test_no_owner_has_more_than_the_mean_and_one_item(seed: int, n_owners: int):
    costs = random_costs(seed)
    owners = assign_owners(costs, n_owners)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(n_owners))
    bound = sum(costs) / n_owners + max(costs)
    assert max(loads(costs, owners, n_owners)) <= bound * (1 + 1e-12)
    assert assign_owners(costs, n_owners) == owners


@pytest.mark.parametrize(
    "costs,n_owners",
    [
        ([5, 4, 3, 2, 1], 2),
        ([1, 1, 1, 1, 1, 1], 3),
        ([8, 1, 1, 1, 1, 1, 1, 1, 1], 2),
        ([1, 2, 3, 4, 5, 6], 3),
        ([7], 4),
        ([2, 9, 2, 9], 4),
    ],
)
def test_easy_cases_are_packed_as_well_as_possible(costs: List[float], n_owners: int):
    got = max(loads(costs, assign_owners(costs, n_owners), n_owners))
    assert got == smallest_maximum(costs, n_owners)


def test_ties_go_to_the_first_item_and_the_first_owner():
    assert assign_owners([1.0] * 5, 3) == [0, 1, 2, 0, 1]
    assert assign_owners([1.0, 3.0, 3.0, 2.0], 2) == [1, 0, 1, 0]


def test_nothing_to_own():
    assert assign_owners([], 3) == []


# Exchange, with all ranks of a group in one process


class Sent(NamedTuple):
    """What a rank handed to an all-to-all."""

    tensor: torch.Tensor
    to_ranks: List[int]
    from_ranks: List[int]


class Rank(RowExchange):
    """The exchange of one rank: keeps what it is given to send."""

    def _all_to_all(  # type: ignore[override]
        self, send: torch.Tensor, send_splits: List[int], receive_splits: List[int]
    ) -> Sent:
        return Sent(send, send_splits, receive_splits)


def deliver(sent: Sequence[Sent]) -> List[torch.Tensor]:
    """All-to-all between the ranks, which must agree on who sends how much to whom."""
    parts = [x.tensor.split(x.to_ranks) for x in sent]
    received = []
    for rank, x in enumerate(sent):
        assert [len(parts[other][rank]) for other in range(len(sent))] == x.from_ranks
        received.append(torch.cat([parts[other][rank] for other in range(len(sent))]))
    return received


MakeGroup = Callable[..., List[Any]]  # of Rank, whose transfers are no transfers


@pytest.fixture
def make_group(monkeypatch: pytest.MonkeyPatch) -> MakeGroup:
    def make(
        size: int,
        shapes: Sequence[Tuple[int, int]],
        costs: Optional[Sequence[float]] = None,
        **kwargs: Any,
    ) -> List[Any]:
        costs = costs or [float(rows * cols) for rows, cols in shapes]
        group: Any = object()
        ranks = []
        for rank in range(size):
            with monkeypatch.context() as patch:
                patch.setattr(dist, "get_world_size", {group: size}.__getitem__)
                patch.setattr(dist, "get_rank", {group: rank}.__getitem__)
                ranks.append(Rank(shapes, costs, group, itemsize=4, **kwargs))
        return ranks

    return make


def shards_of(matrix: torch.Tensor, size: int) -> List[torch.Tensor]:
    """The rows of each rank, as ``Shard(0)`` documents them: by :func:`torch.chunk`."""
    chunks = list(torch.chunk(matrix, size))
    return chunks + [matrix[:0]] * (size - len(chunks))


SHAPES = [(8, 4), (7, 3), (2, 5), (1, 6), (13, 2), (3, 3), (8, 4), (5, 1), (4, 9)]
"""Even and uneven rows, and fewer rows than ranks."""


def matrices(shapes: Sequence[Tuple[int, int]]) -> List[torch.Tensor]:
    """No element occurs twice."""
    starts = itertools.accumulate((rows * cols for rows, cols in shapes), initial=0)
    return [
        torch.arange(start, start + rows * cols, dtype=torch.float32).view(rows, cols)
        for start, (rows, cols) in zip(starts, shapes)
    ]


@pytest.mark.parametrize("bucket_bytes", [2**20, 120, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_owners_get_their_whole_matrices_and_ranks_their_shards(
    size: int, bucket_bytes: int, make_group: MakeGroup
):
    ranks = make_group(size, SHAPES, bucket_bytes=bucket_bytes)
    whole = matrices(SHAPES)
    shards = [shards_of(matrix, size) for matrix in whole]
    updates = [-matrix for matrix in whole]
    like = torch.empty(0)

    gathered: List[int] = []
    scattered: List[Dict[int, torch.Tensor]] = [{} for _ in ranks]
    for bucket in ranks[0].buckets:
        received = deliver(
            [
                x.start_gather(bucket, lambda i, rank=rank: shards[i][rank], like)
                for rank, x in enumerate(ranks)
            ]
        )
        results = []
        for x, buffer in zip(ranks, received):
            owned = x.whole(bucket, buffer)
            assert list(owned) == list(bucket[x.rank])
            for i, matrix in owned.items():
                assert x.owners[i] == x.rank
                assert torch.equal(matrix, whole[i])
            gathered += owned
            results.append({i: -matrix for i, matrix in owned.items()})
        received = deliver(
            [x.start_scatter(bucket, result, like) for x, result in zip(ranks, results)]
        )
        for x, buffer in zip(ranks, received):
            out = x.shards(bucket, buffer)
            assert not out.keys() & scattered[x.rank].keys()
            scattered[x.rank].update(out)

    assert sorted(gathered) == list(range(len(SHAPES)))
    for rank, of_rank in enumerate(scattered):
        assert sorted(of_rank) == list(range(len(SHAPES)))
        for i, got in of_rank.items():
            expected = shards_of(updates[i], size)[rank]
            assert got.shape == expected.shape
            assert torch.equal(got, expected)


def test_shards_need_not_be_contiguous(make_group: MakeGroup):
    (rank,) = make_group(1, [(3, 2)])
    matrix = torch.arange(6.0).view(2, 3).t()
    assert not matrix.is_contiguous()
    (bucket,) = rank.buckets
    (received,) = deliver([rank.start_gather(bucket, lambda i: matrix, torch.empty(0))])
    assert torch.equal(rank.whole(bucket, received)[0], matrix)


def test_what_travels_has_the_dtype_asked_for(make_group: MakeGroup):
    (rank,) = make_group(1, [(3, 2)])
    (bucket,) = rank.buckets
    matrix, like = torch.rand(3, 2), torch.empty(0, dtype=torch.bfloat16)
    for sent in (
        rank.start_gather(bucket, lambda i: matrix, like),
        rank.start_scatter(bucket, {0: matrix}, like),
    ):
        assert sent.tensor.dtype == torch.bfloat16
        assert torch.equal(sent.tensor, matrix.bfloat16().view(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_agree_on_owners_and_buckets(size: int, make_group: MakeGroup):
    first, *others = make_group(size, SHAPES, bucket_bytes=100)
    for other in others:
        assert other.owners == first.owners
        assert other.buckets == first.buckets


@pytest.mark.parametrize("cap", [1, 40, 84, 120, 200, 2**20])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_buckets_hold_every_matrix_once_and_keep_to_the_cap(
    size: int, cap: int, make_group: MakeGroup
):
    rank = make_group(size, SHAPES, bucket_bytes=cap)[0]
    n_bytes = [4 * rows * cols for rows, cols in SHAPES]
    seen: List[int] = []
    for bucket in rank.buckets:
        assert len(bucket) == size
        assert any(bucket)
        for owner, items in enumerate(bucket):
            seen += items
            assert all(rank.owners[i] == owner for i in items)
            assert sum(n_bytes[i] for i in items) <= cap or len(items) == 1
    assert sorted(seen) == list(range(len(SHAPES)))


def test_a_cap_above_all_makes_one_bucket_and_one_below_all_a_bucket_each(make_group: MakeGroup):
    assert len(make_group(2, SHAPES, bucket_bytes=2**20)[0].buckets) == 1
    alone = make_group(2, SHAPES, bucket_bytes=1)[0]
    assert len(alone.buckets) == max(alone.owners.count(owner) for owner in range(2))
    # 2 x 40 bytes fit into 80, 3 do not.
    assert len(make_group(1, [(2, 5)] * 5, bucket_bytes=80)[0].buckets) == 3


def test_costs_decide_who_owns_what(make_group: MakeGroup):
    shapes = [(4, 4), (2, 2), (2, 2), (2, 2)]
    rank = make_group(2, shapes, costs=[1.0, 5.0, 3.0, 1.0])[0]
    assert rank.owners == assign_owners([1.0, 5.0, 3.0, 1.0], 2)
    assert rank.owners != assign_owners([16.0, 4.0, 4.0, 4.0], 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_rows_are_those_of_chunk(size: int, make_group: MakeGroup):
    shapes = [(rows, 2) for rows in range(1, 30)]
    rank = make_group(size, shapes)[0]
    for item, (rows, cols) in enumerate(shapes):
        expected = [len(shard) for shard in shards_of(torch.empty(rows, cols), size)]
        assert [rank.rows_on(item, r) for r in range(size)] == expected


def test_a_shard_of_another_sharding_is_refused(make_group: MakeGroup):
    rank = make_group(2, [(5, 3)])[0]
    with pytest.raises(OLMoError, match=r"\(5, 3\) has 2 rows on rank 0 of 2, .* gives it 3"):
        rank.start_gather(rank.buckets[0], lambda i: torch.zeros(2, 3), torch.empty(0))


# Steps


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("cap,n_buckets", [(1, 4), (360, 3), (2**20, 1)])
def test_buckets_on_their_way_at_the_same_time_do_not_mix(
    cap: int, n_buckets: int, one_rank: None, monkeypatch: pytest.MonkeyPatch
):
    reference, model = MixedShapes(), MixedShapes()
    train(reference, MuonConfig().build(reference), 0, 3)

    exchanges: List[RowExchange] = []

    def make_exchange(shapes: Any, costs: Any, group: Any, itemsize: int) -> RowExchange:
        exchanges.append(RowExchange(shapes, costs, group, itemsize, bucket_bytes=cap))
        return exchanges[-1]

    monkeypatch.setattr(matrix_engine, "path_of", lambda param: (Path.rows, dist.group.WORLD))
    monkeypatch.setattr(matrix_engine, "RowExchange", make_exchange)
    train(model, MuonConfig().build(model), 0, 3)
    assert [len(exchange.buckets) for exchange in exchanges] == [n_buckets]
    for name, weight in weights(reference).items():
        assert torch.equal(model.get_parameter(name), weight), name


# Paths


def test_a_plain_tensor_is_local():
    assert path_of(torch.zeros(4, 4)) == (Path.local, None)
    assert path_of(torch.nn.Parameter(torch.zeros(4, 4))) == (Path.local, None)


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """Rank 0 of four, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


R, S0, S1 = Replicate(), Shard(0), Shard(1)


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
        ((2, 2), [R, S1], Path.redistribute, None),
        ((2, 2), [Partial(), S0], Path.redistribute, None),
        ((2, 2), [R, _StridedShard(0, split_factor=2)], Path.redistribute, None),
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
    fake_ranks: None,
):
    names = ("outer", "inner")[: len(grid)]
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=names)
    param = DTensor.from_local(
        torch.zeros(8, 8),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size((8, 8)),
        stride=(8, 1),
    )
    group = None if group_dim is None else mesh.get_group(group_dim)
    assert path_of(param) == (path, group)


def test_only_matrices_are_exchanged_by_rows(fake_ranks: None):
    mesh = init_device_mesh("cpu", (4,))
    vector = DTensor.from_local(torch.zeros(2), mesh, [S0], run_check=False)
    assert path_of(vector) == (Path.redistribute, None)
