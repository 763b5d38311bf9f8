import threading
from typing import Callable, List, Sequence

import pytest
import torch

from olmo_optim_ext.engine.quantile import quantile_of_magnitudes


def alone(local: torch.Tensor) -> torch.Tensor:
    return local.clone()


def quantiles(xs: Sequence[torch.Tensor], q: float) -> torch.Tensor:
    return torch.stack([torch.quantile(x.abs().flatten().double(), q).float() for x in xs])


def on_ranks(parts: List[List[torch.Tensor]], q: float) -> List[torch.Tensor]:
    """The result on each rank, with one thread for each."""
    barrier, sent = threading.Barrier(len(parts)), [torch.empty(0)] * len(parts)
    results: List[torch.Tensor] = [torch.empty(0)] * len(parts)

    def add_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(local: torch.Tensor) -> torch.Tensor:
            sent[rank] = local
            barrier.wait(10)
            total = torch.stack(sent).sum(0)
            barrier.wait(10)
            return total

        return add

    def run(rank: int) -> None:
        results[rank] = quantile_of_magnitudes(parts[rank], q, add_of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MATRICES = {
    "normal": draw(37, 53),
    "one element": torch.tensor([[-3.0]]),
    "two elements": torch.tensor([[-3.0, 2.0]]),
    "zeros": torch.zeros(7, 9),
    "signed zeros": torch.tensor([[0.0, -0.0, 1.0]]),
    "one is not zero": torch.eye(6)[:1] * 4,
    "ties": draw(30, 30).round(),
    "all equal": torch.full((5, 5), -2.5),
    "all scales": draw(40, 40) * torch.logspace(-44, 38, 1600).view(40, 40),
    "neighbours": (torch.arange(1000, dtype=torch.int32) + 0x3F800000).view(torch.float32),
    "infinite": torch.cat([draw(50), torch.full((50,), torch.inf)])[None],
    "place is an integer": draw(1, 21),
    "several chunks": draw(300, 500),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("q", [0.95, 0.5, 0.0, 1.0])
def test_is_that_of_torch(name: str, q: float):
    x = MATRICES[name]
    if name == "infinite":
        q = min(q, 0.4)  # infinity times zero is no number in torch's interpolation either
    assert torch.equal(quantile_of_magnitudes([x], q, alone), quantiles([x], q))


def test_all_matrices_at_once():
    xs = list(MATRICES.values())
    got = quantile_of_magnitudes(xs, 0.3, alone)
    assert torch.equal(got, quantiles(xs, 0.3))


def test_both_places_may_differ_in_every_digit():
    # Place 0.5 lies between the two, which share no digit.
    low, high = torch.tensor([0x01020304, 0x7E7D7C7B], dtype=torch.int32).view(torch.float32)
    x = torch.stack([low, low, high, high])
    assert torch.equal(quantile_of_magnitudes([x], 0.5, alone), quantiles([x], 0.5))


def test_other_dtypes_are_taken_as_float32():
    x = draw(20, 20)
    for dtype in (torch.bfloat16, torch.float64):
        got = quantile_of_magnitudes([x.to(dtype)], 0.95, alone)
        assert got.dtype == torch.float32
        assert torch.equal(got, quantiles([x.to(dtype)], 0.95))


def test_parts_need_not_be_contiguous():
    x = draw(20, 30)
    got = quantile_of_magnitudes([x[3:9, 5:]], 0.95, alone)
    assert torch.equal(got, quantiles([x[3:9, 5:]], 0.95))


def test_a_matrix_without_elements_changes_no_other():
    x = draw(4, 4)
    got = quantile_of_magnitudes([torch.empty(0, 4), x], 0.95, alone)
    assert torch.equal(got[1:], quantiles([x], 0.95))


@pytest.mark.parametrize("sizes", [(1, 36), (0, 37, 0), (10, 9, 9, 9), (0, 0, 1, 36)])
def test_ranks_find_that_of_the_whole_matrix(sizes: Sequence[int]):
    whole = [draw(37, 8, seed=seed) for seed in range(3)] + [draw(37, 8).round()]
    parts = [list(each) for each in zip(*(x.split(list(sizes)) for x in whole))]
    expected = quantile_of_magnitudes(whole, 0.95, alone)
    assert torch.equal(expected, quantiles(whole, 0.95))
    for result in on_ranks(parts, 0.95):
        assert torch.equal(result, expected)


def test_not_a_number_does_no_harm():
    x = draw(4, 4)
    x[1, 2] = torch.nan
    assert quantile_of_magnitudes([x], 0.5, alone).isfinite().all()
    assert quantile_of_magnitudes([x], 1.0, alone).isnan().all()  # the largest bits


def test_nothing_is_read_on_the_host():
    # As on CUDA: only a CPU may ask how many elements are left.
    parts = [torch.rand(8, 3, device="meta"), torch.rand(0, 3, device="meta")]
    assert quantile_of_magnitudes(parts, 0.95, alone).shape == (2,)
