import math
from typing import List, Tuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from olmo_optim_ext.engine.random import random_bits, round_stochastically, stream

from .elementwise_test import needs_compiler

# Streams


def test_streams_differ_in_every_argument():
    numbers = {
        stream(seed, call, name, purpose)
        for seed in (0, 1, 11)
        for call in (0, 1, 11)
        for name in ("a", "b", "1")
        for purpose in ("", "round 0", "round 1")
    }
    assert len(numbers) == 3**4
    assert all(0 <= number < 2**63 for number in numbers)
    assert max(numbers) > 2**62  # int64 has 63 bits, and they are used


def test_streams_are_the_same_in_every_process():
    # A resume may not change them, nor a release.
    assert stream(0, 1, "weight", "round 0") == 8716923058876364875


# Bits


def key_of(number: int) -> torch.Tensor:
    return torch.tensor(stream(0, number, "weight"))


def chi_squared(values: torch.Tensor, n_cells: int) -> float:
    """In standard deviations from what independent and uniform values have."""
    counts = torch.bincount(values, minlength=n_cells).double()
    expected = values.numel() / n_cells
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (n_cells - 1)) / math.sqrt(2 * (n_cells - 1))


N = 2**17

STARTS = [0, 10**6, 2**31 - N // 2, 2**32 - N // 2, 2**32, 2**40 + 12345]


@pytest.mark.parametrize("start", STARTS)
def test_bits_are_uniform(start: int):
    bits = random_bits(torch.arange(start, start + N), key_of(1))
    assert bits.dtype == torch.int64 and bits.shape == (N,)
    assert 0 <= bits.min() and bits.max() < 2**32
    for shift in range(0, 32, 8):
        assert abs(chi_squared((bits >> shift) & 0xFF, 256)) < 5
    # The low half as a whole: it is what rounding takes.
    assert abs(chi_squared(bits & 0xFFFF, 2**16)) < 5
    for bit in range(32):
        share = ((bits >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("distance", [1, 2, 64, 1000, 2**16])
def test_bits_of_neighbours_are_independent(distance: int, start: int):
    bits = random_bits(torch.arange(start, start + N + distance), key_of(1))
    for shift in (0, 8, 12, 28):
        nibbles = (bits >> shift) & 0xF
        assert abs(chi_squared(nibbles[:-distance] * 16 + nibbles[distance:], 256)) < 5


def close_keys() -> List[Tuple[int, int]]:
    key = int(key_of(2))
    flipped = [(key, key ^ (1 << bit)) for bit in range(63)]
    return [(0, 1), (int(key_of(1)), int(key_of(2))), (key, 0), (key, 2**63 - 1), *flipped]


def test_bits_of_two_keys_are_independent():
    index = torch.arange(N // 4)
    for first, second in close_keys():
        a, b = (random_bits(index, torch.tensor(key)) for key in (first, second))
        for shift in (0, 12, 28):
            pairs = ((a >> shift) & 0xF) * 16 + ((b >> shift) & 0xF)
            assert abs(chi_squared(pairs, 256)) < 6, (first, second)


def test_every_bit_of_the_index_changes_every_bit_of_the_result():
    index = torch.arange(10**6, 10**6 + 2**14)
    bits = random_bits(index, key_of(1))
    for flipped in range(42):
        change = bits ^ random_bits(index ^ (1 << flipped), key_of(1))
        shares = torch.stack([((change >> bit) & 1).double().mean() for bit in range(32)])
        assert (shares - 0.5).abs().max() < 0.05, flipped


def test_shards_draw_the_numbers_of_the_whole():
    index = torch.arange(2**32 - 50, 2**32 + 50)
    whole = random_bits(index, key_of(3))
    for begin, end in ((0, 1), (1, 49), (30, 77), (99, 100), (4, 4)):
        assert torch.equal(random_bits(index[begin:end], key_of(3)), whole[begin:end])
    scattered = index.view(10, 10)[::3, 1::2]
    assert torch.equal(random_bits(scattered, key_of(3)), whole.view(10, 10)[::3, 1::2])


def test_bits_never_change():
    # A resume with another release would else not continue the run.
    got = random_bits(torch.tensor([0, 1, 2**33, 2**40 + 3]), torch.tensor(123456789123456789))
    assert got.tolist() == [3839118421, 3375258773, 1712550780, 165810892]


# Rounding


def round_with_all_bits(x: float) -> torch.Tensor:
    """What becomes of a number with each of the 2^16 values of the random bits."""
    return round_stochastically(torch.full((2**16,), x), torch.arange(2**16))


@pytest.mark.parametrize(
    "x",
    [1.0 + 2**-9, 3.14159, -3.14159, 1e-3, -1e30, 1.9999, 65504.1, 1e-40, -3e-41, 2.0**-126 * 1.3],
)
def test_expectation_of_rounding_is_the_number(x: float):
    x = torch.tensor(x).item()  # a float32
    rounded = round_with_all_bits(x)
    assert rounded.dtype == torch.bfloat16
    values = rounded.double().unique()
    # Its two neighbours, and nothing else.
    assert len(values) == 2 and values[0] < x < values[1]
    low, high = values.tolist()
    assert torch.tensor(low).bfloat16().item() == low
    spacing = abs(math.ldexp(1.0, max(math.frexp(x)[1] - 8, -133)))
    assert high - low == spacing
    assert rounded.double().mean().item() == pytest.approx(x, rel=1e-12, abs=0.0)


def test_only_the_low_bits_count():
    x = torch.full((8,), 1.0 + 2**-9)
    bits = torch.arange(8) * 8192
    high = torch.tensor([0, 1, 2**15, 2**16 - 1] * 2) << 16
    assert torch.equal(round_stochastically(x, bits), round_stochastically(x, bits + high))


def test_numbers_that_bfloat16_has_stay():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = patterns.view(torch.bfloat16)
    for bits in (0, 1, 0x7FFF, 0xFFFF, 2**32 - 1):
        rounded = round_stochastically(numbers.float(), torch.full_like(patterns.long(), bits))
        nan = numbers.isnan()
        assert torch.equal(rounded[~nan].view(torch.int16), patterns[~nan])  # the sign of zero too
        assert rounded[nan].isnan().all()


def test_infinity_and_nan_stay_what_they_are():
    # NaN with low bits only would become infinite, or with carry zero.
    low = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    for bits in (0, 0xFFFF):
        fill = torch.full((4,), bits)
        assert round_stochastically(low.view(torch.float32), fill).isnan().all()
        infinite = torch.tensor([math.inf, -math.inf] * 2)
        assert torch.equal(round_stochastically(infinite, fill).float(), infinite)


def test_float64_is_rounded_through_float32():
    x = torch.tensor([1.0 + 2**-9, -7.3], dtype=torch.float64)
    bits = torch.tensor([12345, 54321])
    assert torch.equal(round_stochastically(x, bits), round_stochastically(x.float(), bits))


def test_random_rounding_has_no_drift():
    # Each step is a 64th of the spacing: rounded to nearest, the sum would never leave 1.
    step, n, runs = 2.0**-13, 2000, 2048
    x, places = torch.ones(runs, dtype=torch.bfloat16), torch.arange(runs)
    for call in range(n):
        x = round_stochastically(x.float() + step, random_bits(places, key_of(call)))
    mean, exact = x.double().mean().item(), 1 + n * step
    spread = 2.0**-7 * 0.5 * math.sqrt(n / 16) / math.sqrt(runs)
    assert abs(mean - exact) < 4 * spread


def draw(index: torch.Tensor, key: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return round_stochastically(x, random_bits(index, key))


def test_nothing_is_read_on_the_host():
    with FakeTensorMode():
        draw(torch.arange(8), torch.zeros((), dtype=torch.int64), torch.rand(8))


@needs_compiler
def test_compiled_bits_are_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(draw, dynamic=True, fullgraph=True)
    for start, n in ((0, 1000), (2**32 - 100, 333)):
        index = torch.arange(start, start + n)
        x = torch.randn(n, generator=torch.Generator().manual_seed(n))
        assert torch.equal(compiled(index, key_of(1), x), draw(index, key_of(1), x))
