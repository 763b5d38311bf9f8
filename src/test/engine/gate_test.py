import math
from pathlib import Path
from typing import Callable, Dict, List, Optional

import pytest
import torch
from olmo_core.optim import SkipStepOptimizer
from torch._subclasses.fake_tensor import FakeTensorMode

from olmo_optim_ext.engine.gate import CAPACITY, all_finite, decide, gate_state

CPU = torch.device("cpu")

State = Dict[str, torch.Tensor]


def olmo_core(window: int, sigma_factor: float) -> SkipStepOptimizer:
    param = torch.nn.Parameter(torch.zeros(1))
    return SkipStepOptimizer(
        [param],
        {},
        rolling_interval_length=window,
        sigma_factor=sigma_factor,  # type: ignore[arg-type]
    )


def random_values(n: int, seed: int) -> torch.Tensor:
    """A noisy curve that falls, with spikes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, generator=generator)
    spikes = 8 * (torch.rand(n, generator=generator) < 0.03)
    return 3 + 2 * torch.exp(-torch.arange(n) / 50) + 0.3 * noise + spikes


def scalars(values: List[float]) -> List[torch.Tensor]:
    return list(torch.tensor(values).unbind())


def record(state: State, values: List[float], window: int = 128, sigma: float = 6) -> List[bool]:
    """What the gate says to each of some losses."""
    return [bool(decide(state, loss, None, window, sigma)) for loss in scalars(values)]


# The same decisions as OLMo-core's


@pytest.mark.parametrize("given", ["loss", "norm", "both"])
@pytest.mark.parametrize("window", [2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 128, 1024])
def test_decisions_are_those_of_olmo_core(window: int, given: str):
    n = 1200 if window == 1024 else max(200, 3 * window)
    for sigma_factor in (1.5,) if window == 1024 else (0.5, 1.5, 6):
        losses = random_values(n, seed=window)
        norms = random_values(n, seed=window + 1) * 0.1
        reference, state = olmo_core(window, sigma_factor), gate_state(CPU)
        decisions = []
        for step, (loss, norm) in enumerate(zip(losses.unbind(), norms.unbind())):
            # OLMo-core always needs a loss, but treats both alike.
            reference.latest_loss = norm if given == "norm" else loss
            if given == "both":
                reference.latest_grad_norm = norm
            got = decide(
                state,
                None if given == "norm" else loss,
                None if given == "loss" else norm,
                window,
                sigma_factor,
            )
            assert got.shape == () and got.dtype == torch.bool
            if step == 1:
                # Of one value OLMo-core has the standard deviation NaN, and skips.
                assert got.item()
            else:
                assert got.item() == bool(reference.get_step_factor()), step
            decisions.append(bool(got))
        assert True in decisions[window:] and (False in decisions or sigma_factor > 2)


def test_one_value_out_of_its_range_is_enough():
    for loss, norm, expected in ((1.0, 1.0, True), (9.0, 1.0, False), (1.0, 9.0, False)):
        state = gate_state(CPU)
        for value in scalars([1.0, 1.1, 0.9, 1.0]):
            assert decide(state, value, value, 4, 6)
        assert decide(state, torch.tensor(loss), torch.tensor(norm), 4, 6).item() == expected


def test_only_values_above_the_mean_are_spikes():
    assert record(gate_state(CPU), [1.0, 1.1, 0.9, 1.0, -50.0], window=4)[-1]


@pytest.mark.parametrize("n", [64, 100, 127, 128, 200])
@pytest.mark.parametrize("spike", [1e6, 1e20, 1e28, 1e30, 1e37, 3e38])
def test_huge_finite_values_are_spikes(spike: float, n: int):
    values = random_values(n, seed=n).clamp(max=4).tolist()
    assert record(gate_state(CPU), [*values, spike], 128)[-1] is False


# Where it differs from OLMo-core's


@pytest.mark.parametrize("window", [2, 5, 128, 1024])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 2.7e8])
def test_a_constant_history_gives_no_spike(value: float, window: int):
    n = min(window, 300)
    state = gate_state(CPU)
    assert all(record(state, [value] * n, window))
    if n == window:
        assert record(state, [value * 1.01], window) == [False]


def test_two_values_are_needed_to_judge():
    for window in (2, 3, 4, 5, 6, 7):
        assert record(gate_state(CPU), [1.0, 1e6], window) == [True, True]
        assert record(gate_state(CPU), [1.0, 1.0, 1e6], window) == [True, True, False]
    assert record(gate_state(CPU), [1.0, 1.0, 1e6], 8) == [True, True, True]
    assert record(gate_state(CPU), [1.0, 1.0, 1.0, 1e6], 8) == [True, True, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("before", [0, 1, 10])
def test_what_is_not_finite_is_rejected_and_not_recorded(before: int, row: int, bad: float):
    state, reference = gate_state(CPU), gate_state(CPU)
    values = random_values(before + 20, seed=1).clamp(max=4).unbind()
    for value in values[:before]:
        for each in (state, reference):
            decide(each, value, value, 8, 6)
    kept = {name: x.clone() for name, x in state.items()}
    pair = [values[before], values[before]]
    pair[row] = torch.tensor(bad)
    assert not decide(state, pair[0], pair[1], 8, 6)
    assert state["gate_count"][row] == before
    assert torch.equal(state["gate_history"][row], kept["gate_history"][row])
    # The other one is a fact, whatever this one was.
    assert state["gate_count"][1 - row] == before + 1
    assert state["gate_history"][1 - row, -1] == values[before]
    # So the steps after it are judged as if it had never been.
    for value in values[before + 1 :]:
        loss, norm = (value, None) if row == 0 else (None, value)
        got, expected = (decide(each, loss, norm, 8, 6) for each in (state, reference))
        assert got.item() == expected.item()


def test_finite_spikes_are_recorded():
    state = gate_state(CPU)
    assert record(state, [1.0, 1.1, 0.9, 1.0, 50.0], 4)[-1] is False
    assert state["gate_history"][0, -1] == 50.0 and state["gate_count"][0] == 5
    # Else a new regime would be skipped for ever.
    assert record(state, [50.0, 50.1, 49.9, 50.0], 4)[-1]


# The history


def test_history_shifts_to_the_left():
    state = gate_state(CPU)
    assert set(state) == {"gate_count", "gate_history"}
    for loss, norm in zip(scalars([1.0, 2.0, 3.0]), scalars([10.0, 20.0, 30.0])):
        decide(state, loss, norm, 8, 6)
    decide(state, torch.tensor(4.0), None, 8, 6)
    assert state["gate_count"].tolist() == [4, 3]
    assert state["gate_history"][0, -5:].tolist() == [0, 1, 2, 3, 4]
    assert state["gate_history"][1, -5:].tolist() == [0, 0, 10, 20, 30]
    assert not state["gate_history"][:, :-5].any()


def test_history_keeps_the_latest_values_only():
    state = gate_state(CPU)
    for value in range(CAPACITY + 10):
        decide(state, torch.tensor(float(value)), None, 8, 6)
    assert state["gate_count"].tolist() == [CAPACITY + 10, 0]
    expected = torch.arange(10, CAPACITY + 10).float()
    assert torch.equal(state["gate_history"][0], expected)


def test_only_the_window_counts():
    old, recent = [100.0, 0.0] * 20, [1.0, 1.1, 0.9, 1.0]
    state = gate_state(CPU)
    record(state, old + recent, 4)
    assert record(state, [3.0], 4) == [False]
    state = gate_state(CPU)
    record(state, old + recent, 4)
    # A run may continue with another window.
    assert record(state, [3.0], 40) == [True]


def test_values_may_have_any_dtype_and_one_element():
    for dtype in (torch.float64, torch.bfloat16):
        state = gate_state(CPU)
        got = decide(state, torch.ones(1, dtype=dtype), torch.ones((), dtype=dtype), 8, 6)
        assert got.shape == () and state["gate_history"].dtype == torch.float32
        assert state["gate_history"][:, -1].tolist() == [1.0, 1.0]


def test_recording_keeps_the_tensors():
    # A checkpoint is loaded into them.
    state = gate_state(CPU)
    before = dict(state)
    decide(state, torch.ones(()), None, 8, 6)
    assert all(state[name] is before[name] for name in before)


# Gradients


def finite(*grads: torch.Tensor) -> bool:
    out = all_finite([torch.zeros(g.shape) for g in grads], grads)
    assert out.shape == () and out.dtype == torch.bool
    return bool(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_one_bad_element_of_one_gradient_is_found(place: int, bad: float, dtype: torch.dtype):
    grads = [torch.ones(7), torch.ones(3, 4, dtype=dtype), torch.ones(2)]
    assert finite(*grads)
    grads[1].view(-1)[place] = bad
    assert not finite(*grads)
    assert not finite(grads[1])


def test_infinities_of_both_signs_do_not_cancel():
    assert not finite(torch.tensor([math.inf, -math.inf]))
    assert not finite(torch.tensor([math.inf]), torch.tensor([-math.inf]))
    assert not finite(torch.tensor([1.0, -math.inf, 2.0, math.inf]).bfloat16())


def test_huge_gradients_are_finite():
    assert finite(torch.full((100,), 1e30), torch.full((100,), -1e30))
    assert finite(torch.full((100,), 1e30).bfloat16())
    assert finite(torch.full((100,), 60000.0).half())
    # Finite sums of several gradients may not be added up.
    assert finite(torch.full((1,), 3e38), torch.full((1,), 3e38))


def test_empty_gradients_are_finite():
    assert finite(torch.zeros(0), torch.ones(2), torch.zeros(0, 3))


def test_all_ranks_agree_on_what_is_finite(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("all_ranks_agree_on_what_is_finite")


@pytest.mark.parametrize("norm", [None, 1.0])
def test_nothing_is_read_on_the_host(norm: Optional[float]):
    with FakeTensorMode():
        grads = [torch.ones(3), torch.ones(2, 2)]
        all_finite(grads, grads)
        grad_norm = None if norm is None else torch.full((), norm)
        decide(gate_state(CPU), torch.ones(()), grad_norm, 8, 6)
