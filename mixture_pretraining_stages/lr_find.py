"""
A learning-rate range test of an experiment: its model, the data of its first stage and its
optimizer in a trainer of their own, beside whatever its output folder has already.
"""

import math
import shutil
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from filelock import FileLock, Timeout
from olmo_core.distributed.utils import barrier, broadcast_object, get_rank, get_world_size
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback
from olmo_core.utils import seed_all
from rich.console import Console

from olmo_optim_ext.config import ExtOptimConfig, learning_rate
from olmo_optim_ext.elementwise.adafactor import AdafactorConfig
from olmo_optim_ext.elementwise.prodigy import ProdigyConfig
from olmo_optim_ext.training import (
    ClipGradValueCallback,
    LRFinderCallback,
    needed_callbacks,
    suggest,
)

from .callbacks import ProgressBar, StopOnSignal
from .decoding import require, to_plain
from .handover import begin
from .lr_find_report import FoundRates, write_found
from .mixture import Share
from .plans import StagePlan
from .stages import Interrupted, Run
from .training import JolmoModel

__all__ = ["DECADES", "LRFind"]

DECADES = 3
"""How far the rates of a test go from that of the spec, in both directions."""

WORK = "lr_find.work"
"""Folder of what a test needs on disk while it runs."""


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
        self.stage = self.spec.stages[0]
        config = self.spec.optimizer_config(self.stage)
        self._name = self.spec.optimizer_of(self.stage)["name"]
        self._key = "optimizer" if self.stage.optimizer is None else "stages.0.optimizer"
        self._rule = config.rule_config if isinstance(config, ExtOptimConfig) else config
        self.lr = _rate_of(config, self._key)
        self._set_range()

    def _set_range(self) -> None:
        largest = math.inf
        if isinstance(self._rule, AdafactorConfig):
            largest = 1 / math.sqrt(self.steps)
        if self.min_lr is None:
            self.min_lr = self.lr / 10**DECADES
        if self.max_lr is None:
            self.max_lr = min(self.lr * 10**DECADES, largest)
        require(0 < self.min_lr < math.inf, "--min-lr", self.min_lr, "a finite number > 0")
        require(0 < self.max_lr < math.inf, "--max-lr", self.max_lr, "a finite number > 0")
        require(
            self.max_lr <= largest,
            "--max-lr",
            self.max_lr,
            f"at most {largest:.3g} with {self.steps} steps, as adafactor's rate is the smaller of "
            "lr and 1 / sqrt(step)",
        )
        allowed = f"less than that of --max-lr, {self.max_lr:.3g}"
        require(self.min_lr < self.max_lr, "--min-lr", self.min_lr, allowed)

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
            factor = suggestion.lr / self.lr / (self.stage.lr_scale or 1.0)
            fields = self.spec.optimizer_of(self.stage)
            overrides = _overrides(fields, self._key, self.lr, factor)
        found = FoundRates(rates, finder.losses, suggestion, overrides, self._note())
        if get_rank() == 0:
            asked = {
                "name": self.spec.name,
                "optimizer": to_plain(self.spec.optimizer_of(self.stage)),
                "lr": self.lr,
                "min_lr": self.min_lr,
                "max_lr": self.max_lr,
                "steps": self.steps,
            }
            write_found(found, asked, self.output)
        return found

    def _test(self, work: Path) -> LRFinderCallback:
        assert self.min_lr is not None and self.max_lr is not None
        finder = LRFinderCallback(
            low=self.min_lr / self.lr, high=self.max_lr / self.lr, steps=self.steps
        )
        trainer = self._build_trainer(finder, work)
        try:
            trainer.fit()
        finally:
            finder.restore()
        if not finder.finished:
            raise Interrupted(
                f"Interrupted at step {trainer.global_step} of {self.steps}; nothing was written"
            )
        return finder

    def _build_trainer(self, finder: LRFinderCallback, work: Path) -> Trainer:
        # All that a run writes goes into the work folder.
        run = Run(replace(self.spec, output=str(work)), self.console)
        tokenizer, sources = run.prepare_data()
        run.spec.build_on_meta(tokenizer.config.vocab_size, self.stage)
        plan = replace(run.plans[0], last_step=self.steps)
        # Of the whole stage, as they may be in tokens.
        shares = self._some_of(run.shares(run.plans[0], sources), plan)
        module = run.build_train_module(plan, tokenizer)
        run.set_stage(plan, module)
        self._say(
            f"{self.spec.name}: range test of {self._name}, from a learning rate of "
            f"{self.min_lr:.3g} to {self.max_lr:.3g} in {self.steps} steps of "
            f"{plan.global_batch_size:,} tokens, {get_world_size()} rank(s) on {run.device.type}"
        )
        seed_all(self.spec.seed)
        callbacks: Dict[str, Callback] = {
            "lr_finder": finder,
            "stop_on_signal": StopOnSignal(),
            "progress": ProgressBar(console=self.console, stage="lr-find", last_step=self.steps),
            **needed_callbacks(module.optim),
        }
        if (largest := self.spec.max_grad_value) is not None:
            callbacks["clip_grad_value"] = ClipGradValueCallback(largest)
        trainer = TrainerConfig(
            save_folder=str(plan.folder),
            work_dir=str(work),
            device=str(run.device),
            max_duration=Duration.steps(self.steps),
            load_strategy=LoadStrategy.never,  # begin() decides what is loaded
            no_checkpoints=True,
            no_evals=True,
            cancel_check_interval=sys.maxsize,  # StopOnSignal does it
            callbacks=callbacks,
        ).build(module, run.build_loader(plan, module, tokenizer, sources, shares))
        for line in begin(trainer, run.spec, run.plans, plan, tokenizer.config.vocab_size):
            if str(work) not in line:  # nothing in there remains
                self._say(line)
        return trainer

    def _some_of(self, shares: List[Share], plan: StagePlan) -> List[Share]:
        """Those of which the test has a sequence, in proportion."""
        drawn = [s for s in shares if s.planned * plan.tokens >= plan.sequence_length]
        for share in shares:
            if share not in drawn:
                self._say(f"lr-find: nothing from {share.source}, which is less than a sequence")
        total = sum(share.planned for share in drawn)
        return [share._replace(planned=share.planned / total) for share in drawn]

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

    def _say(self, text: str) -> None:
        if get_rank() == 0:
            self.console.print(text, highlight=False, soft_wrap=True)

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


def _rate_of(config: OptimConfig, key: str) -> float:
    lr = learning_rate(config)
    allowed = "a finite number > 0, which lr-find multiplies"
    require(isinstance(lr, (int, float)) and 0 < lr < math.inf, f"{key}.lr", lr, allowed)
    assert lr is not None
    return float(lr)


def _overrides(optimizer: Mapping[str, Any], where: str, lr: float, factor: float) -> List[str]:
    """
    ``key=value`` that multiply all learning rates of an optimizer's spec.

    :param where: The dotted key of the optimizer.
    :param lr: Its rate, if the spec has none.
    """
    rates: Dict[str, float] = {}
    inner = optimizer.get("inner") or {}
    for key, fields in ((where, optimizer), (f"{where}.inner", inner)):
        for name in ("lr", "adamw_lr"):
            if fields.get(name) is not None:
                rates[f"{key}.{name}"] = fields[name]
        for index, override in enumerate(fields.get("group_overrides") or []):
            if (own := override["opts"].get("lr")) is not None:
                rates[f"{key}.group_overrides.{index}.opts.lr"] = own
    if not {f"{where}.lr", f"{where}.inner.lr"} & rates.keys():
        rates = {f"{where}.lr": lr, **rates}
    return [f"{key}={rate * factor:.3g}" for key, rate in rates.items()]
