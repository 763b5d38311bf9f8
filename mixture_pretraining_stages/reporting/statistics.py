"""
What a comparison of optimizers says, and what it does not: the best rate of each, losses over
seeds, differences to a baseline with intervals, and what it took to get there. For the formulas
see ``plans/report.md``.
"""

import math
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .cost import Cost, cost_of
from .curves import Reached, mean_curve, reach
from .results import COMPLETE, FAILED, Comparison, Results, RunResult

__all__ = [
    "Arm",
    "Difference",
    "Rate",
    "Study",
    "is_adamw",
    "is_tuned",
    "study",
    "t_interval",
]

CONFIDENCE = 0.95
SEEDS_FOR_A_CLAIM = 5
RATES_OF_A_TUNED_ARM = 3

BETTER, WORSE, TIE, TOO_FEW = "better", "worse", "tie", f"needs {SEEDS_FOR_A_CLAIM} seeds"
BASELINE, NOTHING = "baseline", "no result"
NO_BASELINE, NO_PAIRS = "no baseline", "no common seeds"

EDGE = "edge"
SEEDS_MISSING = "seeds missing"
BROKEN_RATE = "broken runs at its rate"

ADAMW = ("adamw", "ext_adamw", "olmo_core.adamw", "olmo_core.skip_step_adamw")


class Difference(NamedTuple):
    """Final loss less that of the baseline, over the seeds that both have."""

    mean: float
    low: Optional[float]
    """Of the 95 % interval; ``None`` with one seed."""
    high: Optional[float]
    seeds: int

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return TOO_FEW
        if self.low <= 0 <= self.high:
            return TIE
        if self.seeds < SEEDS_FOR_A_CLAIM:
            return TOO_FEW
        return BETTER if self.mean < 0 else WORSE


@dataclass(frozen=True)
class Rate:
    """The runs of an arm at one learning rate."""

    lr: Optional[float]
    runs: Sequence[RunResult]

    @property
    def finished(self) -> List[RunResult]:
        """Complete, and with a finite loss."""
        return [run for run in self.runs if run.state == COMPLETE and not run.broken]

    @property
    def broken(self) -> List[RunResult]:
        return [run for run in self.runs if run.broken]

    @property
    def losses(self) -> Dict[Optional[int], float]:
        """Final validation loss by seed."""
        return {run.seed: run.final.loss for run in self.finished if run.final is not None}

    @property
    def mean(self) -> Optional[float]:
        return fmean(self.losses.values()) if self.losses else None

    @property
    def sd(self) -> Optional[float]:
        """Over seeds, with ``n - 1``."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Arm:
    """An optimizer at the best of its rates, and how that compares."""

    name: str
    rates: Sequence[Rate]
    best: Optional[Rate]
    flags: Sequence[str] = ()
    cost: Cost = Cost(None, None, None, None)
    difference: Optional[Difference] = None
    reached: Optional[Reached] = None
    verdict: str = NOTHING
    missing: int = 0
    """Runs that were asked for, and of which there is no trace."""
    seeds: int = 0
    """That were asked for, or that any of its runs has."""

    @property
    def broken_rates(self) -> List[Rate]:
        """At which a run failed or diverged."""
        return [rate for rate in self.rates if rate.broken]

    @property
    def runs(self) -> List[RunResult]:
        return [run for rate in self.rates for run in rate.runs]

    def count(self, state: str) -> int:
        """Runs in a state; those that are complete without a finite loss have failed."""
        states = [FAILED if run.broken else run.state for run in self.runs]
        return states.count(state)


@dataclass(frozen=True)
class Study:
    """All arms, the best first; those without a result last."""

    arms: Sequence[Arm]
    baseline: Optional[Arm] = None
    results: Results = field(default_factory=lambda: Results([]))

    @property
    def comparison(self) -> Optional[Comparison]:
        return self.results.comparisons[0] if self.results.comparisons else None


def study(results: Results) -> Study:
    """Compare all runs."""
    by_arm: Dict[str, List[RunResult]] = {}
    for comparison in results.comparisons:
        by_arm.update({arm: [] for arm in comparison.lrs})
    for run in results.runs:
        by_arm.setdefault(run.arm, []).append(run)
    asked = {arm: c for c in results.comparisons for arm in c.lrs}
    arms = [_arm(name, runs, asked.get(name)) for name, runs in by_arm.items()]
    baseline = _baseline(arms, results.comparisons)
    arms = [_compared(arm, baseline) for arm in arms]
    arms.sort(key=_loss)
    baseline = next((arm for arm in arms if baseline and arm.name == baseline.name), None)
    return Study(arms, baseline, results)


def _arm(name: str, runs: Sequence[RunResult], asked: Optional[Comparison]) -> Arm:
    grid = list(asked.lrs[name]) if asked and not asked.tune else []
    by_rate: Dict[Optional[float], List[RunResult]] = {lr: [] for lr in grid}
    for run in runs:
        by_rate.setdefault(_same(run.lr, by_rate), []).append(run)
    rates = [
        Rate(lr, its) for lr, its in sorted(by_rate.items(), key=lambda item: item[0] or -math.inf)
    ]
    best = _best(rates)
    seeds = set(asked.seeds) if asked else {run.seed for run in runs}
    missing = 0
    if asked and not asked.tune:
        there = {(rate.lr, run.seed) for rate in rates for run in rate.runs}
        missing = sum((lr, seed) not in there for lr in by_rate for seed in seeds)
    flags = []
    if best is not None:
        searched = asked.lrs[name] if asked and asked.tune else []
        if (len(rates) > 1 and best in (rates[0], rates[-1])) or _is_near_an_end(best, searched):
            flags.append(EDGE)
        if best.broken:
            flags.append(BROKEN_RATE)
        if seeds - best.losses.keys():
            flags.append(SEEDS_MISSING)
    return Arm(
        name,
        rates,
        best,
        flags,
        cost_of(best.finished if best is not None else []),
        missing=missing,
        seeds=len(seeds),
    )


def _same(lr: Optional[float], known: Mapping[Optional[float], object]) -> Optional[float]:
    """A rate as it is known already, if it was only rounded when it was written."""
    near = [each for each in known if each and lr and math.isclose(each, lr, rel_tol=1e-6)]
    return near[0] if near else lr


def _best(rates: Sequence[Rate]) -> Optional[Rate]:
    """
    The rate with the lowest mean, among those with no broken run and with as many finished seeds as
    any: a mean over the seeds that survived, or over fewer, would flatter it. If runs broke at all
    rates, among those with most finished.
    """
    finished = [rate for rate in rates if rate.losses]
    whole = [rate for rate in finished if not rate.broken] or finished
    most = max((len(rate.losses) for rate in whole), default=0)
    means = [(rate.mean, i) for i, rate in enumerate(whole) if len(rate.losses) == most]
    return whole[min((mean, i) for mean, i in means if mean is not None)[1]] if means else None


def _is_near_an_end(best: Rate, grid: Sequence[float]) -> bool:
    """
    Whether the best rate of a search lies within half a step of the grid, or half a factor of 2, of
    an end of the range in which it searched. Samples crowd around an optimum, so that the last of
    many near an end need not be the best although a better one lies beyond.
    """
    if len(grid) < 2 or best.lr is None:
        return False
    half = min(2.0, (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))) ** 0.5
    return best.lr < grid[0] * half or best.lr > grid[-1] / half


def _loss(arm: Arm) -> float:
    mean = None if arm.best is None else arm.best.mean
    return math.inf if mean is None else mean


def is_adamw(arm: Arm) -> bool:
    return any(run.optimizer in ADAMW for run in arm.runs) or arm.name in ADAMW


def is_tuned(arm: Arm) -> bool:
    """Whether at least three rates were tried and the best is not at their edge."""
    return len(arm.rates) >= RATES_OF_A_TUNED_ARM and arm.best is not None and EDGE not in arm.flags


def _baseline(arms: Sequence[Arm], comparisons: Sequence[Comparison]) -> Optional[Arm]:
    for comparison in comparisons:
        return next((arm for arm in arms if arm.name == comparison.baseline), None)
    adamw = [arm for arm in arms if is_adamw(arm) and arm.best is not None]
    return min(adamw, key=_loss, default=None)


def _compared(arm: Arm, baseline: Optional[Arm]) -> Arm:
    if arm.best is None:
        return arm
    if baseline is None or baseline.best is None or baseline.best.mean is None:
        return replace(arm, verdict=NO_BASELINE)
    reached = reach(mean_curve(arm.best.finished), baseline.best.mean)
    if arm.name == baseline.name:
        return replace(arm, reached=reached, verdict=BASELINE)
    difference = _difference(arm.best.losses, baseline.best.losses)
    verdict = difference.verdict if difference else NO_PAIRS
    return replace(arm, difference=difference, reached=reached, verdict=verdict)


def _difference(
    losses: Mapping[Optional[int], float], baseline: Mapping[Optional[int], float]
) -> Optional[Difference]:
    paired = [loss - baseline[seed] for seed, loss in losses.items() if seed in baseline]
    if not paired:
        return None
    low, high = t_interval(paired) or (None, None)
    return Difference(fmean(paired), low, high, len(paired))


def t_interval(values: Sequence[float]) -> Optional[Tuple[float, float]]:
    """
    ``mean -+ t sd / sqrt(n)`` with the quantile ``t`` of Student's distribution for 95 % and
    ``n - 1`` degrees of freedom; ``None`` for a single value.
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half
