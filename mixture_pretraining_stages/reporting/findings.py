"""
What a comparison found, in words, and what has to be known to judge it.
"""

from typing import Dict, Iterable, List

from .lone_runs import differing_keys
from .results import FAILED, PRUNED, RUNNING
from .statistics import (
    BETTER,
    BROKEN_RATE,
    EDGE,
    NO_PAIRS,
    RATES_OF_A_TUNED_ARM,
    SEEDS_FOR_A_CLAIM,
    SEEDS_MISSING,
    TIE,
    TOO_FEW,
    WORSE,
    Arm,
    Study,
    is_adamw,
    is_tuned,
)

__all__ = ["describe_difference", "describe_loss", "notes", "statement"]


def describe_loss(arm: Arm) -> str:
    """``mean +- standard deviation`` of the final loss."""
    if arm.best is None or arm.best.mean is None:
        return "-"
    spread = "" if arm.best.sd is None else f" ± {arm.best.sd:.4f}"
    return f"{arm.best.mean:.4f}{spread}"


def describe_difference(arm: Arm) -> str:
    """``mean [low, high]`` of the difference to the baseline."""
    if arm.difference is None:
        return "-"
    mean, low, high, _ = arm.difference
    if low is None or high is None:
        return _signed(mean)
    return f"{_signed(mean)} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # no -0.0000


def statement(study: Study) -> List[str]:
    """What was found, a sentence each; ties and what is not known included."""
    baseline = study.baseline
    if baseline is None or baseline.best is None:
        found = ["Nothing is compared: there is no baseline with a result."]
        finished = [arm for arm in study.arms if arm.best is not None]
        if finished:
            found.append(f"Final losses: {_join(_with_loss(arm) for arm in finished)}.")
    else:
        found = [
            f"The baseline, {baseline.name}, ends at a validation loss of "
            f"{describe_loss(baseline)} ({_count(len(baseline.best.losses), 'seed')})."
        ]
        groups: Dict[str, str] = {
            BETTER: "Better than it",
            WORSE: "Worse than it",
            TIE: "Ties, with a difference inside the noise",
            TOO_FEW: f"Nothing is claimed, with fewer than {SEEDS_FOR_A_CLAIM} seeds, of",
            NO_PAIRS: "Not compared, as they have no seed in common with it",
        }
        for verdict, words in groups.items():
            arms = [arm for arm in study.arms if arm.verdict == verdict]
            if arms:
                told = _join(_with_difference(arm, len(arms)) for arm in arms)
                found.append(f"{words}: {told}.")
    lost = [arm.name for arm in study.arms if arm.best is None]
    if lost:
        found.append(f"Without a result: {_join(lost)}.")
    return found


def _with_difference(arm: Arm, among: int) -> str:
    # More numbers than that are read in a table.
    if arm.difference is None or among > 6:
        return arm.name
    return f"{arm.name} ({describe_difference(arm)})"


def _with_loss(arm: Arm) -> str:
    return f"{arm.name} {describe_loss(arm)}"


def notes(study: Study) -> List[str]:
    """What has to be known to judge the numbers, a sentence each; the gravest first."""
    found = [*_on_baseline(study), *_on_budgets(study), *_on_runs(study), *_on_flags(study)]
    if any(len(arm.rates) > 1 for arm in study.arms):
        found.append(
            "The rate of each arm is the one with the lowest mean over the same seeds that its "
            "loss is reported for, which flatters all arms a little, and more with more rates."
        )
    claims = [arm for arm in study.arms if arm.difference is not None]
    if len(claims) > 4:
        found.append(
            f"Intervals are for one comparison each: if all {len(claims)} arms were like the "
            f"baseline, about {0.05 * len(claims):.1f} would still be told from it by chance."
        )
    if any(arm.reached is not None for arm in study.arms):
        found.append(
            "Steps and time to the baseline's loss are read off the curves of whole runs: with a "
            "decaying learning rate a shorter run would decay earlier and may get there sooner."
        )
    if any(arm.cost.step_seconds for arm in study.arms):
        found.append(
            "Times are of whatever else ran on the machine, runs of the same comparison included."
        )
    return found


def _on_baseline(study: Study) -> List[str]:
    baseline, found = study.baseline, []
    asked = study.comparison.baseline if study.comparison else None
    if baseline is None:
        found.append(
            f"The baseline {asked} has no runs." if asked else "No AdamW is among the runs."
        )
    elif not is_adamw(baseline):
        tuned = [arm.name for arm in study.arms if is_adamw(arm) and is_tuned(arm)]
        found.append(
            f"The baseline is {baseline.name}, no AdamW"
            + (f"; {_join(tuned)} is a tuned one." if tuned else ", and no tuned AdamW is there.")
        )
    elif not is_tuned(baseline):
        why = f"it has {_count(len(baseline.rates), 'rate')}"
        if len(baseline.rates) >= RATES_OF_A_TUNED_ARM:
            why = "its best rate is at the edge of its grid"
        found.append(f"The baseline {baseline.name} is not a tuned AdamW: {why}.")
    return found


def _on_budgets(study: Study) -> List[str]:
    found = []
    configs = [run.config for run in study.results.runs]
    keys = differing_keys(configs, lambda key: "optimizer." not in key)
    if keys:
        shown = _join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        found.append(f"The runs differ in more than the optimizer: {shown}.")
    tried = sorted({len(arm.rates) for arm in study.arms})
    if len(tried) > 1:
        found.append(
            f"Budgets are not equal: arms have between {tried[0]} and {tried[-1]} learning rates."
        )
    devices = {
        (run.facts["ranks"], str(run.facts.get("device")))
        for run in study.results.runs
        if "ranks" in run.facts
    }
    if len(devices) > 1:
        found.append("Times do not compare: the runs had different devices or numbers of ranks.")
    return found


def _on_runs(study: Study) -> List[str]:
    found = []
    for state, words in (
        (FAILED, "failed or diverged"),
        (RUNNING, "not finished"),
        (PRUNED, "pruned"),
    ):
        counts = {arm.name: count for arm in study.arms if (count := arm.count(state))}
        if counts:
            told = _join(f"{name} {count}" for name, count in counts.items())
            found.append(f"{_count(sum(counts.values()), 'run')} {words}: {told}.")
    missing = {arm.name: arm.missing for arm in study.arms if arm.missing}
    if missing:
        told = _join(f"{name} {count}" for name, count in missing.items())
        found.append(f"{_count(sum(missing.values()), 'run')} not begun: {told}.")
    broken = [
        f"{arm.name} at {_join('?' if rate.lr is None else f'{rate.lr:g}' for rate in rates)}"
        for arm in study.arms
        if (rates := arm.broken_rates)
    ]
    if broken:
        found.append(
            f"Rates at which a run failed or diverged are not chosen while there are others: "
            f"{'; '.join(broken)}."
        )
    return found


def _on_flags(study: Study) -> List[str]:
    words = {
        EDGE: "The best rate lies at the edge of the grid, and a better one may lie beyond it",
        SEEDS_MISSING: "At the best rate seeds are missing",
        BROKEN_RATE: "Runs broke at every rate, so the loss is that of the seeds that survived",
    }
    return [
        f"{text}: {_join(arms)}."
        for flag, text in words.items()
        if (arms := [arm.name for arm in study.arms if flag in arm.flags])
    ]


def _join(texts: Iterable[str]) -> str:
    *others, last = list(texts) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
