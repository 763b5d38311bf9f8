import itertools
import random
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pytest
import torch
import torch.distributed as dist
from olmo_core.exceptions import OLMoError

from olmo_optim_ext.engine.exchange import (
    BroadcastExchange,
    Matrix,
    RowExchange,
    Transfer,
    assign_owners,
)

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


@pytest.mark.parametrize("n_owners", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(10))
def test_who_is_free_goes_where_those_with_an_owner_leave_room(seed: int, n_owners: int):
    costs = random_costs(seed)
    rng = random.Random(100 + seed)
    fixed = [rng.choice([None, None, 0, n_owners - 1]) for _ in costs]
    given = list(fixed)
    owners = assign_owners(costs, n_owners, fixed)
    assert fixed == given
    assert all(owner == f for owner, f in zip(owners, fixed) if f is not None)
    before = loads(costs, [-1 if f is None else f for f in fixed], n_owners)
    after = loads(costs, owners, n_owners)
    free = [c for c, f in zip(costs, fixed) if f is None]
    # Who got something has at most the mean and one item, or what it had before.
    bound = sum(costs) / n_owners + max(free, default=0.0)
    for had, has in zip(before, after):
        assert has == pytest.approx(had) or has <= bound * (1 + 1e-12)


def test_an_owner_with_much_gets_nothing_more():
    assert assign_owners([100.0, 1.0, 2.0, 3.0], 3, [1, None, None, None]) == [1, 2, 2, 0]
    assert assign_owners([1.0, 1.0, 5.0], 2, [None, None, 0]) == [1, 1, 0]


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
    def make(size: int, matrices: Sequence[Matrix], **kwargs: Any) -> List[Any]:
        group: Any = object()
        ranks = []
        for rank in range(size):
            with monkeypatch.context() as patch:
                patch.setattr(dist, "get_world_size", {group: size}.__getitem__)
                patch.setattr(dist, "get_rank", {group: rank}.__getitem__)
                ranks.append(Rank(matrices, group, itemsize=4, **kwargs))
        return ranks

    return make


def chunked(rows: int, size: int) -> Tuple[int, ...]:
    """The rows of each rank, as ``Shard(0)`` documents them: by :func:`torch.chunk`."""
    chunks = [len(x) for x in torch.chunk(torch.empty(rows), size)] if rows else []
    return tuple(chunks + [0] * (size - len(chunks)))


def cut(rows: int, size: int, seed: int) -> Tuple[int, ...]:
    """Rows of a block of a parameter: some ranks have none, and those need not be the last."""
    rng = random.Random(seed)
    borders = sorted(rng.randint(0, rows) for _ in range(size - 1))
    return tuple(end - begin for begin, end in zip([0, *borders], [*borders, rows]))


SHAPES = [(8, 4), (7, 3), (2, 5), (1, 6), (13, 2), (3, 3), (8, 4), (5, 1), (4, 9), (0, 3)]
"""Even and uneven rows, fewer rows than ranks, and none."""


def some_matrices(size: int, how: str) -> List[Matrix]:
    owners = {
        "chunked": assign_owners([rows * cols for rows, cols in SHAPES], size),
        "cut": [(7 * i + 3) % size for i in range(len(SHAPES))],
        "one owner": [size - 1] * len(SHAPES),
    }[how]
    return [
        Matrix(cols, chunked(rows, size) if how == "chunked" else cut(rows, size, i), owner)
        for i, ((rows, cols), owner) in enumerate(zip(SHAPES, owners))
    ]


def filled(matrices: Sequence[Matrix]) -> List[torch.Tensor]:
    """No element occurs twice."""
    starts = itertools.accumulate((m.numel for m in matrices), initial=1)
    return [
        torch.arange(start, start + m.numel, dtype=torch.float32).view(-1, m.cols)
        for start, m in zip(starts, matrices)
    ]


@pytest.mark.parametrize("bucket_bytes", [2**20, 240, 1])
@pytest.mark.parametrize("how", ["chunked", "cut", "one owner"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_owners_get_their_whole_matrices_and_ranks_their_shards(
    size: int, how: str, bucket_bytes: int, make_group: MakeGroup
):
    matrices = some_matrices(size, how)
    ranks = make_group(size, matrices, bucket_bytes=bucket_bytes)
    whole = filled(matrices)
    shards = [x.split(m.rows_on) for x, m in zip(whole, matrices)]
    like = torch.empty(0)

    gathered: List[int] = []
    scattered: List[Dict[int, torch.Tensor]] = [{} for _ in ranks]
    for bucket in ranks[0].buckets:
        buffers = deliver(
            [
                x.start_gather(bucket, lambda i, rank=rank: shards[i][rank], like)
                for rank, x in enumerate(ranks)
            ]
        )
        for x, buffer in zip(ranks, buffers):
            # Any order, and one after the other: results must not touch matrices that wait.
            for i in reversed(bucket[x.rank]):
                assert matrices[i].owner == x.rank
                matrix = x.whole(bucket, i, buffer)
                assert torch.equal(matrix, whole[i])
                x.replace(bucket, i, buffer, -matrix)
                gathered.append(i)
        received = deliver([x.start_scatter(bucket, b) for x, b in zip(ranks, buffers)])
        for x, buffer in zip(ranks, received):
            out = x.shards(bucket, buffer)
            assert not out.keys() & scattered[x.rank].keys()
            scattered[x.rank].update(out)

    assert sorted(gathered) == list(range(len(SHAPES)))
    for rank, of_rank in enumerate(scattered):
        assert sorted(of_rank) == list(range(len(SHAPES)))
        for i, got in of_rank.items():
            assert got.shape == shards[i][rank].shape
            assert torch.equal(got, -shards[i][rank])


def test_a_matrix_alone_in_the_buffer_is_not_copied(make_group: MakeGroup):
    (rank,) = make_group(1, [Matrix(2, (3,), 0)])
    (bucket,) = rank.buckets
    buffer = torch.arange(6.0)
    assert rank.whole(bucket, 0, buffer).data_ptr() == buffer.data_ptr()


def test_shards_need_not_be_contiguous(make_group: MakeGroup):
    (rank,) = make_group(1, [Matrix(2, (3,), 0)])
    matrix = torch.arange(6.0).view(2, 3).t()
    assert not matrix.is_contiguous()
    (bucket,) = rank.buckets
    (buffer,) = deliver([rank.start_gather(bucket, lambda i: matrix, torch.empty(0))])
    assert torch.equal(rank.whole(bucket, 0, buffer), matrix)
    result = torch.rand(2, 3).t()
    rank.replace(bucket, 0, buffer, result)
    assert torch.equal(rank.shards(bucket, buffer)[0], result)


def test_what_travels_has_the_dtype_asked_for(make_group: MakeGroup):
    (rank,) = make_group(1, [Matrix(2, (3,), 0)])
    (bucket,) = rank.buckets
    matrix, like = torch.rand(3, 2), torch.empty(0, dtype=torch.bfloat16)
    sent = rank.start_gather(bucket, lambda i: matrix, like)
    assert sent.tensor.dtype == torch.bfloat16
    assert torch.equal(sent.tensor, matrix.bfloat16().view(-1))
    rank.replace(bucket, 0, sent.tensor, -matrix)
    back = rank.start_scatter(bucket, sent.tensor)
    assert back.tensor is sent.tensor  # the results need no further buffer
    assert torch.equal(back.tensor, -matrix.bfloat16().view(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_agree_on_buckets(size: int, make_group: MakeGroup):
    first, *others = make_group(size, some_matrices(size, "chunked"), bucket_bytes=100)
    for other in others:
        assert other.buckets == first.buckets


@pytest.mark.parametrize("cap", [1, 80, 168, 240, 400, 2**20])
@pytest.mark.parametrize("how", ["chunked", "cut", "one owner"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_buckets_hold_every_matrix_once_and_keep_to_the_cap(
    size: int, how: str, cap: int, make_group: MakeGroup
):
    matrices = some_matrices(size, how)
    rank = make_group(size, matrices, bucket_bytes=cap)[0]
    seen: List[int] = []
    for bucket in rank.buckets:
        assert len(bucket) == size
        assert any(bucket)
        for owner, items in enumerate(bucket):
            seen += items
            assert all(matrices[i].owner == owner for i in items)
            assert sum(4 * matrices[i].numel for i in items) <= cap // 2 or len(items) == 1
    assert sorted(seen) == list(range(len(SHAPES)))


@pytest.mark.parametrize("cap", [256, 300, 512, 1024])
@pytest.mark.parametrize("size", [2, 4])
def test_even_ranks_send_and_receive_no_more_than_a_bucket(
    size: int, cap: int, make_group: MakeGroup
):
    matrices = [Matrix(cols, (2,) * size, i % size) for i, cols in enumerate([1, 2, 3, 4] * 4)]
    ranks = make_group(size, matrices, bucket_bytes=cap)
    most = 0
    for bucket in ranks[0].buckets:
        for rank in ranks:
            sent = rank.start_gather(
                bucket, lambda i: torch.zeros(2, matrices[i].cols), torch.empty(0)
            )
            most = max(most, 4 * (sum(sent.to_ranks) + sum(sent.from_ranks)))
    assert cap / 2 < most <= cap


def test_a_cap_above_all_makes_one_bucket_and_one_below_all_a_bucket_each(make_group: MakeGroup):
    matrices = some_matrices(2, "chunked")[:-1]
    assert len(make_group(2, matrices, bucket_bytes=2**20)[0].buckets) == 1
    alone = make_group(2, matrices, bucket_bytes=1)[0]
    owners = [m.owner for m in matrices]
    assert len(alone.buckets) == max(owners.count(owner) for owner in range(2))
    # 2 x 40 bytes fit into the half of 160, 3 do not.
    assert len(make_group(1, [Matrix(5, (2,), 0)] * 5, bucket_bytes=160)[0].buckets) == 3


def test_matrices_travel_in_the_order_given(make_group: MakeGroup):
    matrices = [Matrix(cols, (1,), 0) for cols in (3, 5, 1, 5, 4)]
    (rank,) = make_group(1, matrices, bucket_bytes=1)
    assert [bucket[0] for bucket in rank.buckets] == [(0,), (1,), (2,), (3,), (4,)]


def test_a_broadcast_bucket_holds_no_more_than_the_cap_of_all_owners_together(
    broadcast: Callable[..., BroadcastExchange],
):
    exchange = broadcast(4, [100] * 8, [0, 1, 2, 3, 0, 1, 2, 3], cap=800)
    assert [sum(map(len, bucket)) for bucket in exchange.buckets] == [2, 2, 2, 2]
    alone = broadcast(4, [100] * 3, [0, 1, 2], cap=1)
    assert [sum(map(len, bucket)) for bucket in alone.buckets] == [1, 1, 1]


def test_nothing_to_exchange(make_group: MakeGroup):
    assert make_group(2, [])[0].buckets == []


def test_a_shard_of_another_sharding_is_refused(make_group: MakeGroup):
    rank = make_group(2, [Matrix(3, (3, 2), 0)])[0]
    with pytest.raises(OLMoError, match="has 2 rows on rank 0 of 2, expected are 3"):
        rank.start_gather(rank.buckets[0], lambda i: torch.zeros(2, 3), torch.empty(0))


class Waited(dist.Work):
    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def wait(self, timeout: Any = None) -> bool:
        self.times += 1
        return True


def test_what_was_sent_is_held_until_it_has_arrived():
    work, sent, received = Waited(), torch.zeros(2), torch.ones(2)
    transfer = Transfer(work, sent, received)
    assert transfer.sent is sent
    assert transfer.wait() is received
    assert work.times == 1 and transfer.sent is None


def test_rows_travel_over_a_process_group(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("rows_travel_to_owners_and_back")


def test_buckets_of_a_step_do_not_mix(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("buckets_of_a_step_do_not_mix")


# Broadcast


@pytest.fixture
def broadcast(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BroadcastExchange]:
    def make(
        size: int, numels: Sequence[int], owners: Sequence[int], cap: Optional[int] = None
    ) -> BroadcastExchange:
        group: Any = object()
        monkeypatch.setattr(dist, "get_world_size", {group: size}.__getitem__)
        kwargs = {} if cap is None else {"bucket_bytes": cap}
        return BroadcastExchange(numels, owners, group, 4, **kwargs)

    return make


@pytest.mark.parametrize("cap", [1, 64, 128, 2**20])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_of_a_broadcast_have_a_place_each_within_the_cap(
    size: int, cap: int, broadcast: Callable[..., BroadcastExchange]
):
    numels = [5, 1, 8, 0, 3, 3, 2, 4]
    owners = [(3 * i) % size for i in range(len(numels))]
    exchange = broadcast(size, numels, owners, cap)
    seen: List[int] = []
    for bucket in exchange.buckets:
        n = sum(numels[i] for items in bucket for i in items)
        assert 4 * n <= cap or any(4 * numels[i] > cap // size for items in bucket for i in items)
        buffer = torch.zeros(n)
        results = exchange.results(bucket, buffer)
        assert list(results) == [i for items in bucket for i in items]
        for i, result in results.items():
            assert result.shape == (numels[i],)
            result += 1
        assert torch.equal(buffer, torch.ones(n))
        seen += results
        for owner, items in enumerate(bucket):
            assert all(owners[i] == owner for i in items)
    assert sorted(seen) == list(range(len(numels)))
    assert cap < 2**20 or len(exchange.buckets) == 1


def test_results_of_all_owners_reach_all_ranks(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("results_of_all_owners_reach_all_ranks")
