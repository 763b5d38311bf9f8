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
from olmo_core.data import DataCollator
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)
from olmo_core.distributed.utils import (
    get_fs_local_rank,
    get_rank,
    get_world_size,
)
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
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
from rich.console import Console
from rich.progress import Progress

from olmo_optim_ext.role_table import role_table, to_json, to_text
from olmo_optim_ext.training import (
    ClipGradValueCallback,
    HyperparameterScheduleCallback,
    MatrixMetricsCallback,
    averaged,
    needed_callbacks,
)
from olmo_optim_ext.wrappers.schedule_free import ScheduleFree, ScheduleFreeConfig

from . import checkpoints
from .callbacks import (
    MetricsFile,
    ProgressBar,
    StageCheckpointer,
    StopOnSignal,
    read_metrics,
)
from .decoding import decode_fields
from .drafts import write_whole
from .evaluation import SourceEvaluator, build_evaluator
from .facts import RunFacts
from .folder import claim, write_config
from .handover import begin
from .mixture import DrawnTokens, MixtureLoader, Share, build_mixture, share_out
from .plans import StagePlan, over_run, plan_stages
from .sources import TokenizedSource, prepare_source
from .summary import draw_curves, mixture_table, validation_table
from .timing import StepTimer
from .tokenizers import Tokenizer, load_tokenizer
from .training import JolmoModel

__all__ = ["Interrupted", "Run"]

log = logging.getLogger(__name__)

AVERAGE = "averaged"
"""
Folder with the weights to keep of ``schedule_free``, as OLMo-core's
``load_model_and_optim_state`` reads them for a model alone.
"""


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""


@dataclass
class Run:
    """
    A run of an experiment in its output folder; :meth:`execute` starts or continues it.

    :raises OLMoConfigurationError: If the spec, its data or the output folder do not allow a run.
    """

    spec: JolmoModel
    console: Console
    device: torch.device = field(default_factory=get_default_device)
    _built: Optional[OptimConfig] = field(default=None, repr=False)
    """Of which the train module has the optimizer."""

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
        lock = claim(self.spec, self.plans)
        try:
            for plan in self.plans:
                checkpoints.remove_half_written(plan.folder)
            tokenizer, sources = self.prepare_data()
            for plan in self.plans:
                self.spec.build_on_meta(tokenizer.config.vocab_size, plan.spec)
            shares = [self.shares(plan, sources) for plan in self.plans]
            if self.spec.warm_start is not None:
                checkpoints.weights_of(self.spec.warm_start.path)
            self._trackers("")
            write_config(self.spec)
            if incomplete := self._incomplete():
                train_module = self.build_train_module(incomplete[0], tokenizer)
                self._say_what_runs(train_module)
                for plan in incomplete:
                    self._run_stage(plan, train_module, tokenizer, sources, shares[plan.index])
                    self._draw()
                self._save_average(train_module)
            elif self._lacks_average():  # killed before it was saved
                train_module = self.build_train_module(self.plans[-1], tokenizer)
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
            self._print_summary(shares)
        finally:
            if lock is not None:
                lock.release()

    def _lacks_average(self) -> bool:
        wanted = isinstance(self.spec.optimizer_config(self.plans[-1].spec), ScheduleFreeConfig)
        return wanted and not (self.output / AVERAGE / ".metadata").exists()

    def _save_average(self, train_module: TransformerTrainModule) -> None:
        model, optim = train_module.model, train_module.optim
        if not isinstance(optim, ScheduleFree):
            return
        with averaged(model, optim):
            save_model_and_optim_state(self.output / AVERAGE, model, save_overwrite=True)
        self._say(f"The averaged weights, for use without the optimizer: {self.output / AVERAGE}")

    def _incomplete(self) -> List[StagePlan]:
        done = 0
        for plan in self.plans:
            if (saved := checkpoints.latest(plan.folder)) is not None:
                done = plan.index + (saved.step >= plan.last_step)
        return self.plans[done:]

    # What a stage is made of.

    def prepare_data(self) -> Tuple[Tokenizer, Dict[str, TokenizedSource]]:
        """The tokens of all sources, on disk. All ranks call it."""
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

    def build_train_module(self, plan: StagePlan, tokenizer: Tokenizer) -> TransformerTrainModule:
        """Model and optimizer of a stage; a process can build only one."""
        model_config = self.spec.model_config(tokenizer.config.vocab_size)
        # Some layers get the longest sequence when they are parallelised.
        longest = max(self.plans, key=lambda each: each.sequence_length)
        config = self.spec.train_module_config(get_world_size(), longest.spec)
        config.optim = self.spec.optimizer_config(plan.spec)
        seed_all(self.spec.seed)
        train_module = config.build(model_config.build(init_device="meta"), self.device)
        assert isinstance(train_module, TransformerTrainModule)
        self._built = config.optim
        self._write_roles(plan, train_module)
        return train_module

    def set_stage(self, plan: StagePlan, train_module: TransformerTrainModule) -> None:
        """Give the train module the optimizer, the sizes and the schedule of a stage."""
        train_module.rank_microbatch_size = plan.rank_microbatch_size
        train_module.max_sequence_length = plan.sequence_length
        train_module.scheduler = plan.scheduler(self.spec, self.plans)
        config = self.spec.optimizer_config(plan.spec)
        if config != self._built:
            train_module.optim = None  # its memory is for the next
            train_module.optim = config.build(train_module.model, strict=True)
            self._built = config
            self._write_roles(plan, train_module)

    def _write_roles(self, plan: StagePlan, train_module: TransformerTrainModule) -> None:
        config = self.spec.optimizer_config(plan.spec)
        assert train_module.optim is not None
        rows = role_table(train_module.model, config, train_module.optim)
        if get_rank() == 0:
            of_run = plan.optimizer == self.plans[0].optimizer
            folder = self.output if of_run else plan.folder
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (("roles.txt", to_text(rows)), ("roles.json", to_json(rows))):
                write_whole(folder / name, text)

    def _say_what_runs(self, train_module: TransformerTrainModule) -> None:
        params = sum(p.numel() for p in train_module.model.parameters())
        names = dict.fromkeys(str(plan.optimizer["name"]) for plan in self.plans)
        batches = dict.fromkeys(f"{plan.global_batch_size:,}" for plan in self.plans)
        self._say(
            f"{self.spec.name}: {params:,} parameters, {', then '.join(names)}, "
            f"{self.plans[-1].last_step:,} steps of {', then '.join(batches)} tokens, "
            f"{get_world_size()} rank(s) on {self.device.type}, in {self.output}"
        )

    def _work_dir(self) -> Path:
        return self.output / "work"

    def shares(self, plan: StagePlan, sources: Dict[str, TokenizedSource]) -> List[Share]:
        """What a stage takes of each source."""
        return share_out(plan, {name: source.train_tokens for name, source in sources.items()})

    def build_loader(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
        shares: List[Share],
    ) -> MixtureLoader:
        """The batches of a stage."""
        work_dir, seed = self._work_dir(), self.spec.seed + plan.index
        instances = {
            share.source: sources[share.source].train_instances(plan.sequence_length, work_dir)
            for share in shares
        }
        return MixtureLoader(
            build_mixture(plan, shares, instances, work_dir, seed),
            collator=_collator(tokenizer),
            tokenizer=tokenizer.config,
            work_dir=work_dir / f"{plan.index:02d}",
            global_batch_size=plan.global_batch_size,
            dp_world_size=get_world_size(train_module.dp_process_group),
            dp_rank=get_rank(train_module.dp_process_group),
            fs_local_rank=get_fs_local_rank(),
            seed=seed,
            target_device_type=self.device.type,
            display_source_visualization=False,
        )

    def build_evaluator(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
    ) -> SourceEvaluator:
        """The evaluator of all sources, with the sequences of a stage."""
        return build_evaluator(
            {
                source: tokens.validation_instances(plan.sequence_length, self._work_dir())
                for source, tokens in sources.items()
            },
            {source: tokens.bytes_per_token() for source, tokens in sources.items()},
            tokens=self.spec.evaluation.tokens // len(sources),
            rank_batch_size=plan.rank_microbatch_size,
            collator=_collator(tokenizer),
            device=self.device,
            dp_process_group=train_module.dp_process_group,
        )

    def _callbacks(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
        shares: List[Share],
    ) -> Dict[str, Callback]:
        spec, name = self.spec, plan.spec.name
        evaluator = self.build_evaluator(plan, train_module, tokenizer, sources)
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
            "drawn_tokens": DrawnTokens(tensor_ranks=spec.tensor_ranks(get_world_size())),
            "metrics_file": MetricsFile(path=self.metrics_path, plan=plan),
            "timer": StepTimer(),
            "facts": RunFacts(
                path=self.output / "run.json",
                stage=name,
                asked={share.source: share.asked for share in shares},
            ),
            "progress": ProgressBar(
                console=self.console,
                stage=name,
                first_step=plan.first_step,
                last_step=plan.last_step,
            ),
            "config_saver": ConfigSaverCallback(),
            **needed_callbacks(train_module.optim),
        }
        metrics = spec.optimizer_metrics
        if metrics is not None and spec.has_matrix_rule(plan.spec):
            callbacks["matrix_metrics"] = MatrixMetricsCallback(
                interval=metrics.every, per_layer=metrics.per_layer
            )
        for scheduled, scheduler in spec.hyperparameter_schedulers().items():
            schedule = HyperparameterScheduleCallback(scheduled, over_run(scheduler, self.plans))
            callbacks[f"{scheduled}_schedule"] = schedule
        if spec.max_grad_value is not None:
            callbacks["clip_grad_value"] = ClipGradValueCallback(spec.max_grad_value)
        return {**callbacks, **self._trackers(name)}

    def _trackers(self, stage: str) -> Dict[str, Callback]:
        """Of W&B and Comet, if they are asked for."""
        spec = self.spec
        callbacks: Dict[str, Callback] = {}
        run_name = f"{spec.name}-{stage}"
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
        shares: List[Share],
    ) -> Trainer:
        self.set_stage(plan, train_module)
        trainer = TrainerConfig(
            save_folder=str(plan.folder),
            work_dir=str(self._work_dir()),
            device=str(self.device),
            max_duration=Duration.steps(self.plans[-1].last_step),
            hard_stop=Duration.steps(plan.last_step),
            load_strategy=LoadStrategy.never,  # begin() decides what is loaded
            cancel_check_interval=sys.maxsize,  # StopOnSignal does it
            callbacks=self._callbacks(plan, train_module, tokenizer, sources, shares),
        ).build(train_module, self.build_loader(plan, train_module, tokenizer, sources, shares))
        config_saver = trainer.callbacks["config_saver"]
        assert isinstance(config_saver, ConfigSaverCallback)
        config_saver.config = self.spec.as_plain()
        return trainer

    def _run_stage(
        self,
        plan: StagePlan,
        train_module: TransformerTrainModule,
        tokenizer: Tokenizer,
        sources: Dict[str, TokenizedSource],
        shares: List[Share],
    ) -> None:
        seed_all(self.spec.seed + plan.index)
        for share in shares:
            if not math.isclose(share.asked, share.planned, rel_tol=1e-6):
                self._say(
                    f"{plan.spec.name}: {share.planned:.1%} from {share.source} instead of "
                    f"{share.asked:.1%}, because of max_repetitions"
                )
        trainer = self._build_trainer(plan, train_module, tokenizer, sources, shares)
        for line in begin(trainer, self.spec, self.plans, plan, tokenizer.config.vocab_size):
            self._say(line)
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
            names = dict.fromkeys(str(plan.optimizer["name"]) for plan in self.plans)
            draw_curves(
                read_metrics(self.metrics_path),
                [(plan.spec.name, plan.last_token) for plan in self.plans],
                list(self.spec.sources),
                f"{self.spec.name} ({', then '.join(names)})",
                self.output / "curves.png",
            )

    def _print_summary(self, shares: List[List[Share]]) -> None:
        if get_rank() != 0:
            return
        rows, sources = read_metrics(self.metrics_path), list(self.spec.sources)
        mixtures = {plan.spec.name: its for plan, its in zip(self.plans, shares)}
        self.console.print(mixture_table(rows, mixtures, sources))
        self.console.print(validation_table(rows, list(mixtures), sources))
        self._say(
            f"In {self.output}: config.yaml, roles.txt, roles.json, metrics.jsonl, curves.png and "
            "the checkpoints under stages."
        )


def _collator(tokenizer: Tokenizer) -> DataCollator:
    config = tokenizer.config
    return DataCollator(pad_token_id=config.pad_token_id, vocab_size=config.vocab_size)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "olmo-optim-ext"


def _require_package(package: str, key: Optional[str] = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise OLMoConfigurationError(
            f"{key or package}: it needs the package {package}, which is not installed; allowed is "
            f"null, or pip install {package}"
        )
