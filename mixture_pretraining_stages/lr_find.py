"""
A learning-rate range test of an experiment: its model, the data of its first stage and its
optimizer in a trainer of their own, beside whatever its output folder has already.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from filelock import FileLock, Timeout
from olmo_core.data import DataCollator
from olmo_core.distributed.utils import barrier, broadcast_object, get_rank, get_world_size
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.utils import seed_all
from rich.console import Console

from olmo_optim_ext.config import ExtOptimConfig
from olmo_optim_ext.elementwise.adafactor import AdafactorConfig
from olmo_optim_ext.elementwise.prodigy import ProdigyConfig
from olmo_optim_ext.training import LRFinderCallback, LRSuggestion, needed_callbacks, suggest

from .callbacks import ProgressBar, StopOnSignal
from .lr_find_plot import draw_range_test
from .stages import Interrupted, Run
from .training import JolmoModel

__all__ = ["DECADES", "FoundRates", "LRFind"]

DECADES = 3
"""How far the rates of a test go from that of the spec, in both directions."""

WORK = "lr_find.work"
"""Folder of what a test needs on disk while it runs."""


@dataclass(frozen=True)
class FoundRates:
    """What a test has found. Rates are in the units of the optimizer's ``lr``."""

    rates: List[float]
    losses: List[float]
    """After the step with each rate; the last one may be infinite or NaN."""
    suggestion: LRSuggestion
    overrides: List[str]
    """``key=value`` that give the spec the rate of the suggestion; empty if there is none."""
    note: Optional[str]
    """What to know of the rate of this optimizer."""


@dataclass
class LRFind:
    """
    A range test of a spec; :meth:`execute` makes it.

    :param min_lr: The lowest rate, in the units of the optimizer's ``lr``; all groups keep their
        proportion to it. The default is ``lr`` less :data:`DECADES`, likewise that of ``max_lr``.
    :param steps: How many, at most.

    :raises OLMoConfigurationError: If the spec, its data, its output folder or the rates do not
        allow a test.
    """

    spec: JolmoModel
    console: Console
    min_lr: Optional[float] = None
    max_lr: Optional[float] = None
    steps: int = 100

    def __post_init__(self) -> None:
        self.spec.check(get_world_size())
        self.output = Path(self.spec.output)
        config = self.spec.optimizer_config()
        self._rule = config.rule_config if isinstance(config, ExtOptimConfig) else config
        self.lr = _rate_of(config)
        self._set_range()

    def _set_range(self) -> None:
        largest = math.inf
        if isinstance(self._rule, AdafactorConfig):
            largest = 1 / math.sqrt(self.steps)
        if self.min_lr is None:
            self.min_lr = self.lr / 10**DECADES
        if self.max_lr is None:
            self.max_lr = min(self.lr * 10**DECADES, largest)
        _require(0 < self.min_lr < math.inf, "--min-lr", self.min_lr, "a finite number > 0")
        _require(0 < self.max_lr < math.inf, "--max-lr", self.max_lr, "a finite number > 0")
        _require(
            self.max_lr <= largest,
            "--max-lr",
            self.max_lr,
            f"at most {largest:.3g} with {self.steps} steps, as adafactor's rate is the smaller of "
            "lr and 1 / sqrt(step)",
        )
        allowed = f"less than that of --max-lr, {self.max_lr:.3g}"
        _require(self.min_lr < self.max_lr, "--min-lr", self.min_lr, allowed)

    def execute(self) -> FoundRates:
        """
        Make the test, and leave ``lr_find.json`` and ``lr_find.png`` in the output folder, where
        nothing else changes. Collective; all ranks return the same.

        :raises Interrupted: If a signal asked to stop. Nothing is written then.
        """
        with self._work_folder() as work:
            finder = self._test(work)
        rates = [self.lr * factor for factor in finder.factors]
        suggestion = suggest(rates, finder.losses)
        overrides = []
        if suggestion.lr is not None:
            factor = suggestion.lr / self.lr / (self.spec.stages[0].lr_scale or 1.0)
            overrides = _overrides(self.spec.optimizer, self.lr, factor)
        found = FoundRates(rates, finder.losses, suggestion, overrides, self._note())
        if get_rank() == 0:
            self._write(found)
        return found

    def _test(self, work: Path) -> LRFinderCallback:
        assert self.min_lr is not None and self.max_lr is not None
        stage = replace(self.spec.stages[0], tokens=self.steps * self.spec.global_batch_size)
        name = f"{self.spec.name}, range test"
        run = Run(replace(self.spec, name=name, stages=[stage], output=str(work)), self.console)
        finder = LRFinderCallback(
            low=self.min_lr / self.lr, high=self.max_lr / self.lr, steps=self.steps
        )
        trainer = self._build_trainer(run, finder, work)
        try:
            trainer.fit()
        finally:
            finder.restore()
        if not finder.finished:
            raise Interrupted(
                f"Interrupted at step {trainer.global_step} of {self.steps}; nothing was written"
            )
        return finder

    def _build_trainer(self, run: Run, finder: LRFinderCallback, work: Path) -> Trainer:
        (plan,) = run.plans
        tokenizer, sources = run._prepare_data()
        run.spec.build_on_meta(tokenizer.config.vocab_size)
        module = run._build_train_module(tokenizer)
        seed_all(self.spec.seed)
        collator = DataCollator(
            pad_token_id=tokenizer.config.pad_token_id, vocab_size=tokenizer.config.vocab_size
        )
        return TrainerConfig(
            save_folder=str(work),
            work_dir=str(work),
            device=str(run.device),
            max_duration=Duration.steps(self.steps),
            load_strategy=LoadStrategy.never,
            no_checkpoints=True,
            no_evals=True,
            cancel_check_interval=sys.maxsize,  # StopOnSignal does it
            callbacks={
                "lr_finder": finder,
                "stop_on_signal": StopOnSignal(),
                "progress": ProgressBar(
                    console=self.console, stage="lr-find", last_step=self.steps
                ),
                **needed_callbacks(module.optim),
            },
        ).build(module, run._build_loader(plan, module, tokenizer, sources, collator))

    @contextmanager
    def _work_folder(self) -> Iterator[Path]:
        work = self.output / WORK
        lock = FileLock(self.output / ".lr_find.lock")
        problem: Optional[str] = None
        if get_rank() == 0:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
                shutil.rmtree(work, ignore_errors=True)  # what a killed test has left
                work.mkdir()
            except Timeout:
                problem = (
                    f"output: another lr-find is running in {self.output}, allowed is one at a time"
                )
            except OSError as error:
                problem = (
                    f"output: {self.output} cannot be written ({error.strerror}), allowed is a "
                    "folder that can"
                )
        problem = broadcast_object(problem)  # or the other ranks would wait for this one
        try:
            if problem is not None:
                raise OLMoConfigurationError(problem)
            yield work
            barrier()
        finally:
            if lock.is_locked:
                shutil.rmtree(work, ignore_errors=True)
                lock.release()

    def _note(self) -> Optional[str]:
        if isinstance(self._rule, ProdigyConfig):
            return (
                "prodigy estimates its rate from how far it has come, and lr multiplies that: the "
                "curve shows both, and its authors advise to leave lr at 1."
            )
        if isinstance(self._rule, AdafactorConfig):
            return (
                "adafactor's rate is the smaller of lr and 1 / sqrt(step), so no test goes higher; "
                "where the loss falls fastest at the end, lr=1 leaves the rate to 1 / sqrt(step)."
            )
        return None

    def _write(self, found: FoundRates) -> None:
        result: Dict[str, Any] = {
            "name": self.spec.name,
            "optimizer": self.spec.as_plain()["optimizer"],
            "lr": self.lr,
            "min_lr": self.min_lr,
            "max_lr": self.max_lr,
            "steps": self.steps,
            "suggestion": found.suggestion.lr,
            "reason": found.suggestion.reason,
            "steepest": found.suggestion.steepest,
            "minimum": found.suggestion.minimum,
            "diverged_at": found.suggestion.diverged_at,
            "overrides": found.overrides,
            "note": found.note,
            "rates": found.rates,
            "losses": [loss if math.isfinite(loss) else None for loss in found.losses],
        }
        draft = self.output / "lr_find.tmp"
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.output / "lr_find.json")
        draw_range_test(
            found.rates,
            found.losses,
            found.suggestion,
            f"{self.spec.name} ({self.spec.optimizer['name']})",
            self.output / "lr_find.png",
        )


def _rate_of(config: OptimConfig) -> float:
    if isinstance(config, ExtOptimConfig):
        lr = config.hyperparameters()["lr"]
    else:
        lr = getattr(config, "lr", None)
    allowed = "a finite number > 0, which lr-find multiplies"
    _require(isinstance(lr, (int, float)) and 0 < lr < math.inf, "optimizer.lr", lr, allowed)
    assert lr is not None
    return float(lr)


def _overrides(optimizer: Mapping[str, Any], lr: float, factor: float) -> List[str]:
    """``key=value`` that multiply all learning rates of an optimizer's spec."""
    rates: Dict[str, float] = {}
    inner = optimizer.get("inner") or {}
    for where, fields in (("optimizer", optimizer), ("optimizer.inner", inner)):
        for key in ("lr", "adamw_lr"):
            if fields.get(key) is not None:
                rates[f"{where}.{key}"] = fields[key]
        for index, override in enumerate(fields.get("group_overrides") or []):
            for key in ("lr", "adamw_lr"):
                if override["opts"].get(key) is not None:
                    rates[f"{where}.group_overrides.{index}.opts.{key}"] = override["opts"][key]
    if not {"optimizer.lr", "optimizer.inner.lr"} & rates.keys():
        rates = {"optimizer.lr": lr, **rates}
    return [f"{key}={rate * factor:.3g}" for key, rate in rates.items()]


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise OLMoConfigurationError(f"{key}: {value!r} is not allowed, allowed is {allowed}")
