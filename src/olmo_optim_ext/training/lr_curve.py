"""
What a learning-rate range test tells: when the loss has diverged, and which rate to begin with.

Numbers in, numbers out. The loss of a batch is noisy, so it is smoothed in two ways: while the test
runs by a mean over the steps before, which lags, and when it is over by a line through the
neighbours on both sides, which does not. A mean that lags by ``n`` steps would give rates too
high by the factor by which the rate grows in ``n`` steps.
"""

import math
from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Sequence

import numpy as np
from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["Fit", "LRSuggestion", "diverged", "fit", "highest", "smoothed", "suggest"]

BETA = 0.8
"""Of :func:`smoothed`: a mean over about five steps. A test may grow the rate 2x in that time."""

FIRST = 5
"""Over how many losses the one at the start is taken."""

WIDTH = 0.25
"""
Standard deviation of the weights of :func:`fit`, in decades: rates are known no better than within
a factor of two.
"""

FEWEST = 10
"""Losses below which nothing is suggested."""


def smoothed(losses: Sequence[float], beta: float = BETA) -> List[float]:
    """
    ``m <- beta m + (1 - beta) loss``, divided by ``1 - beta^t``, as fastai's recorder does (with
    ``beta`` 0.98).
    """
    out: List[float] = []
    mean = 0.0
    for t, loss in enumerate(losses, start=1):
        mean = beta * mean + (1 - beta) * loss
        out.append(mean / (1 - beta**t))
    return out


def diverged(losses: Sequence[float]) -> bool:
    """
    Whether the last loss is not finite, or the smoothed one above 1.5 times that at the start or,
    as in fastai, above 4 times its best.
    """
    if len(losses) == 0:
        return False
    if not math.isfinite(losses[-1]):
        return True
    means = smoothed(losses)
    return means[-1] > min(highest(losses), 4 * min(means))


def highest(losses: Sequence[float]) -> float:
    """1.5 times the loss at the start: above it a test is over."""
    return 1.5 * float(np.mean(losses[:FIRST]))


class Fit(NamedTuple):
    """The loss against the logarithm of the rate, ``(n,)`` each."""

    losses: np.ndarray
    slopes: np.ndarray
    """Nats per decade of the rate."""
    width: float
    """In decades: standard deviation of the weights."""


def fit(rates: Sequence[float], losses: Sequence[float]) -> Fit:
    """
    At each rate the line through its neighbours with the least squares, weighted by a Gaussian of
    :data:`WIDTH` decades, or of two steps if that is more.

    :param losses: Finite ones. Those of more than 1.5 times that at the start count as that, or the
        end of a test that diverged would bend all of the curve.
    """
    x, y = np.log10(rates), np.minimum(losses, highest(losses))
    width = max(WIDTH, 2 * (x[-1] - x[0]) / (len(x) - 1))
    distance = x - x[:, None]
    weight = np.exp(-0.5 * (distance / width) ** 2)
    weight /= weight.sum(1, keepdims=True)
    centre, mean = (weight * distance).sum(1), weight @ y
    off = distance - centre[:, None]
    slopes = (weight * off * (y - mean[:, None])).sum(1) / (weight * off**2).sum(1)
    return Fit(mean - slopes * centre, slopes, width)


@dataclass(frozen=True)
class LRSuggestion:
    """Rates in the units of those that were given."""

    lr: Optional[float]
    """
    The rate to begin with: :data:`steepest`, as fastai's ``steep``. ``None`` if the test does not
    tell.
    """

    reason: str
    """Why this one, or why none and what to do."""

    steepest: Optional[float]
    """Where the loss, at a level that it had not reached before, falls fastest per decade."""

    minimum: Optional[float]
    """Where the loss is lowest. ``None`` if it still falls at the highest rate."""

    diverged_at: Optional[float]
    """The rate at which the test was over, as the loss had diverged."""


def suggest(rates: Sequence[float], losses: Sequence[float]) -> LRSuggestion:
    """
    What a range test tells.

    :param rates: Increasing.
    :param losses: For each rate the loss after its step. Those from the first one on that is not
        finite do not count.

    :raises OLMoConfigurationError: If there are not as many rates as losses, or rates do not
        increase.
    """
    if len(rates) != len(losses) or any(not a < b for a, b in zip([0.0, *rates], rates)):
        raise OLMoConfigurationError(
            f"suggest: {len(losses)} losses at {len(rates)} rates are not allowed, allowed is one "
            "at each of increasing rates > 0"
        )
    at = float(rates[-1]) if diverged(losses) else None
    good = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    if good < FEWEST:
        what = "begin at a lower rate" if at is not None else "take more steps"
        reason = f"the test ended after {good} losses, which tell nothing: {what}"
        return LRSuggestion(None, reason, None, None, at)
    return _judge(rates[:good], losses[:good], at)


def _judge(rates: Sequence[float], losses: Sequence[float], at: Optional[float]) -> LRSuggestion:
    curve = fit(rates, losses)
    lowest = int(curve.losses.argmin())
    start = float(np.mean(losses[:FIRST]))
    fall = start - curve.losses[lowest]
    residuals = np.abs(np.minimum(losses, highest(losses)) - curve.losses)
    noise = 1.4826 * float(np.median(residuals))  # the standard deviation, whatever outliers
    if fall < max(3 * noise, 0.01 * start):
        level = f"the loss never fell clearly below {start:.3g}, that at the start"
        if at is not None:
            reason = f"{level}, before it diverged: begin at a lower rate or take more steps"
        else:
            reason = f"{level} (its noise is {noise:.2g}): go to higher rates or take more steps"
        return LRSuggestion(None, reason, None, None, at)

    # A fall back from a spike is no progress.
    record = curve.losses <= np.minimum.accumulate(curve.losses)
    steepest = int(np.where(record, curve.slopes, np.inf).argmin())
    near = 10**curve.width
    minimum = None if at is None and lowest == len(rates) - 1 else float(rates[lowest])
    found = float(rates[steepest])
    if found < rates[0] * near:
        reason = "the loss falls fastest at the lowest rate: begin at a lower one"
        return LRSuggestion(None, reason, found, minimum, at)
    if at is None and found > rates[-1] / near:
        reason = "the loss falls fastest at the highest rate: go to higher ones"
        return LRSuggestion(None, reason, found, minimum, at)
    return LRSuggestion(found, "the loss falls fastest there", found, minimum, at)
