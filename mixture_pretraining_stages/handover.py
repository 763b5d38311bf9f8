"""
What a stage begins with: its own last checkpoint, what the stage before has left, or a checkpoint
of another run's; and where the optimizer is another, what goes over from one to the other.
"""

import json
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from olmo_core.distributed.checkpoint import load_model_and_optim_state
from olmo_core.distributed.utils import get_rank
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from olmo_core.train import Trainer
from olmo_core.train.train_module import TransformerTrainModule

from olmo_optim_ext.engine.base import ExtOptimizer
from olmo_optim_ext.training import Decision, carry_over
from olmo_optim_ext.training.passes import forget_whole_parameters
from olmo_optim_ext.wrappers.schedule_free import ScheduleFree, ScheduleFreeConfig

from . import checkpoints
from .drafts import write_whole
from .plans import StagePlan, same_kind
from .training import JolmoModel

__all__ = ["begin"]

CARRIED = "carried.json"
"""In the folder of a stage: what went over from another optimizer, and what began anew."""


def begin(
    trainer: Trainer, spec: JolmoModel, plans: Sequence[StagePlan], plan: StagePlan, vocab_size: int
) -> List[str]:
    """
    Continue the stage, or begin it. All ranks call it.

    :returns: What happened, for a person.

    :raises OLMoConfigurationError: If a checkpoint does not fit.
    """
    if (saved := checkpoints.latest(plan.folder)) is not None:
        checkpoints.check_fits(saved.path, _module(trainer))
        trainer.load_checkpoint(saved.path, load_trainer_state=True, load_optim_state=True)
        return [f"{plan.spec.name}: continuing from {saved.path}"]
    if plan.index > 0:
        before = checkpoints.latest(plans[plan.index - 1].folder)
        assert before is not None
        state = torch.load(Path(before.path) / "train" / "rank0.pt", weights_only=False)
        trainer.global_step = state["global_step"]
        trainer.global_train_tokens_seen = state["global_train_tokens_seen"]
        trainer.global_train_petaflops = state["global_train_petaflops"]
        source = spec.optimizer_config(plans[plan.index - 1].spec)
        return _load(trainer, spec, plan, f"{before.path}/model_and_optim", source, vocab_size)
    if spec.warm_start is None:
        return []
    folder = checkpoints.weights_of(spec.warm_start.path)
    said = [f"{plan.spec.name}: begins with the weights of {folder}"]
    if not spec.warm_start.optimizer_state:
        module = _module(trainer)
        checkpoints.check_weights_fit(folder, module)
        load_model_and_optim_state(folder, module.model)
        return said
    if not checkpoints.has_optimizer_state(folder):
        raise OLMoConfigurationError(
            f"warm_start.optimizer_state: True is not allowed with {folder}, which has no "
            "state of an optimizer; allowed is false"
        )
    source = spec.warm_start_optimizer_config()
    return said + _load(trainer, spec, plan, folder, source, vocab_size)


def _module(trainer: Trainer) -> TransformerTrainModule:
    module = trainer.train_module
    assert isinstance(module, TransformerTrainModule)
    return module


def _load(
    trainer: Trainer,
    spec: JolmoModel,
    plan: StagePlan,
    folder: str,
    source: OptimConfig,
    vocab_size: int,
) -> List[str]:
    """Load weights, and of the optimizer's state what means the same in the stage's."""
    module = _module(trainer)
    optim, ours = module.optim, spec.optimizer_config(plan.spec)
    assert optim is not None
    if same_kind(source, ours) and (source == ours or checkpoints.misfit(folder, module) is None):
        checkpoints.check_fits(folder, module)
        load_model_and_optim_state(
            folder,
            *(module.model, optim),
            flatten_optimizer_state=True,  # as the trainer saves it
        )
        if not isinstance(optim, ExtOptimizer):
            _give_options(optim, ours, _on_meta(spec, vocab_size))
        return []
    if not isinstance(optim, ExtOptimizer):
        raise OLMoConfigurationError(
            f"stages.{plan.index}.optimizer: state of another optimizer cannot go over to "
            f"{type(optim).__name__}, allowed are those of `olmo-optim list`"
        )
    said = []
    if isinstance(source, ScheduleFreeConfig):
        _load_average(module, source, folder)
        said = [f"{plan.spec.name}: begins with the averaged weights of schedule_free"]
    else:
        checkpoints.check_weights_fit(folder, module)
        load_model_and_optim_state(folder, module.model)
    model = _on_meta(spec, vocab_size)
    decisions = carry_over(optim, source.build(model), model, folder)
    if get_rank() == 0:
        plan.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(decision) for decision in decisions], indent=1)
        write_whole(plan.folder / CARRIED, text + "\n")
    return said + _in_words(plan, decisions)


def _load_average(module: TransformerTrainModule, source: ScheduleFreeConfig, folder: str) -> None:
    """Load the weights to keep of ``schedule_free``, which were evaluated, not those it trains."""
    ours, before = module.optim, source.build(module.model)
    assert isinstance(before, ScheduleFree)
    module.optim = before
    try:
        checkpoints.check_fits(folder, module)
        load_model_and_optim_state(folder, module.model, before, flatten_optimizer_state=True)
    finally:
        module.optim = ours
    forget_whole_parameters(module.model)
    before.swap_to_average()  # for good: it goes no further


def _on_meta(spec: JolmoModel, vocab_size: int) -> nn.Module:
    """The model, to build optimizers of which only the groups are wanted."""
    return spec.model_config(vocab_size).build(init_device="meta")


def _give_options(optim: torch.optim.Optimizer, config: OptimConfig, model: nn.Module) -> None:
    """
    Give an optimizer the options of its config again: one of OLMo-core's has got those of the
    checkpoint with its state.

    :param model: As the optimizer's, on the meta device.
    """
    options = {f.name for f in fields(config)} - {"lr"}  # which its scheduler sets
    for group, fresh in zip(optim.param_groups, config.build(model).param_groups):
        group.update({key: fresh[key] for key in options & fresh.keys()})


def _in_words(plan: StagePlan, decisions: Sequence[Decision]) -> List[str]:
    over = Counter((d.source, d.state, d.why.split(",")[0]) for d in decisions if d.source)
    anew = Counter((d.state, d.why) for d in decisions if not d.source)
    if plan.warmup:
        warmup = f"; the learning rate rises to the schedule's in {plan.warmup} steps"
    else:
        warmup = ""
    lines = [f"{plan.spec.name}: another optimizer, {plan.optimizer['name']}{warmup}"]
    for (source, state, why), n in over.items():
        if state == "step" and why.endswith(" updates"):
            why = "the count of updates"
        lines.append(f"  goes over, for {n} parameter(s): {source} -> {state}, {why}")
    by_reason: Dict[Tuple[str, int], List[str]] = {}
    for (state, why), n in anew.items():
        by_reason.setdefault((why, n), []).append(state)
    for (why, n), states in by_reason.items():
        lines.append(f"  begins anew, for {n} parameter(s): {', '.join(states)}; {why}")
    lines.append(f"  each decision: {plan.folder / CARRIED}")
    return lines
