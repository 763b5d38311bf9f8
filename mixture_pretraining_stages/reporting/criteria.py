"""
The criteria of success of a study, each with what speaks for it: no crash, no orthogonalisation
that fell back, no loss far above the baseline's.
"""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from olmo_optim_ext.engine.roles import Role
from olmo_optim_ext.matrix.reports import FAILED as FAILED_ORTHOGONALISATIONS
from olmo_optim_ext.training import matrix_metric

from .results import COMPLETE, FAILED, RunResult
from .statistics import Study

__all__ = ["Criterion", "check_criteria"]

KEYS = tuple(matrix_metric(FAILED_ORTHOGONALISATIONS, str(role)) for role in Role)


@dataclass(frozen=True)
class Criterion:
    """Whether a study meets a criterion; ``None`` where that is not known."""

    name: str
    met: Optional[bool]
    evidence: Sequence[str]


def check_criteria(study: Study) -> List[Criterion]:
    """The criteria that the first comparison asks for; none if it does not."""
    comparison = study.comparison
    if comparison is None or not comparison.criteria:
        return []
    found = [_no_crash(study), _no_fallback(study)]
    if comparison.tolerance is not None:
        found.append(_near_the_baseline(study, comparison.tolerance))
    return found


def _no_crash(study: Study) -> Criterion:
    complete, broken = (sum(arm.count(state) for arm in study.arms) for state in (COMPLETE, FAILED))
    total = sum(len(arm.runs) + arm.missing for arm in study.arms)
    others = total - complete - broken
    evidence = [f"{complete} of {total} runs are complete"]
    evidence += [
        f"{arm.name} at rate {_rate(run)}, seed {run.seed}: {run.broken}"
        for arm in study.arms
        for run in arm.runs
        if run.broken
    ]
    if others:
        evidence.append(f"{others} have not ended, were pruned or are missing")
    return Criterion("No crash", False if broken else None if others else True, evidence)


def _rate(run: RunResult) -> str:
    return "unknown" if run.lr is None else f"{run.lr:g}"


def _no_fallback(study: Study) -> Criterion:
    looked_at, failures, unknown = 0, [], []
    for arm in study.arms:
        counted = [_failed_orthogonalisations(run) for run in arm.runs]
        steps, failed = (sum(each[i] for each in counted) for i in (0, 1))
        looked_at += steps
        if failed:
            failures.append(f"{arm.name}: {failed} failed in {steps} steps that were looked at")
        elif not steps:
            unknown.append(arm.name)
    evidence = [*failures]
    if looked_at:
        evidence.append(
            f"looked at all orthogonalised matrices in {looked_at:,} steps of the runs "
            "(those with a report of optimizer_metrics; others were not looked at)"
        )
    if unknown:
        evidence.append(
            f"nothing recorded of {', '.join(unknown)}: the optimizer orthogonalises nothing, or "
            "optimizer_metrics was off"
        )
    met = False if failures else True if looked_at else None
    return Criterion("No orthogonalisation that fell back", met, evidence)


def _failed_orthogonalisations(run: RunResult) -> Tuple[int, int]:
    """In how many steps they were counted, and how many there were."""
    counted = [[row[key] for key in KEYS if key in row] for row in run.rows]
    counted = [counts for counts in counted if counts]
    return len(counted), round(sum(sum(counts) for counts in counted))


def _near_the_baseline(study: Study, tolerance: float) -> Criterion:
    name = f"Losses at most {tolerance:.0%} above the baseline's"
    baseline = study.baseline
    loss = baseline.best.mean if baseline is not None and baseline.best is not None else None
    if baseline is None or loss is None:
        return Criterion(name, None, ["the baseline has no result"])
    evidence, met = [f"{baseline.name}, the baseline, ends at {loss:.4f}"], True
    without = False
    for arm in study.arms:
        if arm.name == baseline.name:
            continue
        mean = None if arm.best is None else arm.best.mean
        if mean is None:
            without = True
            evidence.append(f"{arm.name} has no result")
            continue
        excess = mean / loss - 1
        evidence.append(f"{arm.name} ends at {mean:.4f}, {excess:+.2%}")
        met = met and excess <= tolerance
    return Criterion(name, None if met and without else met, evidence)
