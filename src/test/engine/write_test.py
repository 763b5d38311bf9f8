import math
from typing import Dict, List, Optional

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from olmo_optim_ext.engine import write
from olmo_optim_ext.engine.base import Member
from olmo_optim_ext.engine.random import random_bits, round_stochastically
from olmo_optim_ext.engine.write import (
    Rounding,
    chunks,
    rounding_of,
    some_of,
    write_state,
    write_weights,
)

YES, NO = torch.tensor(True), torch.tensor(False)
DECAY = torch.tensor(0.75)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Chunks


@pytest.mark.parametrize("n", [0, 1, 6, 7, 8, 14, 20])
def test_chunks_cover_each_element_once(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "CHUNK", 7)
    ranges = chunks(torch.zeros(n))
    assert [i for begin, end in ranges for i in range(begin, end)] == list(range(n))
    assert all(end - begin <= 7 for begin, end in ranges)
    assert len(ranges) == max(1, math.ceil(n / 7))


def test_other_devices_take_all_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "CHUNK", 7)
    assert chunks(torch.zeros(20, device="meta")) == [(0, 20)]
    assert chunks(torch.zeros(0, device="meta")) == [(0, 0)]


# Weights


@pytest.mark.parametrize("proceed", [None, YES], ids=["no gate", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_decay_and_step(dtype: torch.dtype, proceed: Optional[torch.Tensor]):
    param, step = randn(20).to(dtype), randn(20, seed=1)
    old = param.float().clone()
    write_weights(param, old, step, DECAY, proceed, cautious_decay=False)
    # Rounded once, at the end.
    assert torch.equal(param, (old * 0.75 - step).to(dtype))


def test_cautious_decay_spares_weights_that_the_step_moves_outwards():
    old = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0, -2.0, 0.0, 0.0])
    step = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0])
    param = old.clone()
    write_weights(param, old, step, DECAY, None, cautious_decay=True)
    # 2 * 0.75 - 1; 2 + 1 without decay; and where there is no step, decay alone.
    assert param.tolist() == [0.5, 3.0, -3.0, -0.5, 1.5, -1.5, -1.0, 1.0]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious_decay", [False, True])
def test_a_skipped_step_leaves_weights_bitwise_whatever_it_was(
    cautious_decay: bool, dtype: torch.dtype
):
    param = torch.tensor([1.5, -0.0, 0.0, math.nan, math.inf, -3e-40]).to(dtype)
    before = param.clone()
    for bad in (math.nan, math.inf, -math.inf, 1.0):
        step = torch.full((6,), bad)
        write_weights(param, param.float(), step, DECAY, NO, cautious_decay)
        write_weights(param, param.float(), step, torch.tensor(math.nan), NO, cautious_decay)
        assert torch.equal(bits_of(param), bits_of(before))


def test_views_are_written_through():
    storage = randn(8, 6)
    before = storage.clone()
    param = storage[::2, 1:]
    write_weights(param, param.clone(), torch.ones(4, 5), DECAY, YES, False)
    assert torch.equal(storage[::2, 1:], before[::2, 1:] * 0.75 - 1)
    assert torch.equal(storage[1::2], before[1::2]) and torch.equal(storage[:, 0], before[:, 0])


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_leaves_state_bitwise(dtype: torch.dtype):
    buffers = [randn(9).to(dtype), torch.full((9,), -0.0, dtype=dtype)]
    before = [b.clone() for b in buffers]
    rounding = None
    if dtype == torch.bfloat16:
        rounding = Rounding(torch.tensor([1, 2]), torch.tensor(0))
    new = [torch.full((9,), math.nan), torch.full((9,), math.inf)]
    write_state(buffers, new, NO, rounding)
    assert all(torch.equal(bits_of(b), bits_of(x)) for b, x in zip(buffers, before))


@pytest.mark.parametrize("proceed", [None, YES], ids=["no gate", "gate"])
def test_state_is_what_the_rule_said(proceed: Optional[torch.Tensor]):
    buffers, new = [torch.zeros(9), torch.zeros(9)], [randn(9), randn(9, seed=1)]
    write_state(buffers, new, proceed, None)
    assert all(torch.equal(b, x) for b, x in zip(buffers, new))


@pytest.mark.parametrize("proceed", [None, YES], ids=["no gate", "gate"])
def test_each_element_of_each_buffer_is_rounded_with_its_own_bits(proceed: Optional[torch.Tensor]):
    new = [randn(50), randn(50, seed=1)]
    keys, first = torch.tensor([11, 22]), 2**32 - 7
    buffers = [torch.zeros(50).bfloat16() for _ in new]
    write_state(buffers, new, proceed, Rounding(keys, torch.tensor(first)))
    for buffer, x, key in zip(buffers, new, keys):
        bits = random_bits(torch.arange(first, first + 50), key)
        assert torch.equal(buffer, round_stochastically(x, bits))
        assert not torch.equal(buffer, x.bfloat16())


@pytest.mark.parametrize("size", [1, 7, 50, 64])
@pytest.mark.parametrize("consecutive", [True, False])
def test_rounding_of_chunks_is_that_of_the_whole(
    consecutive: bool, size: int, monkeypatch: pytest.MonkeyPatch
):
    places = torch.tensor(1000) if consecutive else torch.arange(1000, 1150, 3)
    rounding = Rounding(torch.tensor([11, 22]), places)
    new = [randn(50), randn(50, seed=1)]
    whole = [torch.zeros(50).bfloat16() for _ in new]
    write_state(whole, new, YES, rounding)
    monkeypatch.setattr(write, "CHUNK", size)
    parts = [torch.zeros(50).bfloat16() for _ in new]
    for i, j in chunks(parts[0]):
        write_state([b[i:j] for b in parts], [x[i:j] for x in new], YES, some_of(rounding, i, j))
    assert all(torch.equal(part, x) for part, x in zip(parts, whole))


def test_rounding_of_nothing_is_nothing():
    assert some_of(None, 0, 3) is None


# Keys


def member(param: torch.Tensor) -> Member:
    return Member(0, param, torch.zeros(param.shape), {})


def keys_of(
    buffers: List[torch.Tensor], name: str = "a", call: int = 1, seed: int = 0
) -> List[int]:
    param = torch.zeros(3, 4)
    names: Dict[torch.Tensor, str] = {param: name}
    rounding = rounding_of(member(param), buffers, names, call, seed)
    assert rounding is not None and rounding.places.item() == 0
    assert rounding.keys.dtype == torch.int64
    return rounding.keys.tolist()


def test_only_bfloat16_state_is_rounded():
    param = torch.zeros(3, 4)
    for buffers in ([], [torch.zeros(12)], [torch.zeros(12, dtype=torch.float64)]):
        assert rounding_of(member(param), buffers, {param: "a"}, 1, 0) is None


def test_each_buffer_call_name_and_seed_has_random_numbers_of_its_own():
    buffers = [torch.zeros(12).bfloat16() for _ in range(3)]
    keys = [
        key
        for name in ("a", "b")
        for call in (1, 2)
        for seed in (0, 1)
        for key in keys_of(buffers, name, call, seed)
    ]
    assert len(set(keys)) == 3 * 2**3
    assert keys_of(buffers) == keys_of(buffers)
    assert keys_of(buffers[:1]) == keys_of(buffers)[:1]


def test_nothing_is_read_on_the_host():
    with FakeTensorMode():
        param, buffer = torch.zeros(12), torch.zeros(12).bfloat16()
        rounding = rounding_of(member(param), [buffer], {param: "a"}, 1, 0)
        proceed = torch.ones((), dtype=torch.bool)
        write_state([buffer], [torch.zeros(12)], proceed, some_of(rounding, 0, 12))
        write_weights(param, param, torch.ones(12), torch.ones(()), proceed, True)
