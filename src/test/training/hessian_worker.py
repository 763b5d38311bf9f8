"""
What each rank of the tests of Hessian estimates runs, as a script under torchrun: single estimates
and whole runs of OLMo-core's trainer on a tiny transformer.
"""

import dataclasses
import gc
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from olmo_core.config import DType
from olmo_core.distributed import parallel
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import get_rank, get_world_size, init_distributed
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.moe.moe import MoEBase
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.train import Duration, LoadStrategy, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.common import StepSkipRange
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer.config import (
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
)
from olmo_core.utils import seed_all
from torch.distributed.tensor import DTensor

from olmo_optim_ext import Sophia, SophiaConfig
from olmo_optim_ext.training import SophiaCallback
from olmo_optim_ext.training.hessian import estimate_hessian

from .bad_batch_worker import INSTANCES, LENGTH, OneBatch, bits, tensors_of

VOCAB_SIZE = 32
STEPS, INTERVAL, SAVE_AT = 10, 3, 5
BETA2 = 0.5
STEP = 7
"""Of single estimates."""

MESHES = ("fsdp", "ddp", "tp")


def build_module(
    mesh: Optional[str] = None,
    moe: bool = False,
    microbatch: int = INSTANCES,
    autocast: Optional[DType] = None,
    z_loss: Optional[float] = None,
    **fields: Any,
) -> TransformerTrainModule:
    """
    :param mesh: What two ranks share the model with.
    :param microbatch: In instances.
    :param fields: Of the optimizer's config.
    """
    seed_all(0)
    parallel._WORLD_MESH = None  # OLMo-core expects one train module a process
    make = TransformerConfig.llama_like_moe if moe else TransformerConfig.llama_like
    sizes: Dict[str, Any] = dict(d_model=16, vocab_size=VOCAB_SIZE, n_layers=2, n_heads=2)
    if moe:
        sizes.update(num_experts=4, top_k=2, expert_hidden_size=16, lb_loss_weight=10.0)
    else:
        sizes.update(hidden_size_multiple_of=16)
    model = make(**sizes, attn_backend=AttentionBackendName.torch).build(init_device="meta")
    data = {"fsdp": DataParallelType.fsdp, "ddp": DataParallelType.ddp, "tp": DataParallelType.fsdp}
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=microbatch * LENGTH,
        max_sequence_length=LENGTH,
        optim=SophiaConfig(**{"betas": (0.9, BETA2), "hessian_batch_fraction": 1.0, **fields}),
        dp_config=TransformerDataParallelConfig(name=data[mesh]) if mesh else None,
        tp_config=TransformerTensorParallelConfig(degree=2) if mesh == "tp" else None,
        autocast_precision=autocast,
        z_loss_multiplier=z_loss,
        max_grad_norm=1.0,
    ).build(model, torch.device("cpu"))
    assert isinstance(module, TransformerTrainModule)
    if moe:
        for layer in module.model.modules():
            if isinstance(layer, MoEBase):
                layer.experts.forward = _in_place_of_experts  # type: ignore
    return module


def _in_place_of_experts(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Experts need a GPU. What they make follows from how the router weighs them."""
    del indices, sizes
    return x * weights.view(*x.shape[:-1], -1).square().sum(-1, keepdim=True)


def optim_of(module: TransformerTrainModule) -> Sophia:
    assert isinstance(module.optim, Sophia)
    return module.optim


def tokens(instances: int = INSTANCES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCAB_SIZE, (instances, LENGTH), generator=generator)


def estimate(
    module: TransformerTrainModule, batch: Optional[Dict[str, Any]] = None, step: int = STEP
) -> Dict[str, torch.Tensor]:
    """One estimate, whole, by parameter."""
    optim = optim_of(module)
    if batch is None:
        group = module.dp_process_group
        batch = {"input_ids": tokens()[get_rank(group) :: get_world_size(group)]}
    for state in optim.state.values():
        state["hessian"].zero_()
    estimate_hessian(module, optim, batch, step)
    out = {}
    for param, state in optim.state.items():
        average = state["hessian"]
        whole = average.full_tensor() if isinstance(average, DTensor) else average
        out[optim.name_of(param)] = whole.clone() / (1 - BETA2)
    return out


@dataclass
class Run:
    """What was seen of a run of the trainer on one rank."""

    metrics: Dict[int, Dict[str, float]] = field(default_factory=dict)
    """What the trainer logged, by step."""

    updates: List[int] = field(default_factory=list)
    """How many estimates were given, after each step."""

    error: Optional[str] = None

    end: Dict[str, str] = field(default_factory=dict)
    """All parameters and state tensors after the run, as hex."""


@dataclass
class Witness(Callback):
    run: Run = field(default_factory=Run)

    def post_train_batch(self):
        module = self.trainer.train_module
        assert isinstance(module, TransformerTrainModule)
        self.run.updates.append(optim_of(module).hessian_updates)

    def log_metrics(self, step: int, metrics: Dict[str, float]):
        self.run.metrics.setdefault(step, {}).update(metrics)


@dataclass
class SpoilEstimate(Callback):
    """Makes the loss of every pass of a step not finite."""

    at: int = 1

    def pre_train(self):
        module = self.trainer.train_module
        assert isinstance(module, TransformerTrainModule)

        def spoil(_: Any, args: Any, output: Any) -> Any:
            factor = float("nan") if self.step == self.at else 1.0
            return output._replace(loss=output.loss * factor)

        module.model.register_forward_hook(spoil)


def fit(
    folder: Path,
    mesh: Optional[str] = None,
    driven: bool = True,
    resume_from: Optional[Path] = None,
    spoil_at: Optional[int] = None,
    skip: Optional[int] = None,
    save: bool = False,
    **options: Any,
) -> Run:
    witness = Witness()
    callbacks: Dict[str, Callback] = {
        "witness": witness,
        "checkpointer": CheckpointerCallback(
            enabled=save,
            save_interval=10 * STEPS,
            fixed_steps=[SAVE_AT],
            pre_train_checkpoint=False,
            save_async=False,
        ),
    }
    if driven:
        callbacks["sophia"] = SophiaCallback()
    if spoil_at is not None:
        callbacks["spoil"] = SpoilEstimate(at=spoil_at)
    options = {"hessian_update_interval": INTERVAL, "lr": 1e-2, "rho": 1.0, **options}
    module = build_module(mesh, microbatch=INSTANCES // 2, **options)
    trainer = TrainerConfig(
        save_folder=str(folder),
        device="cpu",
        max_duration=Duration.steps(STEPS),
        load_strategy=LoadStrategy.never,
        callbacks=callbacks,
        steps_to_skip=None if skip is None else [StepSkipRange(skip, skip + 1)],
        # Else ranks may learn of an error at different steps, and one waits for the other.
        async_bookkeeping=False,
    ).build(module, OneBatch(folder))
    try:
        if resume_from is not None:
            trainer.load_checkpoint(resume_from, load_trainer_state=True, load_optim_state=True)
        trainer.fit()
    except Exception as error:
        witness.run.error = str(error)
    witness.run.end = {k: bits(v).hex() for k, v in tensors_of(module).items()}
    return witness.run


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage often
    logging.disable(logging.CRITICAL)
    init_distributed(backend="gloo")
    for mesh in MESHES:
        for kind in ("gauss_newton_bartlett", "hutchinson"):
            whole = estimate(build_module(mesh, estimator=kind))
            if get_rank() == 0:
                torch.save(whole, folder / f"{mesh}-{kind}.pt")
    runs = {
        "whole": fit(folder, "fsdp", save=True),
        "resumed": fit(folder, "fsdp", resume_from=folder / f"step{SAVE_AT}"),
    }
    plain = {name: dataclasses.asdict(run) for name, run in runs.items()}
    (folder / f"rank{get_rank()}.json").write_text(json.dumps(plain))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
