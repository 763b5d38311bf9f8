"""
Running an experiment: its stages one after the other, each with a trainer of OLMo-core's and a
folder of its own. Model, optimizer and counters go from one stage to the next through a checkpoint,
so a run that was killed between two stages continues like one that was not.
"""

import importlib.util
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from filelock import FileLock, Timeout
from olmo_core.data import DataCollator
from olmo_core.data.composable import (
    ComposableDataLoader,
    InstanceSource,
    MixingInstanceSource,
)
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from olmo_core.distributed.utils import (
    broadcast_object,
    get_fs_local_rank,
    get_rank,
    get_world_size,
)
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import (
    Callback,
    CometCallback,
    ConfigSaverCallback,
    EvaluatorCallback,
    WandBCallback,
)
from olmo_core.train.train_module import TransformerTrainModule
from olmo_core.utils import get_default_device, seed_all
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import Progress
from yaml import YAMLError

from olmo_optim_ext.role_table import role_table, to_json, to_text
from olmo_optim_ext.training import MatrixMetricsCallback, averaged, needed_callbacks
from olmo_optim_ext.wrappers.schedule_free import ScheduleFree, ScheduleFreeConfig

from . import checkpoints
from .callbacks import (
    MetricsFile,
    ProgressBar,
    StageCheckpointer,
    StageScheduler,
    StopOnSignal,
    read_metrics,
)
from .decoding import decode_fields
from .evaluation import build_evaluator
from .facts import RunFacts
from .report import draw_curves, validation_table
from .sources import TokenizedSource, prepare_source
from .timing import StepTimer
from .tokenizers import Tokenizer, load_tokenizer
from .training import JolmoModel, StageSpec

__all__ = ["Interrupted", "Run", "StagePlan", "plan_stages"]

log = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {
        *("name", "output", "cache", "wandb", "comet", "parallelism", "rank_microbatch_size"),
        *("evaluation", "checkpoint", "optimizer_metrics"),
        *("compile", "activation_checkpointing"),
    }
)
"""Keys whose values may change when a run continues: they do not say what is trained on what."""


AVERAGE = "averaged"
"""
Folder with the weights to keep of ``schedule_free``, as OLMo-core's
``load_model_and_optim_state`` reads them for a model alone.
"""


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""


@dataclass(frozen=True)
class StagePlan:
    """A stage and its place in the run."""

    spec: StageSpec
    index: int
    first_step: int
    """Steps of the run before it."""
    last_step: int
    folder: Path


def plan_stages(spec: JolmoModel) -> List[StagePlan]:
    """The stages with their steps, which are counted over the whole run."""
    plans: List[StagePlan] = []
    step = 0
    for index, stage in enumerate(spec.stages):
        last = step + math.ceil(stage.tokens / spec.global_batch_size)
        folder = Path(spec.output) / "stages" / f"{index:02d}-{stage.name}"
        plans.append(StagePlan(stage, index, step, last, folder))
        step = last
    return plans


@dataclass
class Run:
    """
    A run of an experiment in its output folder; :meth:`execute` starts or continues it.

    :raises OLMoConfigurationError: If the spec, its data or the output folder do not allow a run.
    """

    spec: JolmoModel
    console: Console
    device: torch.device = field(default_factory=get_default_device)

    def __post_init__(self) -> None:
        self.spec.check(get_world_size())
        self.plans = plan_stages(self.spec)
        self.output = Path(self.spec.output)
        self.metrics_path = self.output / "metrics.jsonl"

    def execute(self) -> None:
        """
        Run all stages that are not complete.

        :raises Interrupted: After saving, if a signal asked to stop.
        """
        lock = self._claim_output()
        try:
            for plan in self.plans:
                checkpoints.remove_half_written(plan.folder)
            tokenizer, sources = self._prepare_data()
            self.spec.build_on_meta(tokenizer.config.vocab_size)
            self._write_config()
            if incomplete := self._incomplete():
                train_module = self._build_train_module(tokenizer)
                for plan in incomplete:
                    self._run_stage(plan, train_module, tokenizer, sources)
                    self._draw()
                self._save_average(train_module)
            elif self._lacks_average():  # killed before it was saved
                train_module = self._build_train_module(tokenizer)
                saved = checkpoints.latest(self.plans[-1].folder)
                assert saved is not None
                checkpoints.check_fits(saved.path, train_module)
                load_model_and_optim_state(
                    f"{saved.path}/model_and_optim",
                    *(train_module.model, train_module.optim),
                    flatten_optimizer_state=True,  # as the trainer saves it
                )
                self._save_average(train_module)
            else:
                self._say(f"{self.spec.name}: the run in {self.output} is complete")
                self._draw()
            self._print_summary(sources)
        finally:
            if lock is not None:
                lock.release()

    def _lacks_average(self) -> bool:
        wanted = isinstance(self.spec.optimizer_config(), ScheduleFreeConfig)
        return wanted and not (self.output / AVERAGE / ".metadata").exists()

    def _save_average(self, train_module: TransformerTrainModule) -> None:
        model, optim = train_module.model, train_module.optim
        if not isinstance(optim, ScheduleFree):
            return
        with averaged(model, optim):
            save_model_and_optim_state(self.output / AVERAGE, model, save_overwrite=True)
        self._say(f"The averaged weights, for use without the optimizer: {self.output / AVERAGE}")

    # The output folder.

    def _claim_output(self) -> Optional[FileLock]:
        lock: Optional[FileLock] = None
        problem: Optional[str] = None
        if get_rank() == 0:
            lock = FileLock(self.output / ".lock")
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
                self._compare_config()
            except Timeout:
                problem = (
                    f"output: another process is running in {self.output}, allowed is one at a time"
                )
            except OSError as error:
                problem = (
                    f"output: {self.output} cannot be written ({error.strerror}), allowed is a "
                    "folder that can"
                )
            except OLMoConfigurationError as error:
                problem = str(error)
        problem = broadcast_object(problem)  # or the other ranks would wait for this one
        if problem is not None:
            if lock is not None:
                lock.release()
            raise OLMoConfigurationError(problem)
        return lock

    def _compare_config(self) -> None:
        path = self.output / "config.yaml"
        if not path.exists() or all(checkpoints.latest(p.folder) is None for p in self.plans):
            return  # nothing has been trained here, so nothing is lost
        try:
            before = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(before, dict)
        except (UnicodeDecodeError, YAMLError, OmegaConfBaseException, AssertionError):
            raise OLMoConfigurationError(
                f"output: {path} is damaged, allowed is the one that the run wrote, or another "
                "folder: output=FOLDER"
            ) from None
        changed = [
            f"{key} {before.get(key)!r} -> {value!r}"
            for key, value in self.spec.as_plain().items()
            if key not in MAY_CHANGE and before.get(key) != value
        ]
        if changed:
            raise OLMoConfigurationError(
                f"output: {self.output} has a run with another config ({'; '.join(changed)}), "
                "allowed is the same config or another folder: output=FOLDER"
            )

    def _write_config(self) -> None:
        if get_rank() == 0:
            draft = self.output / "config.tmp"
            OmegaConf.save(OmegaConf.create(self.spec.as_plain()), draft)
            os.replace(draft, self.output / "config.yaml")

    def _incomplete(self) -> List[StagePlan]:
        done = 0
        for plan in self.plans:
            if (saved := checkpoints.latest(plan.folder)) is not None:
                done = plan.index + (saved.step >= plan.last_step)
        return self.plans[done:]

    # What a stage is made of.

    def _prepare_data(self) -> Tuple[Tokenizer, Dict[str, TokenizedSource]]:
        tokenizer = load_tokenizer(self.spec.tokenizer)
        cache = Path(self.spec.cache) if self.spec.cache else _default_cache()
        sources = {}
        with Progress(console=self.console, transient=True, disable=get_rank() != 0) as bar:
            tasks: Dict[str, Any] = {}

            def advance(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = bar.add_task(f"tokenising {name}", total=total)
                bar.update(tasks[name], completed=done)

            for name, source in self.spec.sources.items():
                sources[name] = prepare_source(name, source, tokenizer, cache, advance)
        return tokenizer, sources

    def _build_train_module(self, tokenizer: Tokenizer) -> TransformerTrainModule:
        model_config = self.spec.model_config(tokenizer.config.vocab_size)
        config = self.spec.train_module_config(get_world_size())
        seed_all(self.spec.seed)
        train_module = config.build(model_config.build(init_device="meta"), self.device)
        assert isinstance(train_module, TransformerTrainModule)
        assert train_module.optim is not None
        rows = role_table(train_module.model, config.optim, train_module.optim)
        if get_rank() == 0:
            (self.output / "roles.txt").write_text(to_text(rows))
            (self.output / "roles.json").write_text(to_json(rows))
            params = sum(math.prod(row.shape) for row in rows)
            counts: Dict[str, int] = {}
            for row in rows:
                counts[row.algorithm] = counts.get(row.algorithm, 0) + math.prod(row.shape)
            shares = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            self._say(
                f"{self.spec.name}: {params:,} parameters ({shares}), "
                f"{self.plans[-1].last_step:,} steps of {self.spec.global_batch_size:,} tokens, "
                f"{get_world_size()} rank(s) on {self.device.type}, in {self.output}"
            )
        return train_module

    def _work_dir(self) -> Path:
        return self.output / "work"

    def _mixture(self, plan: StagePlan, sources: Dict[str, TokenizedSource]) -> InstanceSource:
        # One batch more than needed: shares are rounded down to whole instances.
        steps = plan.last_step - plan.first_step + 1
        tokens = steps * self.spec.global_batch_size
        specs = []
        for name, share in _shares(plan.spec).items():
            source = sources[name].train_instances(self.spec.sequence_length, self._work_dir())
            needed = tokens * share / source.num_tokens
            specs.append(
                MixingInstanceSource.Spec(
                    source=source,
                    ratio=share,
                    max_repetition_factor=max(1.0, 1.01 * needed),
                    label=name,
                )
            )
        return MixingInstanceSource(
            *specs,
            work_dir=self._work_dir(),
            seed=self.spec.seed + plan.index,
            num_tokens=tokens,
        )

    def _callbacks(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
        collator: DataCollator,
    ) -> Dict[str, Callback]:
        spec, name = self.spec, plan.spec.name
        evaluator = build_evaluator(
            {
                source: tokens.validation_instances(spec.sequence_length, self._work_dir())
                for source, tokens in sources.items()
            },
            {source: tokens.bytes_per_token() for source, tokens in sources.items()},
            tokens=spec.evaluation.tokens // len(sources),
            rank_batch_size=spec.rank_microbatch_size,
            collator=collator,
            device=self.device,
            dp_process_group=train_module.dp_process_group,
        )
        callbacks: Dict[str, Callback] = {
            "evaluator": EvaluatorCallback(
                evaluators=[evaluator],
                eval_interval=spec.evaluation.every,
                fixed_steps=[plan.last_step],
            ),
            "checkpointer": StageCheckpointer(
                save_interval=spec.checkpoint.every,
                fixed_steps=[plan.last_step],
                max_checkpoints=spec.checkpoint.keep,
                pre_train_checkpoint=False,
                # OLMo-core's asynchronous save records its duration from a thread, at a step that
                # may differ between ranks, and then the reduction of metrics hangs.
                save_async=False,
            ),
            "stop_on_signal": StopOnSignal(),
            "metrics_file": MetricsFile(path=self.metrics_path, stage=name),
            "timer": StepTimer(),
            "facts": RunFacts(path=self.output / "run.json", stage=name),
            "progress": ProgressBar(
                console=self.console,
                stage=name,
                first_step=plan.first_step,
                last_step=plan.last_step,
            ),
            "config_saver": ConfigSaverCallback(),
            **needed_callbacks(train_module.optim),
        }
        if (metrics := spec.optimizer_metrics) is not None:
            callbacks["matrix_metrics"] = MatrixMetricsCallback(
                interval=metrics.every, per_layer=metrics.per_layer
            )
        run_name = f"{spec.name}-{name}"
        if spec.wandb is not None:
            _require_package("wandb")
            fields = {"name": run_name, "group": spec.name, **spec.wandb}
            callbacks["wandb"] = decode_fields(WandBCallback, fields, "wandb")
        if spec.comet is not None:
            _require_package("comet_ml", key="comet")
            callbacks["comet"] = decode_fields(
                CometCallback, {"name": run_name, **spec.comet}, "comet"
            )
        return callbacks

    def _build_trainer(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
    ) -> Trainer:
        spec = self.spec
        collator = DataCollator(
            pad_token_id=tokenizer.config.pad_token_id, vocab_size=tokenizer.config.vocab_size
        )
        loader = ComposableDataLoader(
            self._mixture(plan, sources),
            collator=collator,
            tokenizer=tokenizer.config,
            work_dir=self._work_dir() / f"{plan.index:02d}",
            global_batch_size=spec.global_batch_size,
            dp_world_size=get_world_size(train_module.dp_process_group),
            dp_rank=get_rank(train_module.dp_process_group),
            fs_local_rank=get_fs_local_rank(),
            seed=spec.seed + plan.index,
            target_device_type=self.device.type,
            display_source_visualization=False,
        )
        train_module.scheduler = StageScheduler(
            inner=spec.scheduler_config(), scale=plan.spec.lr_scale
        )
        trainer = TrainerConfig(
            save_folder=str(plan.folder),
            work_dir=str(self._work_dir()),
            device=str(self.device),
            max_duration=Duration.steps(self.plans[-1].last_step),
            hard_stop=Duration.steps(plan.last_step),
            load_strategy=LoadStrategy.never,  # _restore() decides what is loaded
            cancel_check_interval=sys.maxsize,  # StopOnSignal does it
            callbacks=self._callbacks(plan, train_module, tokenizer, sources, collator),
        ).build(train_module, loader)
        config_saver = trainer.callbacks["config_saver"]
        assert isinstance(config_saver, ConfigSaverCallback)
        config_saver.config = spec.as_plain()
        return trainer

    def _restore(self, trainer: Trainer, plan: StagePlan) -> None:
        """Continue the stage, or begin it where the one before has ended."""
        module = trainer.train_module
        assert isinstance(module, TransformerTrainModule)
        if (saved := checkpoints.latest(plan.folder)) is not None:
            checkpoints.check_fits(saved.path, module)
            trainer.load_checkpoint(saved.path, load_trainer_state=True, load_optim_state=True)
            self._say(f"{plan.spec.name}: continuing from {saved.path}")
        elif plan.index > 0:
            before = checkpoints.latest(self.plans[plan.index - 1].folder)
            assert before is not None
            checkpoints.check_fits(before.path, module)
            trainer.load_checkpoint(before.path, load_trainer_state=False, load_optim_state=True)
            state = torch.load(Path(before.path) / "train" / "rank0.pt", weights_only=False)
            trainer.global_step = state["global_step"]
            trainer.global_train_tokens_seen = state["global_train_tokens_seen"]
            trainer.global_train_petaflops = state["global_train_petaflops"]

    def _run_stage(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
    ) -> None:
        seed_all(self.spec.seed + plan.index)
        trainer = self._build_trainer(plan, train_module, tokenizer, sources)
        self._restore(trainer, plan)
        trainer.fit()
        stop = trainer.callbacks["stop_on_signal"]
        assert isinstance(stop, StopOnSignal)
        # A signal during the last save comes after the last step.
        stopped = stop.asked() or trainer.is_canceled
        saved = checkpoints.latest(plan.folder)
        finished = saved is not None and saved.step >= self.plans[-1].last_step
        if stopped and not finished:
            self._draw()
            raise Interrupted(
                f"Interrupted at step {trainer.global_step} of {self.plans[-1].last_step}, in "
                f"stage '{plan.spec.name}'; saved as {saved.path if saved else 'nothing'}"
            )

    # What it shows.

    def _say(self, text: str) -> None:
        if get_rank() == 0:
            self.console.print(text, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if get_rank() == 0:
            batch = self.spec.global_batch_size
            draw_curves(
                read_metrics(self.metrics_path),
                [(plan.spec.name, plan.last_step * batch) for plan in self.plans],
                list(self.spec.sources),
                f"{self.spec.name} ({self.spec.optimizer['name']})",
                self.output / "curves.png",
            )

    def _print_summary(self, sources: Dict[str, TokenizedSource]) -> None:
        if get_rank() != 0:
            return
        epochs = {}
        for plan in self.plans:
            tokens = (plan.last_step - plan.first_step) * self.spec.global_batch_size
            for name, share in _shares(plan.spec).items():
                epochs[plan.spec.name, name] = tokens * share / sources[name].train_tokens
        self.console.print(
            validation_table(
                read_metrics(self.metrics_path),
                [plan.spec.name for plan in self.plans],
                list(self.spec.sources),
                epochs,
            )
        )
        self._say(
            f"In {self.output}: config.yaml, roles.txt, roles.json, metrics.jsonl, curves.png and "
            "the checkpoints under stages."
        )


def _shares(stage: StageSpec) -> Dict[str, float]:
    total = sum(stage.mixture.values())
    return {name: weight / total for name, weight in stage.mixture.items() if weight > 0}


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "olmo-optim-ext"


def _require_package(package: str, key: Optional[str] = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise OLMoConfigurationError(
            f"{key or package}: it needs the package {package}, which is not installed; allowed is "
            f"null, or pip install {package}"
        )
