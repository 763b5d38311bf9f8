"""
The runs of a comparison as trials of Optuna's: a study for each arm, in one storage, which is the
queue, also of several machines. A run to be made is a waiting trial. Its place in the comparison
is its *slot*, an attribute of the trial; a trial that ended without a result leaves its slot to
another with the same parameters, which continues in the same folder.
"""

import re
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from threading import Lock
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import optuna
from filelock import FileLock
from olmo_core.exceptions import OLMoConfigurationError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from .alive import Worker
from .comparison import Comparison, RunPlan
from .folder import final_loss, read_trial, steps_of, write_trial
from .slots import (
    ERROR,
    SEED,
    SETTLED,
    SLOT,
    SlotState,
    best,
    by_slot,
    is_sampled,
    rounded,
    startup,
    state_of,
    wanted,
)

__all__ = ["Ended", "Outcome", "Queue", "open_storage", "storage_failure"]

HEARTBEAT, GRACE = 60, 300
"""Seconds between signs of life in a shared storage, and after how many without one a trial is
another machine's to continue."""

UNCLAIMED = 30.0
"""Seconds after which a running trial that says not who runs it was given up in that moment."""

KILLS = 3
"""How often a run that something kills is made before it counts as failed."""

WORKER, KILLED = "worker", "killed"
"""Further attributes of trials."""


class Ended(Enum):
    """How the process of a run has ended."""

    complete = "complete"
    failed = "failed"
    pruned = "pruned"
    stopped = "stopped"
    """Asked by the comparison's own end."""
    killed = "killed"
    """By somebody else."""


class Outcome(NamedTuple):
    how: Ended
    error: Optional[str] = None


Execute = Callable[[RunPlan, Callable[[int, float], bool]], Outcome]
"""Makes a run; calls what it is given with the step and the loss of each evaluation, and ends the
run if that returns true."""


class _NoResult(Exception):
    """Ends a trial of Optuna's that has no value."""


def open_storage(url: Optional[str], folder: Path) -> optuna.storages.RDBStorage:
    """
    The database of a comparison.

    :param url: Of a database that machines share; ``None`` is an SQLite file in the folder.

    :raises OLMoConfigurationError: If it cannot be opened.
    """
    own = url is None
    address = f"sqlite:///{folder / 'study.db'}" if url is None else url
    arguments: Dict[str, Any] = {}
    if address.startswith("sqlite"):
        arguments["engine_kwargs"] = {"connect_args": {"timeout": 100}}
    if not own:  # on one machine locks tell at once who is alive
        arguments.update(heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        # Optuna's making of its tables fails if two do it at once.
        with FileLock(folder / ".storage.lock"), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(address, **arguments)
    except (ImportError, RuntimeError, ValueError, SQLAlchemyError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0]
        shown = re.sub(r"(//[^:@/]*):[^@]*@", r"\1:***@", address)
        raise OLMoConfigurationError(
            f"--storage: {shown!r} cannot be opened ({_without_password(reason, address)}), "
            "allowed is a URL of a database with its driver installed, such as "
            "sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None


def storage_failure(error: Optional[BaseException]) -> Optional[str]:
    """What a database has said, if that is behind an error."""
    while error is not None:
        if isinstance(error, SQLAlchemyError):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def _without_password(text: str, url: str) -> str:
    found = re.search(r"//[^:@/]*:([^@]*)@", url)
    return text.replace(found[1], "***") if found and found[1] else text


class Queue:
    """
    The trials of a comparison. Threads may share it.

    :param identifier: Of the comparison's folder, as a storage may serve several comparisons.
    :param retry_failed: Make failed runs once more.
    """

    def __init__(
        self,
        comparison: Comparison,
        identifier: str,
        storage: optuna.storages.RDBStorage,
        worker: Worker,
        retry_failed: bool = False,
    ):
        self.comparison = comparison
        self.worker = worker
        self.finished = False
        self.slots: Dict[str, Dict[str, SlotState]] = {}
        """By arm and slot."""
        self.trials: Dict[str, Dict[str, List[FrozenTrial]]] = {}
        """Those of each slot, as they were at the last look."""
        self._storage = storage
        self._names = {arm: f"{comparison.name} {identifier} {arm}" for arm in comparison.arms}
        self._retry = retry_failed
        self._asking = Lock()
        self._unclaimed: Dict[Any, float] = {}
        self._studies = {}
        for arm, name in self._names.items():
            self._studies[arm] = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True
            )

    # What there is to do.

    def refresh(self) -> None:
        """Give up the trials of dead workers, and put what is missing in the queue."""
        slots = {}
        for arm, study in self._studies.items():
            self._give_up_dead(arm, study)
            slots[arm] = self._fill(arm, study)
        self._retry = False
        self.slots = slots
        self.finished = all(state in SETTLED for arm in slots.values() for state in arm.values())

    def _give_up_dead(self, arm: str, study: optuna.Study) -> None:
        shared = self._storage.get_heartbeat_interval() is not None
        if shared:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(study)
        with self._asking:  # or a thread here might just be about to say that a trial is its own
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if (worker := trial.user_attrs.get(WORKER)) is not None:
                dead = self.worker.knows_to_be_dead(worker)
            else:
                since = self._unclaimed.setdefault((arm, trial.number), time.monotonic())
                alone = not shared and self.worker.is_alone()
                dead = alone or time.monotonic() - since > UNCLAIMED
            if dead:
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _fill(self, arm: str, study: optuna.Study) -> Dict[str, SlotState]:
        trials = by_slot(study.get_trials(deepcopy=False))
        states = {}
        for slot in wanted(self.comparison, arm, trials):
            of_slot = trials.get(slot.name, [])
            state = state_of(of_slot)
            if state == SlotState.missing or (state == SlotState.failed and self._retry):
                params = of_slot[-1].params if of_slot else {}
                study.enqueue_trial(
                    params if slot.lr is None else {"lr": slot.lr},
                    user_attrs={SLOT: slot.name, SEED: slot.seed},
                )
                state = SlotState.waiting
            states[slot.name] = state
        self.trials[arm] = trials
        return states

    def best(self, arm: str) -> Optional[Tuple[float, float]]:
        """The lowest loss so far and its learning rate."""
        return best(trial for of_slot in self.trials[arm].values() for trial in of_slot)

    # Doing it.

    def run_next(self, execute: Execute) -> bool:
        """
        Take a waiting trial of the arm that is furthest behind, and make its run.

        :returns: Whether there was one.
        """
        with ExitStack() as asking:
            # An ask without a waiting trial would invent one.
            asking.enter_context(self._asking)
            arm = self._furthest_behind()
            if arm is None:
                return False
            study = self._load(arm)

            gone: List[FrozenTrial] = []

            def objective(trial: Trial) -> float:
                trial.set_user_attr(WORKER, self.worker.attribute)
                asking.close()
                try:
                    return self._make(arm, study, trial, execute)
                finally:
                    now = study.get_trials(deepcopy=False)[trial.number]
                    if now.state != TrialState.RUNNING:
                        gone.append(now)
                        raise _NoResult

            try:
                study.optimize(objective, n_trials=1, catch=(_NoResult,))
            except ValueError:
                # Another machine took this one for dead; what the run has done is in its folder.
                if not gone:
                    raise
        return True

    def _furthest_behind(self) -> Optional[str]:
        begun = {}
        for arm, study in self._studies.items():
            trials = study.get_trials(deepcopy=False)
            if any(trial.state == TrialState.WAITING for trial in trials):
                begun[arm] = sum(trial.state != TrialState.WAITING for trial in trials)
        return min(begun, key=lambda arm: begun[arm]) if begun else None

    def _load(self, arm: str) -> optuna.Study:
        # One for each run: the sampler is changed below.
        return optuna.load_study(
            storage=self._storage, study_name=self._names[arm], pruner=self._pruner(arm)
        )

    def _pruner(self, arm: str) -> optuna.pruners.BasePruner:
        comparison = self.comparison
        if not comparison.tune:
            return optuna.pruners.NopPruner()
        run = comparison.run(arm, comparison.rates[arm][0], comparison.seeds[0])
        # While learning rates rise, losses say little of where they will end.
        return optuna.pruners.MedianPruner(
            n_startup_trials=startup(comparison), n_warmup_steps=steps_of(run) // 3
        )

    def _make(self, arm: str, study: optuna.Study, trial: Trial, execute: Execute) -> float:
        if self._is_surplus(study, trial):
            raise _NoResult
        comparison, sampled = self.comparison, is_sampled(trial.user_attrs[SLOT])
        if sampled:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.sampler = optuna.samplers.TPESampler(
                    seed=(1000 * comparison.seeds[0] + trial.number) % 2**32,
                    n_startup_trials=startup(comparison),
                    constant_liar=True,  # other workers sample at the same time
                )
        rates = comparison.rates[arm]
        lr = trial.suggest_float("lr", rates[0], rates[-1], log=True)
        if comparison.tune:
            lr = rounded(lr)
        run = comparison.run(arm, lr, trial.user_attrs[SEED])
        if (before := read_trial(run.folder)) is not None and before["state"] == "complete":
            return final_loss(run)
        write_trial(run, "running")

        def observe(step: int, loss: float) -> bool:
            trial.report(loss, step)
            return sampled and trial.should_prune()

        return self._conclude(study, trial, run, execute(run, observe))

    def _conclude(self, study: optuna.Study, trial: Trial, run: RunPlan, outcome: Outcome) -> float:
        how, error = outcome
        if how == Ended.complete:
            loss = final_loss(run)
            diverged = loss == float("inf")
            error = "it diverged: the last validation loss is not finite" if diverged else None
            write_trial(run, "failed" if diverged else "complete", error)
            return loss
        if how == Ended.pruned:
            write_trial(run, "pruned")
            raise optuna.TrialPruned
        if how == Ended.killed:
            of_slot = by_slot(study.get_trials(deepcopy=False))[trial.user_attrs[SLOT]]
            if sum(KILLED in each.user_attrs for each in of_slot) < KILLS - 1:
                trial.set_user_attr(KILLED, error)
                raise _NoResult
            how, error = Ended.failed, f"{error}, {KILLS} times"
        if how == Ended.failed:
            write_trial(run, "failed", error)
            trial.set_user_attr(ERROR, error)
        raise _NoResult

    def _is_surplus(self, study: optuna.Study, trial: Trial) -> bool:
        """Asked for when another machine had just taken the last, or put there by two at once."""
        slot = trial.user_attrs.get(SLOT)
        if slot is None:
            return True
        return any(
            other.number < trial.number and other.state != TrialState.FAIL
            for other in by_slot(study.get_trials(deepcopy=False))[slot]
        )
