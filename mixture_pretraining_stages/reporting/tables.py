"""
The tables of a report, as text: what a page and a console show.
"""

from statistics import fmean
from typing import Dict, List, NamedTuple, Optional, Sequence

from .findings import describe_difference, describe_loss
from .results import COMPLETE, FAILED, PRUNED, RUNNING, RunResult
from .statistics import Arm, Study

__all__ = ["COLUMNS", "Column", "arm_row", "flags_of", "rate_rows", "rate_text", "run_rows"]


class Column(NamedTuple):
    title: str
    meaning: str
    short: bool = False
    """Whether a console has it, too."""
    text: bool = False
    """Whether it has words, which begin at the left."""


ARM = Column("arm", "An optimizer with its options, all its learning rates and seeds.", True, True)
LR = Column("rate", "The learning rate with the lowest mean final loss over seeds.", True)
LOSS = Column(
    "final loss",
    "Validation loss at the end in nats per token, the mean over sources with equal weights: mean "
    "and standard deviation over seeds.",
    True,
)
SEEDS = Column("seeds", "Finished at that rate, of those at any rate or asked for.", True)
DIFFERENCE = Column(
    "difference",
    "To the baseline over the seeds that both have, with its paired 95 % t-interval.",
    True,
)
VERDICT = Column(
    "verdict",
    "tie: the interval contains 0. better, worse: it does not, with at least 5 seeds. With fewer "
    "seeds nothing is claimed.",
    True,
    True,
)
BITS = Column("bits per byte", "At the end, the mean over sources; compares tokenizers.")
STEPS = Column(
    "steps to baseline",
    "Where the mean curve first is as low as the baseline ends, linearly between evaluations.",
)
TOKENS = Column("tokens to baseline", "The same in tokens.")
SECONDS = Column("time to baseline", "The same in seconds of training steps.")
STEP_MS = Column("step", "Mean time of a step.")
SHARE = Column("optimizer share", "Its part of the time of a step.", True)
STATE = Column(
    "state bytes/param",
    "Bytes of the optimizer's state on all ranks together, for each parameter.",
    True,
)
RUNS = Column("runs", "Complete runs of all; then those that are not.", False, True)
FLAGS = Column("flags", "What to beware of: see the notes.", True, True)

COLUMNS = (
    *(ARM, LR, LOSS, SEEDS, DIFFERENCE, VERDICT, BITS, STEPS, TOKENS, SECONDS),
    *(STEP_MS, SHARE, STATE, RUNS, FLAGS),
)

NONE = "-"


def arm_row(arm: Arm) -> Dict[str, str]:
    """The cells of an arm by the title of their column."""
    best, cost, reached = arm.best, arm.cost, arm.reached
    no_time = reached is None or reached.seconds is None
    finished = [] if best is None else best.finished
    never = "never" if arm.difference is not None and reached is None else NONE
    return {
        ARM.title: arm.name,
        LR.title: NONE if best is None else rate_text(best.lr),
        LOSS.title: describe_loss(arm),
        SEEDS.title: f"{len(finished)}/{arm.seeds}",
        DIFFERENCE.title: describe_difference(arm),
        VERDICT.title: arm.verdict,
        BITS.title: _number(_bits(finished), ".4f"),
        STEPS.title: never if reached is None else f"{reached.step:,.0f}",
        TOKENS.title: never if reached is None else f"{reached.tokens:,.0f}",
        SECONDS.title: never if no_time else _number(reached and reached.seconds, ",.1f", " s"),
        STEP_MS.title: _number(cost.step_seconds and 1000 * cost.step_seconds, ",.1f", " ms"),
        SHARE.title: _number(cost.optimizer_share, ".1%"),
        STATE.title: _number(cost.bytes_per_parameter, ".2f"),
        RUNS.title: _runs(arm),
        FLAGS.title: ", ".join(flags_of(arm)),
    }


def flags_of(arm: Arm) -> List[str]:
    """Its flags, and which of its runs have no result."""
    states = {FAILED: "failed", PRUNED: "pruned", RUNNING: "unfinished"}
    counts = {word: arm.count(state) for state, word in states.items()}
    counts["missing"] = arm.missing
    return [*arm.flags, *(f"{count} {word}" for word, count in counts.items() if count)]


def rate_text(lr: Optional[float]) -> str:
    return "?" if lr is None else f"{lr:.4g}"


def _number(value: Optional[float], form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _bits(runs: Sequence[RunResult]) -> Optional[float]:
    """Of runs whose sources all have them."""
    ends = [run.final for run in runs if run.final is not None]
    if not ends or any(end.bits.keys() != end.losses.keys() for end in ends):
        return None
    return fmean(fmean(end.bits.values()) for end in ends)


def _runs(arm: Arm) -> str:
    return f"{arm.count(COMPLETE)} of {len(arm.runs) + arm.missing}"


def rate_rows(study: Study) -> List[List[str]]:
    """Arm, rate, seeds, mean, standard deviation and what broke, of each rate of each arm."""
    return [
        [
            arm.name,
            rate_text(rate.lr) + (" (best)" if rate is arm.best else ""),
            str(len(rate.losses)),
            _number(rate.mean, ".4f"),
            _number(rate.sd, ".4f"),
            str(len(rate.broken)),
        ]
        for arm in study.arms
        for rate in arm.rates
    ]


def run_rows(study: Study) -> List[List[str]]:
    """Arm, rate, seed, state, steps, final loss, error and folder of each run."""
    return [
        [
            *(arm.name, rate_text(rate.lr), NONE if run.seed is None else str(run.seed)),
            "unfinished" if run.state == RUNNING else run.state,
            str(max((row["step"] for row in run.rows), default=0)),
            _number(None if run.final is None else run.final.loss, ".4f"),
            run.broken or run.error or "",
            str(run.folder),
        ]
        for arm in study.arms
        for rate in arm.rates
        for run in rate.runs
    ]
