"""
The places in a comparison, which trials of Optuna's fill: a run that is to be made is a *slot*, by
whose name trials are found. A trial that ended without a result leaves its slot to another.
"""

import math
from enum import Enum
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from optuna.trial import FrozenTrial, TrialState

from .comparison import Comparison

__all__ = [
    "ERROR",
    "SEED",
    "SETTLED",
    "SLOT",
    "Slot",
    "SlotState",
    "best",
    "by_slot",
    "is_sampled",
    "rounded",
    "startup",
    "state_of",
    "wanted",
]

SEED, SLOT, ERROR = "seed", "slot", "error"
"""Attributes of trials; ``error`` tells one that failed from one that was given up."""


class SlotState(Enum):
    missing = "missing"
    waiting = "waiting"
    running = "running"
    complete = "complete"
    diverged = "diverged"
    pruned = "pruned"
    failed = "failed"


SETTLED = (SlotState.complete, SlotState.diverged, SlotState.pruned, SlotState.failed)


class Slot(NamedTuple):
    """A run that is to be made. Without ``lr`` the study samples one."""

    name: str
    seed: int
    lr: Optional[float]


def wanted(comparison: Comparison, arm: str, trials: Dict[str, List[FrozenTrial]]) -> List[Slot]:
    """
    The runs of an arm, in the order in which they are made.

    With ``tune`` learning rates are sampled for the first seed, and the best gets the other seeds:
    as many runs as the grid has.

    :param trials: Of the arm, by slot.
    """
    own, (first, *others) = comparison.own_rate(arm), comparison.seeds
    if not comparison.tune:
        rates = sorted(comparison.rates[arm], key=lambda lr: (abs(_octaves(lr, own)), lr))
        return [
            Slot(f"lr-{lr:.6g}/seed-{seed}", seed, lr) for seed in comparison.seeds for lr in rates
        ]
    sampled = [Slot(f"sample-{i}", first, None) for i in range(samples(comparison))]
    sampled[0] = sampled[0]._replace(lr=_inside(own, comparison.rates[arm]))
    if not all(state_of(trials.get(slot.name, [])) in SETTLED for slot in sampled):
        return sampled
    found = best([trial for slot in sampled for trial in trials[slot.name]])
    if found is None:
        return sampled
    lr = rounded(found[1])
    return sampled + [Slot(f"best-{lr:.6g}/seed-{seed}", seed, lr) for seed in others]


def best(trials: Iterable[FrozenTrial]) -> Optional[Tuple[float, float]]:
    """The lowest loss and its learning rate."""
    losses = [
        (trial.value, trial.params["lr"])
        for trial in trials
        if trial.state == TrialState.COMPLETE
        if trial.value is not None and math.isfinite(trial.value)
    ]
    return min(losses, default=None)


def samples(comparison: Comparison) -> int:
    return comparison.budget - (len(comparison.seeds) - 1)


def startup(comparison: Comparison) -> int:
    # Optuna's 10 would be most of the budget.
    return max(2, samples(comparison) // 3)


def is_sampled(slot: str) -> bool:
    return slot.startswith("sample-")


def rounded(lr: float) -> float:
    """A sampled learning rate with as many digits as its folder's name can have."""
    return float(f"{lr:.4g}")


def _octaves(lr: float, own: float) -> float:
    return math.log2(lr / own)


def _inside(lr: float, rates: Sequence[float]) -> float:
    return min(max(lr, rates[0]), rates[-1])


def by_slot(trials: Sequence[FrozenTrial]) -> Dict[str, List[FrozenTrial]]:
    """Trials in their order, by the name of their slot."""
    found: Dict[str, List[FrozenTrial]] = {}
    for trial in trials:
        if (name := trial.user_attrs.get(SLOT)) is not None:
            found.setdefault(name, []).append(trial)
    return found


def state_of(trials: Sequence[FrozenTrial]) -> SlotState:
    """The state of a slot by its trials."""
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            diverged = trial.value is None or not math.isfinite(trial.value)
            return SlotState.diverged if diverged else SlotState.complete
        if trial.state == TrialState.PRUNED:
            return SlotState.pruned
    states = {trial.state for trial in trials}
    if TrialState.RUNNING in states:
        return SlotState.running
    if TrialState.WAITING in states:
        return SlotState.waiting
    return SlotState.failed if trials and ERROR in trials[-1].user_attrs else SlotState.missing
