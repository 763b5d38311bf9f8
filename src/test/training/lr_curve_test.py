"""
What a range test tells, on curves whose answer is known.
"""

import math
from typing import List, Optional, Tuple

import numpy as np
import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError

from olmo_optim_ext import SGDConfig
from olmo_optim_ext.training import suggest
from olmo_optim_ext.training.lr_curve import diverged, fit, smoothed
from olmo_optim_ext.training.lr_finder import RangeScheduler

RATES = [*np.geomspace(1e-5, 10.0, 100)]


def falling(at: float, rates: List[float] = RATES) -> np.ndarray:
    """From 6 to 3, steepest per decade at a rate."""
    return 6 - 3 / (1 + np.exp(-3 * np.log10(np.asarray(rates) / at)))


def exploding(at: float, rates: List[float] = RATES) -> np.ndarray:
    """Much from a rate on, nothing before."""
    return np.maximum(0, np.asarray(rates) / at - 1) ** 4


def noise(seed: int, size: float, n: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, n)


def test_the_mean_is_that_of_exponential_weights():
    losses = [3.0, 1.0, 4.0, 1.0, 5.0]
    for n, mean in enumerate(smoothed(losses, beta=0.7), start=1):
        weights = 0.7 ** np.arange(n)[::-1]
        assert mean == pytest.approx(np.average(losses[:n], weights=weights))


def test_the_fit_of_a_line_is_the_line_up_to_its_ends():
    line = 3 - 0.1 * np.log10(RATES)
    curve = fit(RATES, [*line])
    np.testing.assert_allclose(curve.losses, line)
    np.testing.assert_allclose(curve.slopes, -0.1)


@pytest.mark.parametrize("at", [1e-4, 3e-3, 0.1])
def test_the_suggestion_is_where_the_loss_falls_fastest(at):
    found = suggest(RATES, [*falling(at)])
    assert found.lr == found.steepest == pytest.approx(at, rel=0.1)
    assert found.diverged_at is None


@pytest.mark.parametrize("n", [60, 100, 400])
def test_noise_moves_the_suggestion_by_less_than_a_factor_of_two(n):
    rates = [*np.geomspace(1e-5, 10.0, n)]
    for seed in range(20):
        found = suggest(rates, [*(falling(3e-3, rates) + noise(seed, 0.15, n))])
        assert found.lr is not None and abs(math.log2(found.lr / 3e-3)) < 1, seed


@pytest.mark.parametrize("end", [None, 1e6, math.inf, math.nan], ids=str)
def test_a_divergence_at_the_end_changes_nothing_before_it(end: Optional[float]):
    curve = falling(3e-3) + exploding(0.3)
    stop = next(n for n in range(1, 101) if diverged(curve[:n]))
    losses = [*curve[:stop], *([] if end is None else [end])]
    found = suggest(RATES[: len(losses)], losses)
    assert found.lr == pytest.approx(3e-3, rel=0.1)
    assert found.minimum is not None and 0.05 < found.minimum < 0.5
    assert found.diverged_at == RATES[len(losses) - 1]


def test_a_fall_back_from_a_spike_is_no_progress():
    spike = 3 * np.exp(-0.5 * (np.log10(RATES) / 0.2) ** 2)
    assert suggest(RATES, [*(falling(3e-3) + spike)]).lr == pytest.approx(3e-3, rel=0.1)


def test_a_test_diverges_far_above_its_best_or_where_a_loss_is_not_finite():
    assert not diverged([])
    assert diverged([2.0, math.nan])
    assert not diverged([6.0] * 20 + [8.0])  # a single one
    assert diverged([6.0] * 20 + [9.5] * 12)  # above 1.5 times the start
    assert diverged([6.0] * 5 + [0.1] * 60 + [1.0] * 10)  # above 4 times the best
    assert not diverged([6.0, 5.0, 3.0, 2.0, 2.0, 3.0])


NOTHING = {
    "flat": (np.full(100, 5.0), "never fell clearly below 5, .*go to higher rates"),
    "flat and noisy": (5 + noise(0, 0.3), "never fell clearly .*noise is 0.*take more steps"),
    "diverges at once": (
        [*(5 + exploding(1e-5)[:20])],
        "never fell clearly below .*, before it diverged: begin at a lower rate",
    ),
    "few losses": ([5.0, 5.0, math.inf], "ended after 2 losses.*begin at a lower rate"),
    "few steps": ([5.0, 4.0, 3.0], "ended after 3 losses.*take more steps"),
    "falls at the end": (falling(30.0), "fastest at the highest rate: go to higher ones"),
    "falls at the start": (falling(1e-6), "fastest at the lowest rate: begin at a lower one"),
}


@pytest.mark.parametrize("losses,reason", NOTHING.values(), ids=NOTHING)
def test_without_an_answer_it_says_why_and_what_to_do(losses, reason):
    found = suggest(RATES[: len(losses)], [*losses])
    assert found.lr is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_noise_alone_gives_no_suggestion():
    given = [suggest(RATES, [*(5 + noise(seed, 0.2))]).lr for seed in range(200)]
    assert sum(lr is not None for lr in given) <= 2


def test_a_loss_that_falls_to_the_end_has_no_minimum():
    found = suggest(RATES, [*falling(1.0)])
    assert found.lr == pytest.approx(1.0, rel=0.3)
    assert found.minimum is None


def descend(curvature: float, steps: int = 100) -> Tuple[List[float], List[float]]:
    """
    Stochastic gradient descent on a quadratic, until it diverges. Without noise the steepest
    directions would be at zero when their bound is passed, and take long to come back.

    :param curvature: The largest; others go down to a hundredth of it.
    """
    generator = torch.Generator().manual_seed(0)
    curvatures = torch.logspace(-2, 0, 10, dtype=torch.float64) * curvature
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones_like(curvatures))])
    optim = SGDConfig(lr=0.1, momentum=0.0, weight_decay=0.0).build(model)
    schedule = RangeScheduler(steps=steps)
    rates: List[float] = []
    losses: List[float] = []
    while not diverged(losses) and len(losses) < steps:
        step = len(losses) + 1
        error = torch.randn(10, generator=generator, dtype=torch.float64)
        model[0].grad = curvatures * (model[0].detach() + 0.1 * error)
        optim.param_groups[0]["lr"] = schedule.get_lr(0.1, step, steps)
        optim.step()
        rates.append(0.1 * schedule.factor(step))
        losses.append(0.5 * float((curvatures * model[0].detach() ** 2).sum()))
    return rates, losses


@pytest.mark.parametrize("curvature", [0.3, 1.0, 30.0])
def test_gradient_descent_on_a_quadratic_diverges_beyond_two_over_its_curvature(curvature):
    rates, losses = descend(curvature)
    found = suggest(rates, losses)
    bound = 2 / curvature
    assert found.diverged_at is not None and bound < found.diverged_at < 2 * bound
    assert found.minimum is not None and bound / 4 < found.minimum < bound
    assert found.lr is not None and found.lr < bound / 4


@pytest.mark.parametrize(
    "rates,losses", [([1.0, 2.0], [1.0]), ([1.0, 1.0], [1.0, 1.0]), ([0.0, 1.0], [1.0, 1.0])]
)
def test_rates_must_increase_and_have_a_loss_each(rates, losses):
    with pytest.raises(OLMoConfigurationError, match="suggest: .*increasing rates > 0"):
        suggest(rates, losses)
