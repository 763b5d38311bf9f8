import math
from typing import Dict, Tuple

import pytest
import torch

from olmo_optim_ext.linalg import spectrum
from olmo_optim_ext.linalg.polar import newton_schulz_flops
from olmo_optim_ext.linalg.spectrum import (
    PROBES,
    STEPS,
    lanczos,
    lanczos_flops,
    orthogonality_error,
)

SHAPES = [(64, 64), (128, 512), (512, 256), (1024, 1024)]

SMALL = [(1, 1), (1, 7), (5, 3), (17, 40), (24, 24), (100, 50), (64, 640)]

SYNCHRONISING = [
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "nonzero",
    "numpy",
    "tolist",
]


def effective_rank_of(coefficients: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(spectrum.effective_rank_of(coefficients.numpy()))


def stable_rank_of(coefficients: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(spectrum.stable_rank_of(coefficients.numpy()))


def test_both_ranks_are_those_of_each_alone():
    coefficients = lanczos(random_stack(3, 20, 40), random_probes(random_stack(3, 20, 40)))
    effective, stable = spectrum.ranks_of(coefficients.numpy())
    assert (effective == spectrum.effective_rank_of(coefficients.numpy())).all()
    assert (stable == spectrum.stable_rank_of(coefficients.numpy())).all()


def effective_rank(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(spectrum.effective_rank(x))


def spectra(n: int) -> Dict[str, torch.Tensor]:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "i^-0.5": i**-0.5,
        "i^-1": 1 / i,
        "i^-2": i**-2,
        "slow decay": torch.exp(-8 * i / n),
        "decay": torch.exp(-30 * i / n),
        "fast decay": torch.exp(-i / 5),
        "rank 1": (i <= 1).double(),
        "rank 5": (i <= 5).double(),
        "half rank": (i <= n // 2).double(),
        "two large": torch.where(i <= 2, 1.0, 0.01),
        "one large, flat": torch.where(i == 1, 1.0, 0.01),
        "one larger, flat": torch.where(i == 1, 1.0, 0.1),
        "flat": torch.ones_like(i),
    }


def with_spectrum(rows: int, cols: int, values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + cols)
    n = len(values)
    left = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    right = torch.randn(cols, n, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(left).Q * values) @ torch.linalg.qr(right).Q.T


def random_stack(k: int, rows: int, cols: int) -> torch.Tensor:
    return torch.randn(k, rows, cols, generator=torch.Generator().manual_seed(100 * rows + cols))


def random_probes(x: torch.Tensor, p: int = PROBES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (x.shape[0], min(x.shape[1:]), p), generator=generator) * 2.0 - 1


def forbid_synchronisation(patch: pytest.MonkeyPatch) -> None:
    def synchronise(*_: object, **__: object) -> None:
        raise AssertionError("host-device synchronisation")

    for name in SYNCHRONISING:
        patch.setattr(torch.Tensor, name, synchronise)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_effective_rank_is_within_three_percent(shape: Tuple[int, int]):
    rows, cols = shape
    values = spectra(min(shape))
    matrices = {name: with_spectrum(*shape, s).float() for name, s in values.items()}
    expected = {
        name: float(torch.distributions.Categorical(probs=s).entropy().exp())
        for name, s in values.items()
    }
    for rank in (5, min(shape) // 2, min(shape)):
        product = random_stack(1, rows, rank)[0] @ random_stack(1, rank, cols)[0]
        matrices[f"product {rank}"] = product if rank < min(shape) else random_stack(1, *shape)[0]
    for name in matrices.keys() - expected.keys():
        expected[name] = float(effective_rank(matrices[name].unsqueeze(0)))
    x = torch.stack(list(matrices.values()))
    got = effective_rank_of(lanczos(x, random_probes(x)))
    errors = {name: float(got[i]) / expected[name] - 1 for i, name in enumerate(matrices)}
    assert max(map(abs, errors.values())) < 0.03, errors
    if min(shape) <= PROBES * STEPS:
        assert max(map(abs, errors.values())) < 1e-3, errors


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_effective_rank_of_small_matrices(shape: Tuple[int, int]):
    x = random_stack(2, *shape)
    torch.testing.assert_close(
        effective_rank_of(lanczos(x, random_probes(x))), effective_rank(x), rtol=1e-4, atol=0
    )


def test_the_space_may_be_a_small_part_of_the_whole():
    x = random_stack(1, 200, 300)
    x = torch.cat([x, with_spectrum(200, 300, 1 / torch.arange(1.0, 201).double()).float()[None]])
    coefficients = lanczos(x, random_probes(x, 8), 10)
    assert coefficients.shape == (2, 2, 10, 8, 8)
    assert (effective_rank_of(coefficients) / effective_rank(x) - 1).abs().max() < 0.1


def test_probes_change_little():
    x = random_stack(1, 600, 640)
    got = [effective_rank_of(lanczos(x, random_probes(x, seed=i))).item() for i in range(4)]
    assert len(set(got)) == 4 and max(got) / min(got) < 1.02


@pytest.mark.parametrize("shape", [(64, 64), (40, 300), (300, 40)], ids=str)
def test_the_stable_rank_is_exact(shape: Tuple[int, int]):
    x = random_stack(2, *shape)
    norm, top = (torch.linalg.matrix_norm(x.double(), order) for order in ("fro", 2))
    got = stable_rank_of(lanczos(x, random_probes(x)))
    torch.testing.assert_close(got, (norm / top) ** 2, rtol=1e-5, atol=0)
    assert float(stable_rank_of(lanczos(x, random_probes(x, 4), 5))[0]) < 1.1 * got[0]


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (30, 30)], ids=str)
def test_zero_has_rank_zero_and_does_not_spoil_the_stack(shape: Tuple[int, int]):
    x = random_stack(3, *shape)
    x[1] = 0
    coefficients = lanczos(x, random_probes(x))
    assert torch.isfinite(coefficients).all()
    for got in (effective_rank_of(coefficients), stable_rank_of(coefficients)):
        assert got[1] == 0 and (got[[0, 2]] > 1).all()


@pytest.mark.parametrize("shape", [(100, 40), (600, 640)], ids=str)
def test_one_large_element_is_of_rank_one(shape: Tuple[int, int]):
    x = torch.zeros(1, *shape)
    x[0, 3, 2] = -7
    coefficients = lanczos(x, random_probes(x))
    assert torch.isfinite(coefficients).all()
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(effective_rank_of(coefficients), one, rtol=1e-3, atol=0)
    torch.testing.assert_close(stable_rank_of(coefficients), one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e15, 1e37])
def test_the_scale_does_not_matter(scale: float):
    x = random_stack(2, 20, 30).sign() if scale < 1e-40 else random_stack(2, 20, 30)
    expected, got = (lanczos(y, random_probes(x)) for y in (x, x * scale))
    assert torch.isfinite(got).all()
    for measure in (effective_rank_of, stable_rank_of):
        torch.testing.assert_close(measure(got), measure(expected), rtol=1e-5, atol=0)


def test_the_transpose_is_the_same():
    x = random_stack(2, 20, 50)
    probes = random_probes(x)
    assert torch.equal(lanczos(x.mT.contiguous(), probes), lanczos(x, probes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    x = random_stack(2, 40, 60).to(dtype)
    coefficients = lanczos(x, random_probes(x))
    assert coefficients.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    got = effective_rank_of(coefficients)
    assert (got / effective_rank(x) - 1).abs().max() < tolerance


def test_coefficients_are_those_of_the_projected_matrix():
    x = random_stack(1, 48, 50).double()
    coefficients = lanczos(x, random_probes(x).double())
    blocks = coefficients[0]
    assert blocks.shape == (2, 3, 16, 16)
    full = torch.zeros(48, 48, dtype=torch.float64)
    for i in range(3):
        full[16 * i : 16 * i + 16, 16 * i : 16 * i + 16] = blocks[0, i].T
        if i > 0:
            full[16 * i : 16 * i + 16, 16 * i - 16 : 16 * i] = blocks[1, i]
    expected = torch.linalg.svdvals(x[0]) / torch.linalg.matrix_norm(x[0])
    torch.testing.assert_close(torch.linalg.svdvals(full), expected)


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (20, 200)], ids=str)
def test_a_stack_gives_what_its_matrices_give(shape: Tuple[int, int]):
    x = random_stack(3, *shape).double()
    probes = random_probes(x)
    stacked = lanczos(x, probes)
    for i in range(3):
        alone = lanczos(x[i : i + 1], probes[i : i + 1])
        torch.testing.assert_close(stacked[i : i + 1], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(effective_rank_of(stacked)[i], effective_rank_of(alone)[0])


def test_probes_of_another_side_are_refused():
    x = random_stack(1, 5, 8)
    with pytest.raises(ValueError, match="probes have shape"):
        lanczos(x, torch.ones(1, 8, 2))


@pytest.mark.parametrize("shape", [(20, 20), (20, 90), (90, 20)], ids=str)
def test_the_device_part_does_not_synchronise(shape: Tuple[int, int], monkeypatch):
    x = random_stack(2, *shape)
    x[1] = 0
    probes = random_probes(x)
    with monkeypatch.context() as patch:
        forbid_synchronisation(patch)
        lanczos(x, probes)
        orthogonality_error(x)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_the_orthogonality_error_is_that_of_squared_singular_values(shape: Tuple[int, int]):
    x = random_stack(3, *shape)
    x[1] = 0
    values = torch.linalg.svdvals(x.double())
    expected = (values.square() - 1).square().mean(-1).sqrt().float()
    torch.testing.assert_close(orthogonality_error(x), expected)
    orthogonal = with_spectrum(*shape, torch.ones(min(shape))).unsqueeze(0)
    assert orthogonality_error(orthogonal).max() < 1e-12
    assert orthogonality_error(orthogonal.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("short", [64, 65, 100, 128, 256, 500, 512, 768, 1024, 4096])
@pytest.mark.parametrize("aspect", [1, 1.25, 2, 4, 16, 64])
def test_it_costs_less_than_newton_schulz(short: int, aspect: float):
    long = math.ceil(short * aspect)
    assert lanczos_flops(short, long) == lanczos_flops(long, short)
    assert lanczos_flops(short, long) < 0.6 * newton_schulz_flops(short, long)


@pytest.mark.parametrize("shape", [(64, 64), (64, 640), (640, 600)], ids=str)
def test_declared_flops_bound_those_done(shape: Tuple[int, int]):
    from torch.utils.flop_counter import FlopCounterMode

    x = random_stack(1, *shape)
    probes = random_probes(x)
    with FlopCounterMode(display=False) as counter:
        lanczos(x, probes)
    done = counter.get_total_flops()
    # The counter knows no QR, which here reduces the wide matrix.
    reduced = 2 * 64 * 64 * 640 if shape == (64, 640) else 0
    assert 0.5 * lanczos_flops(*shape) < done + reduced <= lanczos_flops(*shape)
