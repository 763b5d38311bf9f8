"""
Runs in processes of their own, with a script in place of training: how they are started, watched
and stopped, and that nothing interrupts a comparison for good.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from mixture_pretraining_stages.comparing import workers
from mixture_pretraining_stages.comparing.comparison import Comparison
from mixture_pretraining_stages.comparing.folder import results
from mixture_pretraining_stages.comparing.workers import Crew, Metrics, places

from .fake_run import STEPS, loss_of
from .study_test import MUON_ALONE, plan, queue_of

FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(workers, "POLL", 0.02)
    monkeypatch.setattr(workers, "REFRESH", 0.1)


def crew_of(comparison: Comparison, jobs: int = 2, **options: Any) -> Crew:
    return Crew(queue_of(comparison, **options), places(jobs, 1, 2, [], 9), command=FAKE)


def nothing() -> None:
    pass


def assert_each_was_made_once(comparison: Comparison, runs: int) -> None:
    found = results(comparison)
    assert len(found) == runs
    for each in found:
        lines = (each.run.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
        assert each.state == "complete"
        assert each.loss == pytest.approx(loss_of(each.run.lr, each.run.seed, STEPS))


def test_runs_are_started_side_by_side_and_leave_what_pretrain_leaves(tmp_path):
    comparison = plan(tmp_path, "adamw", "muon", lrs=2, seeds=1)
    crew = crew_of(comparison)
    at_once: List[int] = []
    crew.work(lambda: at_once.append(len(crew.running)))
    assert max(at_once) <= 2
    assert_each_was_made_once(comparison, 4)
    folder = results(comparison)[0].run.folder
    assert {"spec.yaml", "output.log", "trial.json", "metrics.jsonl"} <= set(os.listdir(folder))


def test_what_a_run_says_at_its_end_is_its_error(tmp_path):
    arms: Dict[str, Any] = {"broken": {}, "dying": {}, "diverging": {}, "fine": {}}
    comparison = plan(tmp_path, section={"arms": arms, "baseline": "fine"}, lrs=1, seeds=1)
    crew_of(comparison).work(nothing)
    found = {each.run.arm: (each.state, each.error) for each in results(comparison)}
    assert found == {
        "fine": ("complete", None),
        "broken": ("failed", "The run failed: RuntimeError: broken."),
        "dying": ("failed", "it was stopped by signal 9, not by the comparison, 3 times"),
        "diverging": ("failed", "it diverged: the last validation loss is not finite"),
    }


def test_a_run_whose_folder_seems_taken_for_ever_fails(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    crew = crew_of(comparison, jobs=1)
    said = "output: another process is running in here"
    starts = tmp_path / "starts"
    crew.command = ("sh", "-c", f"echo x >> {starts}; echo {said}; exit 2")
    crew.work(nothing)
    assert len(starts.read_text().split()) == workers.TURNS
    (found,) = results(comparison)
    assert (found.state, found.error) == ("failed", said)


def test_a_search_stops_runs_that_it_prunes(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.03")
    comparison = plan(tmp_path, section=MUON_ALONE, lrs=3, seeds=2, tune=True)
    crew_of(comparison, jobs=1).work(nothing)
    pruned = [each.run.folder for each in results(comparison) if each.state == "pruned"]
    assert pruned
    for folder in pruned:
        assert len((folder / "metrics.jsonl").read_text().splitlines()) < STEPS
        assert "Interrupted" in (folder / "output.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_runs_save_and_the_same_command_continues(number, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.05")
    comparison = plan(tmp_path, "adamw", lrs=3, seeds=1)
    crew = crew_of(comparison)
    threading.Timer(0.8, os.kill, (os.getpid(), number)).start()
    crew.work(nothing)
    assert not crew.queue.finished and not crew.running
    said = [p.read_text() for p in (comparison.folder / "runs").rglob("output.log")]
    assert sum("Interrupted" in text for text in said) == 2
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    crew_of(comparison).work(nothing)
    assert_each_was_made_once(comparison, 3)


def test_a_second_signal_kills(tmp_path, monkeypatch):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    crew = crew_of(comparison, jobs=1)
    crew.command = (sys.executable, "-c", stubborn)
    for seconds in (0.5, 1.0):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    crew.work(nothing)
    assert time.monotonic() - begin < 30
    crew.queue.refresh()
    assert [s.value for s in crew.queue.slots["adamw"].values()] == ["waiting"]


@pytest.fixture
def forked(tmp_path) -> Iterator[Any]:
    children: List[int] = []

    def start(comparison: Comparison) -> int:
        child = os.fork()
        if child == 0:
            crew_of(comparison, jobs=1).work(nothing)
            os._exit(0)
        children.append(child)
        return child

    yield start
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ChildProcessError, ProcessLookupError):
            pass


def test_killed_again_and_again_each_run_is_made_once(tmp_path, monkeypatch, forked):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.01")
    comparison = plan(tmp_path, "adamw", lrs=3, seeds=1)
    for _ in range(4):
        child = forked(comparison)
        time.sleep(0.5)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    crew_of(comparison).work(nothing)
    assert_each_was_made_once(comparison, 3)


def test_two_commands_share_the_work_of_one_folder(tmp_path, monkeypatch, forked):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.01")
    comparison = plan(tmp_path, "adamw", lrs=6, seeds=1)
    both = [forked(comparison), forked(comparison)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both] == [0, 0]
    assert_each_was_made_once(comparison, 6)
    starts = [(each.run.folder / "starts").read_text() for each in results(comparison)]
    assert starts == ["x"] * 6
    trials = queue_of(comparison)._studies["adamw"].get_trials()
    made = [trial for trial in trials if trial.value is not None]
    assert len({trial.user_attrs["worker"]["id"] for trial in made}) == 2


def test_places_are_cores_or_gpus():
    def environments(*arguments: Any) -> List[Any]:
        return [place.environment for place in places(*arguments)]

    one = {"OMP_NUM_THREADS": "1"}
    assert environments(None, 1, 4, [], 99) == [one] * 4
    assert environments(None, 1, 4, [], 2) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert environments(None, 2, 4, [], 99) == [one] * 2
    assert environments(None, 8, 4, [], 99) == [one]
    assert environments(3, 1, 4, [], 99) == [one] * 3
    gpus = environments(None, 2, 16, ["0", "1", "4", "5", "6"], 99)
    assert gpus == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "4,5"},
    ]
    shared = environments(3, 2, 16, ["0", "1", "4", "5"], 99)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shared] == ["0,1", "4,5", "0,1"]


def test_metrics_are_read_on_and_again_when_some_were_dropped(tmp_path):
    comparison = plan(tmp_path, "adamw", lrs=1, seeds=1)
    run = comparison.run("adamw", 0.001, 42)
    run.folder.mkdir(parents=True)
    path, metrics = run.folder / "metrics.jsonl", Metrics(run)
    assert metrics.read() == []

    def line(step: int, loss: float) -> str:
        keys = [f"eval/validation/{name}/CE loss" for name in ("first", "second")]
        return json.dumps({"step": step, "stage": "one", **dict.fromkeys(keys, loss)}) + "\n"

    path.write_text(line(1, 3.125) + line(2, 2.0)[:-5])
    assert metrics.read() == [(1, 3.125)]
    path.write_text(line(1, 3.125) + line(2, 2.0))
    assert metrics.read() == [(2, 2.0)]
    draft = path.with_suffix(".tmp")
    draft.write_text(line(1, 3.0))
    os.replace(draft, path)
    assert metrics.read() == []
    with open(path, "a") as file:
        file.write(line(2, 2.0) + line(3, 1.0))
    assert (metrics.read(), metrics.step) == ([(3, 1.0)], 3)
