"""
What a comparison claims, on runs whose losses are known.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import pytest
from scipy import stats

from mixture_pretraining_stages.reporting import statistics
from mixture_pretraining_stages.reporting.curves import Point, mean_curve, reach
from mixture_pretraining_stages.reporting.findings import notes, statement
from mixture_pretraining_stages.reporting.results import Comparison, Results, RunResult
from mixture_pretraining_stages.reporting.statistics import Arm, Study, study, t_interval

BASE = [2.0, 2.01, 1.99, 2.02, 1.98]
"""Final losses of the baseline, by seed."""


def run(
    arm: str,
    seed: int,
    final: float,
    lr: float = 0.01,
    state: str = "complete",
    losses: Optional[Mapping[int, float]] = None,
    **fields: Any,
) -> RunResult:
    """A run of four steps of ten tokens and two seconds, evaluated after the second and fourth."""
    losses = losses or {2: final + 1, 4: final}
    rows: List[Dict[str, Any]] = []
    for step in range(1, 5):
        row: Dict[str, Any] = {"step": step, "stage": "one", "tokens": 10 * step}
        row.update({"train/CE loss": 3.0, "timing/step seconds": 2.0})
        row["timing/optimizer seconds"] = 0.5
        if step in losses:
            for source, offset in (("a", -0.25), ("b", 0.25)):
                row[f"eval/validation/{source}/CE loss"] = losses[step] + offset
        rows.append(row)
    config = {"optimizer": {"name": arm, "lr": lr}}
    defaults = {"config": config, "rows": rows, "folder": Path(f"{arm}-{lr}-{seed}")}
    return RunResult(**{**defaults, **fields}, arm=arm, lr=lr, seed=seed, state=state)


def runs(arm: str, losses: Sequence[float], lr: float = 0.01) -> List[RunResult]:
    return [run(arm, seed, loss, lr) for seed, loss in enumerate(losses)]


def compared(*several: Sequence[RunResult], **comparison: Any) -> Study:
    comparisons = []
    if comparison:
        fields = {"folder": Path("c"), "name": "c", "baseline": "adamw", **comparison}
        comparisons = [Comparison(**fields)]
    return study(Results([each for part in several for each in part], comparisons))


def arm_of(found: Study, name: str) -> Arm:
    (arm,) = [arm for arm in found.arms if arm.name == name]
    return arm


def against_baseline(losses: Sequence[float]) -> Arm:
    return arm_of(compared(runs("adamw", BASE), runs("muon", losses)), "muon")


def test_the_interval_is_that_of_a_paired_t_test():
    losses = [1.9, 1.95, 1.97, 1.9, 1.99]
    arm = against_baseline(losses)
    expected = stats.ttest_rel(losses, BASE)
    low, high = expected.confidence_interval(0.95)
    assert arm.difference is not None
    assert (arm.difference.low, arm.difference.high) == pytest.approx((low, high), rel=1e-9)
    assert arm.difference.mean == pytest.approx(sum(losses) / 5 - 2)
    assert t_interval([3.0]) is None
    # Not that of two independent samples.
    independent = stats.ttest_ind(losses, BASE).confidence_interval(0.95)
    assert abs(independent.low - low) > 1e-3


@pytest.mark.parametrize(
    "shifts,verdict",
    [
        ([-0.1, -0.11, -0.09, -0.1, -0.1], "better"),
        ([0.1, 0.11, 0.09, 0.1, 0.1], "worse"),
        ([-0.1, 0.11, -0.09, 0.1, 0.0], "tie"),
        ([0.0] * 5, "tie"),
        ([-0.1, -0.11, -0.09, -0.1], "needs 5 seeds"),
        ([-0.1, -0.11], "needs 5 seeds"),
        ([-0.1, 0.11], "tie"),
        ([-0.1], "needs 5 seeds"),
    ],
)
def test_a_difference_is_claimed_with_five_seeds_and_outside_of_the_noise(shifts, verdict):
    arm = against_baseline([base + shift for base, shift in zip(BASE, shifts)])
    assert arm.verdict == verdict
    assert arm.difference is not None and arm.difference.seeds == len(shifts)
    assert (arm.difference.low is None) == (len(shifts) == 1)


def test_only_seeds_that_both_have_are_paired():
    others = [run("muon", seed, 1.0 + seed) for seed in (3, 4, 5, 6)]
    arm = arm_of(compared(runs("adamw", BASE), others), "muon")
    assert arm.difference is not None and arm.difference.seeds == 2
    assert arm.difference.mean == pytest.approx((4 - 2.02 + 5 - 1.98) / 2)
    none = arm_of(compared(runs("adamw", BASE), [run("muon", 7, 1.0)]), "muon")
    assert (none.difference, none.verdict) == (None, "no common seeds")


def test_the_loss_is_the_mean_over_sources_and_the_spread_that_of_seeds():
    (arm,) = compared(runs("adamw", [1.0, 2.0, 4.0])).arms
    assert arm.best is not None
    assert arm.best.mean == pytest.approx(7 / 3)
    assert arm.best.sd == pytest.approx(stats.tstd([1, 2, 4]))
    assert arm.best.losses == {0: 1.0, 1: 2.0, 2: 4.0}


def grid(name: str, losses: Mapping[float, Sequence[float]]) -> List[RunResult]:
    return [each for lr, its in losses.items() for each in runs(name, its, lr)]


def test_the_rate_with_the_lowest_mean_is_chosen_and_flagged_at_an_edge():
    inside = compared(grid("adamw", {0.1: [2.0, 3.0], 0.2: [2.2, 2.4], 0.4: [2.6, 2.6]})).arms[0]
    assert inside.best is not None
    assert (inside.best.lr, inside.flags) == (0.2, [])
    edge = compared(grid("adamw", {0.1: [2.0, 2.0], 0.2: [2.2, 2.4]})).arms[0]
    assert edge.best is not None
    assert (edge.best.lr, edge.flags) == (0.1, ["edge"])
    alone = compared(grid("adamw", {0.1: [2.0, 2.0]})).arms[0]
    assert alone.flags == []


@pytest.mark.parametrize("best,flags", [(0.12, ["edge"]), (0.2, []), (0.5, []), (0.7, ["edge"])])
def test_the_best_of_a_search_is_flagged_near_an_end_of_its_range(best, flags):
    tried = grid("adamw", {0.1: [2.5], best: [2.0], 0.8: [2.5]})
    (arm,) = compared(tried, tune=True, lrs={"adamw": [0.1, 0.2, 0.4, 0.8]}, seeds=[0]).arms
    assert arm.flags == flags


def test_an_arm_without_a_seed_in_common_is_told_of():
    found = compared(runs("adamw", BASE), [run("muon", 7, 1.0)])
    assert "Not compared, as they have no seed in common with it: muon." in statement(found)


def test_a_rate_that_was_asked_for_but_has_not_run_bounds_the_grid():
    done = grid("adamw", {0.1: [2.0], 0.2: [2.2]})
    (arm,) = compared(done, lrs={"adamw": [0.05, 0.1, 0.2]}, seeds=[0]).arms
    assert arm.flags == []
    assert arm.missing == 1


@pytest.mark.parametrize("how", ["failed", "diverged"])
def test_a_rate_at_which_a_run_broke_is_not_chosen_but_counted(how):
    good = [*grid("adamw", {0.1: [2.0, 2.0], 0.2: [1.0]}), run("adamw", 2, 1.0, 0.2)]
    bad = run("adamw", 1, float("inf") if how == "diverged" else 1.0, 0.2)
    if how == "failed":
        bad = replace(bad, state="failed", error="it crashed")
    found = compared(good, [bad])
    (arm,) = found.arms
    assert arm.best is not None
    assert arm.best.lr == 0.1
    assert (arm.count("complete"), arm.count("failed")) == (4, 1)
    told = " ".join(notes(found))
    assert "1 run failed or diverged: adamw 1." in told
    assert "adamw at 0.2" in told


def test_where_all_rates_broke_the_survivors_are_flagged():
    broken = replace(run("adamw", 1, 2.0), state="failed")
    (arm,) = compared([run("adamw", 0, 2.0), broken]).arms
    assert arm.best is not None and arm.best.mean == 2.0
    assert set(arm.flags) == {"broken runs at its rate", "seeds missing"}
    (lost,) = compared([broken]).arms
    assert (lost.best, lost.verdict) == (None, "no result")


def test_a_rate_with_fewer_seeds_is_not_preferred():
    (arm,) = compared(grid("adamw", {0.1: [1.0], 0.2: [2.0, 2.0], 0.4: [3.0, 3.0]})).arms
    assert arm.best is not None and arm.best.lr == 0.2


def test_missing_seeds_and_unfinished_runs_are_flagged_and_counted():
    unfinished = replace(run("muon", 1, 2.0), state="running")
    found = compared(
        [*runs("adamw", BASE[:3]), run("muon", 0, 1.9), unfinished],
        lrs={"adamw": [0.01], "muon": [0.01]},
        seeds=[0, 1, 2],
    )
    arm = arm_of(found, "muon")
    assert arm.flags == ["seeds missing"]
    assert (arm.count("running"), arm.missing, arm.seeds) == (1, 1, 3)
    assert arm_of(found, "adamw").flags == []


def test_the_baseline_is_what_the_comparison_names_or_the_best_adamw():
    many = [*runs("adamw", BASE), *runs("muon", BASE)]
    assert compared(many).baseline == arm_of(compared(many), "adamw")
    named = compared(many, baseline="muon", lrs={"adamw": [0.01], "muon": [0.01]})
    assert named.baseline is not None and named.baseline.name == "muon"
    assert "The baseline is muon, no AdamW, and no tuned AdamW is there." in notes(named)
    without = compared(runs("muon", BASE))
    assert without.baseline is None and without.arms[0].verdict == "no baseline"
    assert "No AdamW is among the runs." in notes(without)
    assert "Nothing is compared: there is no baseline with a result." in statement(without)


def test_only_an_adamw_with_three_rates_and_the_best_inside_is_called_tuned():
    def told(losses: Mapping[float, Sequence[float]]) -> str:
        return " ".join(notes(compared(grid("adamw", losses))))

    assert "not a tuned AdamW: it has 1 rate." in told({0.1: [2.0]})
    assert "not a tuned AdamW: it has 2 rates." in told({0.1: [2.0], 0.2: [2.1]})
    edge = {0.1: [2.0], 0.2: [2.1], 0.4: [2.2]}
    assert "not a tuned AdamW: its best rate is at the edge of its grid." in told(edge)
    assert "not a tuned AdamW" not in told({0.1: [2.2], 0.2: [2.1], 0.4: [2.2]})


def test_the_statement_has_ties_and_what_is_not_claimed():
    tie = [base + shift for base, shift in zip(BASE, (0.01, -0.01, 0.02, -0.02, 0))]
    better = [base - 0.1 - 0.001 * base for base in BASE]
    found = compared(
        runs("adamw", BASE), runs("tied", tie), runs("good", better), runs("few", better[:2])
    )
    words = statement(found)
    assert words[0] == (
        "The baseline, adamw, ends at a validation loss of 2.0000 ± 0.0158 (5 seeds)."
    )
    assert words[1].startswith("Better than it: good (-0.1020 [-0.10")
    assert words[2].startswith("Ties, with a difference inside the noise: tied (+0.0000 [-0.0")
    assert words[3].startswith("Nothing is claimed, with fewer than 5 seeds, of: few (-0.1020")


def curve(*values: float) -> List[Point]:
    return [
        Point(10 * i, 100.0 * i, 1.5 * i, value, value, value) for i, value in enumerate(values, 1)
    ]


def test_where_a_curve_reaches_a_loss_is_read_linearly_between_evaluations():
    reached = reach(curve(4.0, 3.0, 2.0), 2.25)
    assert reached == pytest.approx((27.5, 275.0, 4.125))
    assert reach(curve(4.0, 3.0, 2.0), 2.0) == pytest.approx((30, 300, 4.5))
    assert reach(curve(4.0, 3.0, 2.0), 1.9) is None
    assert reach(curve(4.0, 3.0), 5.0) == (10, 100.0, 1.5)
    # The first time, also if it rises again.
    assert reach(curve(4.0, 2.0, 3.0, 2.0), 2.5) == pytest.approx((17.5, 175.0, 2.625))
    assert reach([], 1.0) is None


def test_steps_tokens_and_time_to_the_baseline_are_those_of_the_mean_curve():
    found = compared(runs("adamw", [2.0, 2.0]), runs("muon", [1.5, 1.7]), runs("sgd", [2.5, 2.5]))
    # The mean goes from 2.6 after two steps to 1.6 after four.
    assert arm_of(found, "muon").reached == pytest.approx((3.2, 32.0, 6.4))
    assert arm_of(found, "adamw").reached == pytest.approx((4, 40, 8))
    assert arm_of(found, "sgd").reached is None


def test_a_mean_curve_has_the_steps_that_all_runs_have():
    early = run("a", 0, 2.0, losses={1: 4.0, 2: 3.0, 4: 2.0})
    late = run("a", 1, 2.0, losses={2: 4.0, 3: 2.5, 4: 2.0})
    points = mean_curve([early, late])
    assert [(p.step, p.mean, p.low, p.high) for p in points] == [(2, 3.5, 3, 4), (4, 2, 2, 2)]


def test_shares_of_time_leave_out_first_steps_and_steps_with_a_report():
    one = run("adamw", 0, 2.0)
    rows = [dict(row) for row in one.rows]
    rows[0].update({"timing/step seconds": 100.0, "timing/optimizer seconds": 90.0})
    rows[1].update({"timing/optimizer seconds": 1.0})
    rows[3].update({"timing/optimizer seconds": 1.9, "optim/update RMS/matrix": 0.2})
    facts = {"state_bytes": {"one": 400, "two": 800}, "parameters": 100}
    (arm,) = compared([replace(one, rows=rows, facts=facts)]).arms
    assert arm.cost.step_seconds == 2.0
    assert arm.cost.optimizer_share == pytest.approx(0.75 / 2.0)
    assert arm.cost.bytes_per_parameter == 8.0
    # The axis of time has them all.
    assert arm.best is not None and arm.best.runs[0].evaluations[-1].seconds == 106.0


def test_a_claim_for_many_arms_comes_with_how_many_are_expected_by_chance():
    arms = [runs(f"arm{i}", BASE) for i in range(20)]
    told = " ".join(notes(compared(runs("adamw", BASE), *arms)))
    assert "if all 20 arms were like the baseline, about 1.0 would" in told
    assert "by chance" not in " ".join(notes(compared(runs("adamw", BASE), *arms[:4])))


def test_unequal_budgets_and_runs_that_differ_otherwise_are_told():
    more = grid("muon", {0.1: BASE, 0.2: BASE, 0.4: BASE})
    changed = [
        replace(each, config={**each.config, "max_grad_norm": 1.0, "seed": each.seed})
        for each in more
    ]
    told = " ".join(notes(compared(runs("adamw", BASE), changed)))
    assert "between 1 and 3 learning rates" in told
    assert "differ in more than the optimizer: max_grad_norm." in told


def test_a_search_has_the_rates_that_it_tried():
    tried = grid("adamw", {0.1: [2.0], 0.2: [1.9], 0.3: [2.1]})
    (arm,) = compared(tried, tune=True, lrs={"adamw": [0.001, 1.0]}, seeds=[0]).arms
    assert [rate.lr for rate in arm.rates] == [0.1, 0.2, 0.3]
    assert (arm.missing, arm.flags) == (0, [])
    assert statistics.is_tuned(arm)
