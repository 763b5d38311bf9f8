"""
The queue of a comparison's runs, with functions in place of training.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import optuna
import pytest
from olmo_core.exceptions import OLMoConfigurationError
from optuna.trial import TrialState

from mixture_pretraining_stages.comparing import study
from mixture_pretraining_stages.comparing.alive import Worker
from mixture_pretraining_stages.comparing.comparison import Comparison, RunPlan, plan_comparison
from mixture_pretraining_stages.comparing.folder import claim_folder, read_trial, results
from mixture_pretraining_stages.comparing.slots import SlotState, startup
from mixture_pretraining_stages.comparing.study import Ended, Outcome, Queue, open_storage
from mixture_pretraining_stages.reading import load_spec

from ..spec import tiny_spec, write_spec
from .fake_run import EVERY, STEPS, loss_of

MUON_ALONE = {"arms": {"muon": {}}, "baseline": "muon"}

Runner = Callable[[RunPlan, Callable[[int, float], bool]], Outcome]


def plan(folder: Path, *optimizers: str, section: Any = None, **flags: Any) -> Comparison:
    path = folder / "spec.yaml"
    if not path.exists():
        write_spec(path, tiny_spec(folder, comparison=section))
    flags = {"lrs": 3, "seeds": 2, "optimizers": optimizers or None, **flags}
    return plan_comparison(load_spec(path), **flags)


def queue_of(comparison: Comparison, worker: Optional[Worker] = None, **options: Any) -> Queue:
    identifier = claim_folder(comparison)
    storage = open_storage(None, comparison.folder)
    worker = worker or Worker(comparison.folder)
    return Queue(comparison, identifier, storage, worker, **options)


def train(run: RunPlan, observe: Callable[[int, float], bool]) -> Outcome:
    """What a run leaves, at once."""
    return leave(run, observe, 0)


def worse_with_other_seeds(run: RunPlan, observe: Callable[[int, float], bool]) -> Outcome:
    return leave(run, observe, 100 * (run.seed - 42))


def leave(run: RunPlan, observe: Callable[[int, float], bool], worse: float) -> Outcome:
    for step in (*range(EVERY, STEPS, EVERY), STEPS):
        loss = loss_of(run.lr, run.seed, step) + worse
        losses = {f"eval/validation/{name}/CE loss": loss for name in run.spec.sources}
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "stage": "one", "tokens": 0, **losses}) + "\n")
        if observe(step, loss) and step < STEPS:
            return Outcome(Ended.pruned)
    return Outcome(Ended.complete)


def ending(how: Ended, error: Optional[str] = None) -> Runner:
    return lambda run, observe: Outcome(how, error)


def work(queue: Queue, runner: Runner = train) -> List[str]:
    """Make all runs; what they were, in their order."""
    made = []

    def noted(run: RunPlan, observe: Callable[[int, float], bool]) -> Outcome:
        made.append(run.label)
        return runner(run, observe)

    queue.refresh()
    while not queue.finished:
        assert queue.run_next(noted)
        queue.refresh()
    return made


def counts(queue: Queue) -> Dict[str, int]:
    return Counter(state.value for arm in queue.slots.values() for state in arm.values())


def kept(trial: Dict[str, Any]) -> Any:
    return trial["state"], trial["error"]


def test_each_run_of_the_grid_is_made_once_own_rates_and_first_seeds_first(tmp_path):
    comparison = plan(tmp_path, "adamw", "muon")
    made = work(queue_of(comparison))
    assert len(made) == len(set(made)) == 12
    assert made[:2] == ["adamw lr 0.001 seed 42", "muon lr 0.01 seed 42"]
    assert all("seed 42" in label for label in made[:6])
    found = results(comparison)
    assert [(r.run.lr, r.run.seed) for r in found if r.run.arm == "muon"] == [
        (lr, seed) for lr in (0.005, 0.01, 0.02) for seed in (42, 43)
    ]
    for each in found:
        assert (each.state, each.error) == ("complete", None)
        assert each.loss == pytest.approx(loss_of(each.run.lr, each.run.seed, STEPS))
    again = queue_of(comparison)
    assert work(again) == []
    assert again.best("muon") == (pytest.approx(1.042), 0.01)


def test_an_extended_comparison_makes_what_is_missing(tmp_path):
    assert len(work(queue_of(plan(tmp_path, "adamw", lrs=1, seeds=1)))) == 1
    made = work(queue_of(plan(tmp_path, "adamw", "soap", lrs=2, seeds=2)))
    assert len(made) == len(set(made)) == 2 * 2 * 2 - 1


def test_a_failed_run_is_noted_and_stops_nothing(tmp_path):
    comparison = plan(tmp_path, "adamw", "muon", seeds=1)

    def some_fail(run: RunPlan, observe: Any) -> Outcome:
        if run.label == "muon lr 0.01 seed 42":
            return Outcome(Ended.failed, "the disk is full")
        return train(run, observe)

    queue = queue_of(comparison)
    assert len(work(queue, some_fail)) == 6
    assert counts(queue) == {"complete": 5, "failed": 1}
    trial = read_trial(comparison.run("muon", 0.01, 42).folder)
    assert trial == {
        "arm": "muon",
        "lr": 0.01,
        "seed": 42,
        "state": "failed",
        "error": "the disk is full",
    }
    assert work(queue_of(comparison)) == []
    assert work(queue_of(comparison, retry_failed=True)) == ["muon lr 0.01 seed 42"]
    assert len([r for r in results(comparison) if r.state == "complete"]) == 6


def test_a_run_that_something_kills_is_made_three_times(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    queue = queue_of(comparison)
    assert len(work(queue, ending(Ended.killed, "signal 9"))) == 3
    assert counts(queue) == {"failed": 1}
    assert results(comparison)[0].error == "signal 9, 3 times"


def test_a_stopped_run_goes_back_to_the_queue_with_its_parameters(tmp_path):
    comparison = plan(tmp_path, "adamw", tune=True)
    queue = queue_of(comparison)
    queue.refresh()
    stopped: List[float] = []

    def stop(run: RunPlan, observe: Any) -> Outcome:
        stopped.append(run.lr)
        return Outcome(Ended.stopped)

    for _ in range(3):
        queue.run_next(stop)
        queue.refresh()
    assert counts(queue) == {"waiting": 5}
    rest = work(queue_of(comparison))
    assert len(rest) == 6
    for lr in stopped:
        assert f"adamw lr {lr:.6g} seed 42" in rest


def test_a_diverged_run_is_a_result_that_is_infinitely_bad(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=2, seeds=1)

    def diverge(run: RunPlan, observe: Any) -> Outcome:
        return ending(Ended.complete)(run, observe) if run.lr < 0.001 else train(run, observe)

    queue = queue_of(comparison)
    work(queue, diverge)
    assert counts(queue) == {"complete": 1, "diverged": 1}
    state, error = kept(read_trial(comparison.run("adamw", 0.0005, 42).folder) or {})
    assert state == "failed" and "diverged" in error
    assert sorted(t.value for t in trials(queue, "adamw")) == [
        pytest.approx(loss_of(1e-3, 42, 18)),
        math.inf,
    ]
    assert work(queue_of(comparison, retry_failed=True)) == []


def trials(queue: Queue, arm: str) -> List[Any]:
    return queue._studies[arm].get_trials()


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> Queue:
    """The queue of a search that is over."""
    folder = tmp_path_factory.mktemp("search")
    queue = queue_of(plan(folder, section=MUON_ALONE, lrs=5, seeds=3, tune=True))
    assert len(work(queue, worse_with_other_seeds)) == 5 * 3
    return queue


def test_a_search_has_the_budget_of_the_grid_and_repeats_the_best_rate(search):
    found = results(search.comparison)
    assert len(found) == 5 * 3
    first = [each for each in found if each.run.seed == 42]
    rates = [each.run.lr for each in first]
    assert len(set(rates)) == 5 * 3 - 2
    assert 0.01 in rates  # its own rate
    assert all(0.0025 <= lr <= 0.04 for lr in rates)
    best = min((r for r in first if r.state == "complete"), key=lambda r: r.loss).run.lr
    assert [each.run.lr for each in found if each.run.seed > 42] == [best, best]
    # The sampler comes near the optimum of its own accord.
    assert min(abs(math.log2(lr / 0.01)) for lr in rates if lr != 0.01) < 0.2


def test_a_search_prunes_by_the_median_but_neither_early_nor_the_other_seeds(search):
    pruned = [t for t in trials(search, "muon") if t.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        assert trial.number >= startup(search.comparison)
        assert trial.last_step >= STEPS // 3
        assert trial.user_attrs["seed"] == 42
    states = {each.run.seed: each.state for each in results(search.comparison)}
    assert states[43] == states[44] == "complete"
    assert counts(search) == {"pruned": len(pruned), "complete": 15 - len(pruned)}


def test_a_grid_prunes_nothing(tmp_path):
    queue = queue_of(plan(tmp_path, section=MUON_ALONE, lrs=7, seeds=1))
    work(queue)
    assert counts(queue) == {"complete": 7}


# Several workers.


def test_trials_of_a_dead_worker_of_this_machine_are_made_at_once(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=3, seeds=1)
    claim_folder(comparison)
    child = os.fork()
    if child == 0:
        dying = queue_of(comparison)
        dying.refresh()
        dying.run_next(lambda run, observe: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    queue = queue_of(comparison)
    assert [t.state for t in trials(queue, "adamw")].count(TrialState.RUNNING) == 1
    assert len(work(queue)) == 3
    assert counts(queue) == {"complete": 3}


def test_trials_of_live_workers_and_of_other_machines_are_left_alone(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    first = queue_of(comparison)
    first.refresh()

    def meanwhile(run: RunPlan, observe: Any) -> Outcome:
        other = queue_of(comparison)
        other.refresh()
        assert not other.run_next(train)
        assert counts(other) == {"running": 1}
        return train(run, observe)

    assert first.run_next(meanwhile)
    elsewhere = {"host": "elsewhere", "id": "0"}
    assert not first.worker.knows_to_be_dead(elsewhere)


def test_a_trial_that_says_not_who_runs_it_is_made_after_a_while(tmp_path, monkeypatch):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    queue = queue_of(comparison)
    queue.refresh()
    queue._studies["adamw"].ask()  # and then killed
    other = Worker(comparison.folder)
    queue.refresh()
    assert counts(queue) == {"running": 1}
    monkeypatch.setattr(study, "UNCLAIMED", 0)
    queue.refresh()
    assert counts(queue) == {"waiting": 1}
    # With nobody else alive there is nothing to wait for.
    monkeypatch.undo()
    other.close()
    queue._studies["adamw"].ask()
    assert len(work(queue)) == 1


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # here without optimize()
def test_a_trial_of_another_machine_is_made_when_its_heart_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HEARTBEAT", 1)
    monkeypatch.setattr(study, "GRACE", 1)
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    identifier = claim_folder(comparison)
    storage = open_storage(f"sqlite:///{tmp_path}/shared.db", comparison.folder)
    queue = Queue(comparison, identifier, storage, Worker(comparison.folder))
    queue.refresh()
    trial = queue._studies["adamw"].ask()
    trial.set_user_attr("worker", {"host": "elsewhere", "id": "0"})
    storage.record_heartbeat(trial._trial_id)
    queue.refresh()
    assert counts(queue) == {"running": 1}
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("update trial_heartbeats set heartbeat = '2000-01-01'")
    assert len(work(queue)) == 1


def test_what_two_machines_put_in_the_queue_at_once_is_made_once(tmp_path, monkeypatch):
    comparison = plan(tmp_path, "adamw", lrs=3, seeds=1)
    one, other = queue_of(comparison), queue_of(comparison)
    enqueue = optuna.Study.enqueue_trial

    def first_the_other(self: Any, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(optuna.Study, "enqueue_trial", enqueue)
        other.refresh()
        enqueue(self, *args, **kwargs)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", first_the_other)
    one.refresh()
    assert len(trials(one, "adamw")) > 3
    made = []

    def all_at_once(run: RunPlan, observe: Any) -> Outcome:
        made.append(run.label)
        other.run_next(all_at_once)
        return train(run, observe)

    assert one.run_next(all_at_once)
    assert len(made) == len(set(made)) == 3

    def never(run: RunPlan, observe: Any) -> Outcome:
        raise AssertionError(run)

    # Asked for when another machine has just taken the last.
    monkeypatch.setattr(one, "_furthest_behind", lambda: "adamw")
    for _ in range(4):
        assert one.run_next(never)
    one.refresh()
    assert counts(one) == {"complete": 3}


def test_a_trial_that_was_given_up_elsewhere_does_not_stop_the_worker(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    queue = queue_of(comparison)
    queue.refresh()

    def given_up(run: RunPlan, observe: Any) -> Outcome:
        (trial,) = trials(queue, "adamw")
        queue._studies["adamw"].tell(trial.number, state=TrialState.FAIL)
        return train(run, lambda step, loss: False)

    assert queue.run_next(given_up)
    assert work(queue, ending(Ended.failed)) == []  # the run itself is complete
    assert counts(queue) == {"complete": 1}


def test_work_that_is_done_is_known_without_the_database(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=3, seeds=1)
    assert len(work(queue_of(comparison))) == 3
    (comparison.folder / "study.db").unlink()
    queue = queue_of(comparison)
    assert work(queue) == []
    assert counts(queue) == {"complete": 3}


@pytest.mark.parametrize(
    "url,message",
    [
        ("nonsense", "'nonsense' cannot be opened"),
        ("oracle://me:secret@host/name", r"me:\*\*\*@host.*oracledb|cx_Oracle"),
        ("nosuch://host/name", "nosuch"),
        ("sqlite:////nowhere/at/all.db", "unable to open"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused(url, message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message) as caught:
        open_storage(url, tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "study.db").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(OLMoConfigurationError, match="study.db' cannot be opened.*not a database"):
        open_storage(None, tmp_path)


def test_states_are_those_that_are_shown():
    from olmo_optim_ext.cli.compare_view import ENDED

    assert {state.value for state in study.SETTLED} == set(ENDED) < {s.value for s in SlotState}
