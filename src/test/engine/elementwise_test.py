import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters

from olmo_optim_ext import AdamW, CautiousAdamW, NAdamW, NesterovForm
from olmo_optim_ext.elementwise.nadamw import _torch_mu_product
from olmo_optim_ext.engine import elementwise, write
from olmo_optim_ext.engine.elementwise import (
    ElementwiseOptimizer,
    ElementwiseRule,
    WholeSums,
    bias_correction,
)

Make = Callable[..., ElementwiseOptimizer]

FIELDS: Dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)

RULES: Dict[str, Make] = {
    "adamw": lambda params, **fields: AdamW(params, **{**FIELDS, **fields}),
    "nadamw": lambda params, **fields: NAdamW(params, **{**FIELDS, **fields}),
    "nadamw_torch": lambda params, **fields: NAdamW(
        params, nesterov=NesterovForm.torch, **{**FIELDS, **fields}
    ),
    "cautious_adamw": lambda params, **fields: CautiousAdamW(params, **{**FIELDS, **fields}),
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


# What the engine does with an update


def follow_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Any]:
    return group["lr"], step


def follow(
    param: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    lr, step = scalars.unbind()
    return lr * grad * step, total + grad


class Follow(ElementwiseOptimizer):
    """Steps ``lr * grad * step``, which is exact for the numbers below."""

    rule = ElementwiseRule(("total",), follow_scalars, follow)

    def __init__(self, params: Any, **fields: Any):
        defaults = {key: fields.pop(key, 0.0) for key in ("lr", "weight_decay")}
        super().__init__(params, defaults, **fields)


def halves(shape: Sequence[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-20, 20, tuple(shape), generator=generator) * 0.5


@pytest.mark.parametrize("cautious_weight_decay", [False, True])
def test_what_a_rule_says_is_subtracted_after_decay(cautious_weight_decay: bool):
    start, grad = halves((4, 6), 0), halves((4, 6), 1)
    param = nn.Parameter(start.clone())
    fields = dict(lr=0.5, weight_decay=0.5, cautious_weight_decay=cautious_weight_decay)
    optim = Follow([param], **fields)
    expected = start
    for step in (1, 2):
        param.grad = grad.clone()
        optim.step()
        decays = grad * expected >= 0 if cautious_weight_decay else torch.tensor(True)
        expected = torch.where(decays, 0.75 * expected, expected) - 0.5 * step * grad
        assert torch.equal(param, expected)
        assert torch.equal(optim.state[param]["total"], step * grad)


def test_each_parameter_has_its_own_clock_and_each_group_its_own_fields():
    first, second, third = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    optim = Follow([{"params": [first, second]}, {"params": [third], "lr": 2.0}], lr=1.0)
    for have_grads in ((True, True, True), (False, True, False), (False, True, True)):
        for param, has in zip((first, second, third), have_grads):
            param.grad = torch.ones(3) if has else None
        optim.step()
    assert first.tolist() == [-1.0] * 3
    assert second.tolist() == [-1.0 - 2.0 - 3.0] * 3
    assert third.tolist() == [-2.0 - 4.0] * 3


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@every_rule
def test_chunks_do_not_change_the_update(
    make: Make, state_dtype: str, monkeypatch: pytest.MonkeyPatch
):
    runs = []
    for size in (2**16, 7):
        monkeypatch.setattr(write, "CHUNK", size)
        params = [nn.Parameter(randn(shape, 0)) for shape in ((5, 9), (3,), (7, 2))]
        optim = make(params, state_dtype=state_dtype)
        for step in range(3):
            for param in params:
                param.grad = randn(param.shape, step + 1)
            optim.step()
        runs.append([*params, *(x for p in params for x in optim.state[p].values())])
    assert len(runs[0]) == 3 * (1 + 3) + 2  # step and two moments, and once those of the gate
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_rule
def test_a_bad_gradient_of_one_parameter_leaves_all_as_they_are(make: Make, bad: float):
    params = [nn.Parameter(randn((4, 6), seed)) for seed in range(2)]
    optim = make(params)
    for step, value in enumerate([1.0, bad, 1.0]):
        before = [p.detach().clone() for p in params]
        state = [{k: x.clone() for k, x in optim.state[p].items()} for p in params]
        for param in params:
            param.grad = randn(param.shape, step)
        assert params[1].grad is not None
        params[1].grad[2, 3] *= value
        optim.step()
        assert optim.get_step_factor() == (value == 1.0)
        for param, old, its in zip(params, before, state):
            assert torch.equal(param, old) == (value != 1.0)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optim.state[param][name], its[name]) == (value != 1.0), name
    assert optim.state[params[0]]["step"] == 2


def average_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Any]:
    return (group["lr"],)


def average(
    param: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    return 0 * grad, mean + (grad - mean) * 0.001


class Average(ElementwiseOptimizer):
    rule = ElementwiseRule(("mean",), average_scalars, average)

    def __init__(self, params: Any, **engine: Any):
        super().__init__(params, dict(lr=0.1, weight_decay=0.0), **engine)


def test_slow_averages_in_bfloat16_have_no_drift():
    param = nn.Parameter(torch.zeros(4000))
    optim = Average([param], state_dtype="bfloat16")
    for _ in range(700):
        param.grad = torch.ones(4000)
        optim.step()
    mean = optim.state[param]["mean"]
    assert mean.dtype == torch.bfloat16
    # Rounded to nearest it would stop at a quarter.
    assert abs(mean.double().mean().item() - (1 - 0.999**700)) < 0.005


# Sums over whole parameters


def share_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Any]:
    return group["lr"], step


def share_sums(
    param: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    lr, step = scalars.unbind()
    return (total + grad).abs().sum() * step, (param > 0).sum()


def share_more(sums: Sequence[Any], numel: Any, scalars: Sequence[Any]) -> Tuple[Any, ...]:
    lr, _ = scalars
    return sums[0] * lr, sums[1] / numel


def share(
    param: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    _, _, norm, positive = scalars.unbind()
    total = total + grad
    return total / norm + positive, total


class Share(ElementwiseOptimizer):
    """Steps by the share of each element in the whole."""

    rule = ElementwiseRule(("total",), share_scalars, share, WholeSums(share_sums, share_more))

    def __init__(self, params: Any, **engine: Any):
        super().__init__(params, dict(lr=0.5, weight_decay=0.0), **engine)


def shared_out(
    param: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, step: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    total = total + grad
    norm = total.abs().sum() * step * 0.5
    return param - (total / norm + (param > 0).sum() / param.numel()), total


@pytest.mark.parametrize("size", [2**16, 7])
def test_sums_are_over_the_whole_parameter(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "CHUNK", size)
    params = [nn.Parameter(halves(shape, 0)) for shape in ((5, 9), (3,), (7, 2), (0, 4))]
    expected = [(p.detach().clone(), torch.zeros(p.shape)) for p in params]
    optim = Share(params)
    for step in (1, 2, 3):
        for index, param in enumerate(params):
            param.grad = halves(param.shape, step)
            expected[index] = shared_out(expected[index][0], param.grad, expected[index][1], step)
        optim.step()
    for param, (weight, total) in zip(params, expected):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-6, atol=1e-6)
        assert torch.equal(optim.state[param]["total"], total)


def test_sums_of_a_rule_are_over_all_ranks(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("sums_of_a_rule_are_over_the_whole_parameter")


def test_counts_are_exact_above_what_float32_can_count(monkeypatch: pytest.MonkeyPatch):
    # 2^24 + 1 ones in chunks that are: added in float32, the last one would be lost.
    monkeypatch.setattr(elementwise, "chunks", lambda x: [(0, 1), (1, 2)])
    ones = [torch.tensor(2.0**24), torch.tensor(1.0)]
    sums = WholeSums(lambda *args: (ones[int(args[0].item())],), lambda *args: ())
    param = torch.tensor([0.0, 1.0])
    (total,) = elementwise._sums_in_chunks(
        sums, param, param, [], torch.zeros(2), elementwise.DecayForm.decoupled
    )
    assert total.dtype == torch.float64 and total.item() == 2.0**24 + 1


# Compilation

COMPILERS = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)),
    reason=f"torch.compile needs a C++ compiler, none of {COMPILERS} is on the PATH",
)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    elementwise.forget_compiled()
    yield
    torch._dynamo.reset()
    elementwise.forget_compiled()


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

    def step(self, n: int, bad: Optional[float] = None) -> int:
        """:returns: How many graphs were compiled for it."""
        before = counters["stats"]["unique_graphs"]
        for _ in range(n):
            self.calls += 1
            for index, params in enumerate(zip(self.eager, self.compiled)):
                for param in params:
                    param.grad = randn(param.shape, 100 * self.calls + index)
                    if bad is not None:
                        param.grad.view(-1)[-1] = bad
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


RULES_COMPILED = [RULES["adamw"], RULES["nadamw"], RULES["cautious_adamw"]]

every_compiled_rule = pytest.mark.parametrize(
    "make", RULES_COMPILED, ids=["adamw", "nadamw", "cautious_adamw"]
)


@needs_compiler
@every_compiled_rule
def test_compiled_is_eager_and_one_kernel_serves_all_sizes(make: Make, fresh_dynamo: None):
    twins = Twins(make, [(33, 17), (4, 6), (1, 1), (0, 5), (128, 64), (2, 3)])
    assert twins.step(3) == 1
    for change in CHANGES:
        twins.set(**change)
        assert twins.step(1) == 0
    twins.assert_same()


@needs_compiler
@every_compiled_rule
def test_compiled_is_eager_for_parameters_of_any_dimension(make: Make, fresh_dynamo: None):
    twins = Twins(make, [(24,), (4, 6), (), (1,), (0,), (3, 1, 5), (2, 3, 4, 5)])
    assert twins.step(3) <= 2
    for change in CHANGES:
        twins.set(**change)
        assert twins.step(1) == 0
    twins.assert_same()


@needs_compiler
def test_compiled_sums_are_eager_and_one_kernel_serves_all_sizes(fresh_dynamo: None):
    twins = Twins(Share, [(33, 17), (4, 6), (128, 64), (2, 3)])
    assert 1 <= twins.step(3) <= 2  # inductor may sum small and large parameters differently
    twins.set(lr=0.25)
    assert twins.step(1) == 0
    twins.assert_same()


def test_rules_do_not_share_dynamos_limit_of_recompilations():
    # It is counted per code object, and what is above it runs eagerly.
    compiled: List[Any] = [
        elementwise._compiled(x.rule, x.rule.sums).function for x in (Follow, Share, AdamW, NAdamW)
    ]
    compiled += [elementwise._compiled(Share.rule, None).function]
    compiled += [elementwise._compiled_sums(WholeSums(share_sums, share_more))]
    codes = [x._torchdynamo_orig_callable.__code__ for x in compiled]
    assert len(set(map(id, codes))) == 6


@needs_compiler
def test_compiled_skips_what_eager_skips(fresh_dynamo: None):
    twins = Twins(RULES["adamw"], [(33, 17), (4, 6)])
    twins.step(1)
    kept = [p.detach().clone() for p in twins.compiled]
    assert twins.step(1, bad=float("nan")) == 0
    assert all(torch.equal(p, k) for p, k in zip(twins.compiled, kept))
    assert twins.step(1) == 0
    twins.assert_same()
    assert not torch.equal(twins.compiled[0], kept[0])


@needs_compiler
def test_compiled_bfloat16_state_is_rounded_as_eager(fresh_dynamo: None):
    twins = Twins(
        lambda params, **fields: Follow(params, lr=0.5, state_dtype="bfloat16", **fields),
        [(33, 17), (4, 6), (128, 64)],
    )
    assert twins.step(1) == 1
    assert twins.step(3) == 0
    for eager, compiled in zip(twins.eager, twins.compiled):
        totals = [o.state[p]["total"] for o, p in zip(twins.optims, (eager, compiled))]
        assert torch.equal(*totals) and totals[0].dtype == torch.bfloat16


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
