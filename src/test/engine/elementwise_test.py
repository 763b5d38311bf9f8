import os
import shutil
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters

from olmo_optim_ext import AdamW, NAdamW, NesterovForm
from olmo_optim_ext.elementwise.nadamw import _torch_mu_product
from olmo_optim_ext.engine.elementwise import ElementwiseOptimizer, bias_correction

Make = Callable[..., ElementwiseOptimizer]

FIELDS: Dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)

RULES: Dict[str, Make] = {
    "adamw": lambda params, **fields: AdamW(params, **{**FIELDS, **fields}),
    "nadamw": lambda params, **fields: NAdamW(params, **{**FIELDS, **fields}),
    "nadamw_torch": lambda params, **fields: NAdamW(
        params, nesterov=NesterovForm.torch, **{**FIELDS, **fields}
    ),
}

every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())


def randn(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def movement(got: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
    """By how much the way from ``start`` differs, relative to its length."""
    got, expected, start = (x.detach().double() for x in (got, expected, start))
    norm = torch.linalg.vector_norm
    return float(norm(got - expected) / norm(expected - start))


# Bias correction


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_bias_correction_has_full_precision(beta: float, dtype: torch.dtype, tolerance: float):
    steps = [1, 2, 10, 10_000]
    got = bias_correction(beta, torch.tensor(steps, dtype=dtype))
    assert got.dtype == dtype
    expected = torch.tensor([1 - beta**step for step in steps], dtype=torch.float64)
    assert ((got.double() - expected) / expected).abs().max() < tolerance


# Layouts and dtypes


def transposed() -> torch.Tensor:
    return randn((4, 6), 0).t()


def strided_rows() -> torch.Tensor:
    return randn((8, 6), 0)[::2, 1:]


def strided_vector() -> torch.Tensor:
    return randn((10,), 0)[::2]


def channels_last() -> torch.Tensor:
    return randn((2, 3, 4, 5), 0).contiguous(memory_format=torch.channels_last)


@every_rule
@pytest.mark.parametrize("like_param", [True, False])
@pytest.mark.parametrize("layout", [transposed, strided_rows, strided_vector, channels_last])
def test_layout_does_not_change_the_update(
    layout: Callable[[], torch.Tensor], like_param: bool, make: Make
):
    param = nn.Parameter(layout())
    copy = nn.Parameter(layout().contiguous())
    assert not param.is_contiguous() and copy.is_contiguous()
    start = copy.detach().clone()
    optim, copy_optim = make([param]), make([copy])
    for step in range(3):
        copy.grad = randn(param.shape, step + 1)
        param.grad = torch.empty_like(param).copy_(copy.grad) if like_param else copy.grad.clone()
        optim.step()
        copy_optim.step()
    assert not torch.equal(copy, start)
    assert torch.equal(param, copy)
    assert param.stride() == layout().stride()
    for name, value in copy_optim.state[copy].items():
        assert torch.equal(optim.state[param][name], value), name


@every_rule
def test_what_lies_between_the_elements_of_a_parameter_is_left_alone(make: Make):
    storage = randn((8, 6), 0)
    before = storage.clone()
    param = nn.Parameter(storage[::2, 1:])
    assert param.data_ptr() == storage[:, 1:].data_ptr()
    param.grad = randn(param.shape, 1)
    make([param]).step()
    moved = storage != before
    assert moved[::2, 1:].all()
    assert not moved[1::2].any() and not moved[:, 0].any()


@every_rule
def test_bfloat16_parameters_are_rounded_once(make: Make):
    param = nn.Parameter(randn((5, 7), 0).bfloat16())
    reference = nn.Parameter(param.detach().float())
    start = param.detach().clone()
    optim, reference_optim = make([param]), make([reference])
    for step in range(5):
        param.grad = randn(param.shape, step + 1).bfloat16()
        reference.grad = param.grad.float()
        optim.step()
        reference_optim.step()
        assert torch.equal(param, reference.bfloat16())
        with torch.no_grad():
            reference.copy_(param)
    assert not torch.equal(param, start)
    for name, value in reference_optim.state[reference].items():
        assert torch.equal(optim.state[param][name], value), name


@every_rule
def test_learning_rate_may_be_a_tensor_that_is_filled(make: Make):
    param, reference = (nn.Parameter(randn((5, 7), 0)) for _ in range(2))
    start = param.detach().clone()
    lr = torch.tensor(0.0)
    optim, reference_optim = make([param]), make([reference])
    optim.param_groups[0]["lr"] = lr
    for step, value in enumerate([0.01, 0.03, 0.001]):
        lr.fill_(value)
        reference_optim.param_groups[0]["lr"] = value
        for p, o in ((param, optim), (reference, reference_optim)):
            p.grad = randn(p.shape, step + 1)
            o.step()
    assert movement(param, reference, start) < 1e-6
    assert float(lr) == pytest.approx(0.001)


# Compilation

COMPILERS = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)),
    reason=f"torch.compile needs a C++ compiler, none of {COMPILERS} is on the PATH",
)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Twins:
    """The same parameters under an eager and under a compiled optimizer."""

    def __init__(self, make: Make, shapes: Sequence[Tuple[int, ...]]):
        self.start = [randn(shape, index) for index, shape in enumerate(shapes)]
        self.eager = [nn.Parameter(p.clone()) for p in self.start]
        self.compiled = [nn.Parameter(p.clone()) for p in self.start]
        self.optims = [make(self.eager), make(self.compiled, compile=True)]
        self.calls = 0

    def set(self, **fields: Any) -> None:
        for optim in self.optims:
            for group in optim.param_groups:
                group.update(fields)

    def step(self, n: int) -> int:
        """:returns: How many graphs were compiled for it."""
        before = counters["stats"]["unique_graphs"]
        for _ in range(n):
            self.calls += 1
            for index, params in enumerate(zip(self.eager, self.compiled)):
                for param in params:
                    param.grad = randn(param.shape, 100 * self.calls + index)
            for optim in self.optims:
                optim.step()
        return counters["stats"]["unique_graphs"] - before

    def assert_same(self) -> None:
        for start, eager, compiled in zip(self.start, self.eager, self.compiled):
            if start.numel() > 0:
                assert movement(compiled, eager, start) < 1e-6
        states = [list(optim.state.values()) for optim in self.optims]
        for eager_state, compiled_state in zip(*states):
            assert list(eager_state) == list(compiled_state)
            for name, value in eager_state.items():
                torch.testing.assert_close(compiled_state[name], value, rtol=1e-6, atol=1e-7)


CHANGES: List[Dict[str, Any]] = [
    {"lr": 0.002},
    {"weight_decay": 0.3},
    {"betas": (0.7, 0.95)},
    {"eps": 1e-5},
]


@needs_compiler
@pytest.mark.parametrize("make", [RULES["adamw"], RULES["nadamw"]], ids=["adamw", "nadamw"])
def test_compiled_is_eager_and_one_kernel_serves_all_sizes(make: Make, fresh_dynamo: None):
    twins = Twins(make, [(33, 17), (4, 6), (1, 1), (0, 5), (128, 64), (2, 3)])
    assert 1 <= twins.step(3) <= 2  # the second for what has one element
    for change in CHANGES:
        twins.set(**change)
        assert twins.step(1) == 0
    twins.assert_same()


@needs_compiler
@pytest.mark.parametrize("make", [RULES["adamw"], RULES["nadamw"]], ids=["adamw", "nadamw"])
def test_compiled_is_eager_for_parameters_of_any_dimension(make: Make, fresh_dynamo: None):
    twins = Twins(make, [(24,), (4, 6), (), (1,), (0,), (3, 1, 5), (2, 3, 4, 5)])
    assert twins.step(3) <= 2
    for change in CHANGES:
        twins.set(**change)
        assert twins.step(1) == 0
    twins.assert_same()


# NAdamW's product of momenta


def product_of_mu(beta1: float, psi: float, t: int) -> float:
    product = 1.0
    for i in range(1, t + 1):
        product *= beta1 * (1 - 0.5 * 0.96 ** (i * psi))
    return product


@pytest.mark.parametrize("psi", [0.0, 4e-3, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.98, 0.9999])
def test_product_of_momenta_needs_no_loop(beta1: float, psi: float):
    steps = [1, 2, 50, 5000]
    expected = torch.tensor([product_of_mu(beta1, psi, t) for t in steps], dtype=torch.float64)
    got = _torch_mu_product(beta1, psi, torch.tensor(steps, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-300)
    # Only its difference to 1 is used.
    got = _torch_mu_product(beta1, psi, torch.tensor(steps, dtype=torch.float32)).double()
    torch.testing.assert_close(1 - got, 1 - expected, rtol=1e-6, atol=0.0)
