"""
What each rank of the tests of wrappers runs, as a script under torchrun: runs of OLMo-core's
trainer on a tiny transformer, and the same steps in a loop written by hand.
"""

import gc
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional

import torch
import torch.nn.functional as F
from olmo_core.distributed import parallel
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import get_local_tensor, get_rank, get_world_size, init_distributed
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import CosWithWarmup, Scheduler
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback, EvaluatorCallback
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer.config import TransformerDataParallelConfig
from olmo_core.utils import seed_all
from torch.distributed.tensor import DTensor

from olmo_optim_ext import SAM, AdamWConfig, SAMConfig, ScheduleFree, ScheduleFreeConfig
from olmo_optim_ext.config import ExtOptimConfig
from olmo_optim_ext.training import (
    AveragingCallback,
    SAMCallback,
    export_averaged,
    needed_callbacks,
)

from .bad_batch_worker import INSTANCES, LENGTH, VOCAB_SIZE, OneBatch, bits, tensors_of

STEPS, SAVE_AT, EVAL_EVERY = 8, 4, 2
RHO = 0.5


def model_config() -> TransformerConfig:
    return TransformerConfig.llama_like(
        d_model=16,
        vocab_size=VOCAB_SIZE,
        n_layers=2,
        n_heads=2,
        hidden_size_multiple_of=16,
        attn_backend=AttentionBackendName.torch,
    )


def build(
    folder: Path,
    optim: ExtOptimConfig,
    callbacks: Dict[str, Callback],
    save: bool = False,
    scheduler: Optional[Scheduler] = None,
) -> Trainer:
    seed_all(0)
    parallel._WORLD_MESH = None  # OLMo-core expects one train module a process
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH,  # gradients of several micro-batches
        max_sequence_length=LENGTH,
        optim=optim,
        max_grad_norm=1.0,
        scheduler=scheduler,
        dp_config=TransformerDataParallelConfig(name=DataParallelType.fsdp)
        if get_world_size() > 1
        else None,
    ).build(model_config().build(init_device="meta"), torch.device("cpu"))
    checkpointer = CheckpointerCallback(
        enabled=save,
        save_interval=10 * STEPS,
        fixed_steps=[SAVE_AT],
        pre_train_checkpoint=False,
        save_async=False,
    )
    return TrainerConfig(
        save_folder=str(folder),
        device="cpu",
        max_duration=Duration.steps(STEPS),
        load_strategy=LoadStrategy.never,
        callbacks={"checkpointer": checkpointer, **callbacks},
        async_bookkeeping=False,
    ).build(module, OneBatch(folder))


def module_of(trainer: Trainer) -> TransformerTrainModule:
    assert isinstance(trainer.train_module, TransformerTrainModule)
    return trainer.train_module


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(trainer: Trainer) -> Dict[str, str]:
    return {k: bits(v).hex() for k, v in tensors_of(module_of(trainer)).items()}


def params_of(trainer: Trainer) -> Dict[str, torch.Tensor]:
    named = module_of(trainer).model.named_parameters()
    return {name: get_local_tensor(param.detach()).clone() for name, param in named}


@dataclass
class SeesGradients(Callback):
    """Notes the gradients of each step, and whether weights are what they were before it."""

    priority: ClassVar[int] = -2000  # after the second pass

    grads: List[Dict[str, torch.Tensor]] = field(default_factory=list)
    losses: List[float] = field(default_factory=list)
    gated: List[float] = field(default_factory=list)
    """The losses that the gate sees."""
    restored: List[bool] = field(default_factory=list)
    before: Dict[str, torch.Tensor] = field(default_factory=dict)

    def pre_step(self, batch: Dict[str, Any]):
        self.before = params_of(self.trainer)

    def pre_optim_step(self):
        module, after = module_of(self.trainer), params_of(self.trainer)
        assert isinstance(module.optim, SAM) and module.optim.latest_loss is not None
        self.gated.append(float(module.optim.latest_loss))
        self.restored.append(all(torch.equal(after[k], v) for k, v in self.before.items()))
        named = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
        self.grads.append({name: whole(grad) for name, grad in named.items()})

    def log_metrics(self, step: int, metrics: Dict[str, float]):
        if "train/CE loss" in metrics:
            self.losses.append(metrics["train/CE loss"])


@dataclass
class ChangesBatch(Callback):
    """Replaces the tokens, as a schedule of sequence lengths does."""

    def pre_step(self, batch: Dict[str, Any]):
        batch["input_ids"] = VOCAB_SIZE - 1 - batch["input_ids"]


def by_hand(
    start: Dict[str, torch.Tensor], interval: int, adaptive: bool, changed: bool
) -> Dict[str, Any]:
    """The same on one rank, over the whole batch at once, with torch's AdamW."""
    model = model_config().build(init_device="cpu")
    model.load_state_dict(start)
    optim = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (INSTANCES, LENGTH), generator=generator)
    if changed:
        tokens = VOCAB_SIZE - 1 - tokens

    def loss() -> torch.Tensor:
        logits = model(tokens)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCAB_SIZE), tokens[:, 1:].reshape(-1))

    grads, losses = [], []
    for step in range(STEPS):
        first = loss()
        losses.append(float(first.detach()))
        optim.zero_grad()
        first.backward()
        if step % interval == 0:
            with torch.no_grad():
                params = list(model.parameters())
                scales = [p.abs() if adaptive else torch.ones_like(p) for p in params]
                scaled = [s * p.grad for s, p in zip(scales, params) if p.grad is not None]
                norm = math.sqrt(sum(float(g.square().sum()) for g in scaled))
                held = [p.clone() for p in params]
                for p, s, g in zip(params, scales, scaled):
                    p.add_(RHO * s * g / norm)
            optim.zero_grad()
            loss().backward()
            with torch.no_grad():
                for p, at in zip(params, held):
                    p.copy_(at)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
    return {"grads": grads, "losses": losses}


def error(got: List[Dict[str, torch.Tensor]], want: List[Dict[str, torch.Tensor]]) -> float:
    return max(
        float((g[name] - w[name]).norm() / w[name].norm()) for g, w in zip(got, want) for name in w
    )


def sam(folder: Path, interval: int, adaptive: bool, changed: bool = False) -> Dict[str, Any]:
    config = SAMConfig(rho=RHO, lr=0.01, weight_decay=0.1, interval=interval, adaptive=adaptive)
    seen = SeesGradients()
    callbacks: Dict[str, Callback] = {"changes": ChangesBatch()} if changed else {}
    trainer = build(folder, config, {**callbacks, "seen": seen})
    for name, callback in needed_callbacks(module_of(trainer).optim).items():
        trainer.add_callback(name, callback)
    named = module_of(trainer).model.named_parameters()
    start = {name: whole(param) for name, param in named}
    trainer.fit()
    want, plain = (by_hand(start, every, adaptive, changed) for every in (interval, STEPS))
    return {
        "steps": len(seen.grads),
        "restored": all(seen.restored),
        "error": error(seen.grads, want["grads"]),
        "error of plain": error(seen.grads, plain["grads"]),
        "losses": seen.losses,
        "gated losses": seen.gated,
        "expected losses": want["losses"],
    }


def sam_is_plain(folder: Path) -> bool:
    """With rho = 0 the run is bitwise that of the optimizer inside."""
    ends = []
    fields: Dict[str, Any] = dict(lr=0.01, weight_decay=0.1)
    runs: List[Any] = [
        (SAMConfig(rho=0.0, **fields), {"sam": SAMCallback()}),
        (AdamWConfig(**fields), {}),
    ]
    for config, callbacks in runs:
        trainer = build(folder, config, callbacks)
        trainer.fit()
        ends.append(local(trainer))
    return ends[0] == ends[1]


@dataclass
class Evaluates(EvaluatorCallback):
    """Notes the weights that an evaluation sees; may end like a run that is killed."""

    seen: Dict[int, Dict[str, torch.Tensor]] = field(default_factory=dict)
    dies_at: int = -1

    def perform_eval(self, prefix: str = "eval"):
        module = module_of(self.trainer)
        batch = self.trainer.data_loader.get_mock_batch()
        self.seen[self.step] = params_of(self.trainer)
        with torch.no_grad():  # which leaves whole parameters in FSDP's hands
            module.eval_batch(batch, labels=batch["input_ids"])
        if self.step == self.dies_at:
            raise RuntimeError("killed")


@dataclass
class SeesAverage(Callback):
    """Computes the average after each step."""

    averages: Dict[int, Dict[str, torch.Tensor]] = field(default_factory=dict)

    def post_train_batch(self):
        module = module_of(self.trainer)
        self.averages[self.step] = {}
        assert isinstance(module.optim, ScheduleFree)
        for name, param in module.model.named_parameters():
            y, z = get_local_tensor(param.detach()), module.optim.state[param]["z"]
            self.averages[self.step][name] = y + (1 - 1 / 0.9) * (get_local_tensor(z) - y)


def schedule_free(folder: Path) -> Dict[str, Any]:
    config = ScheduleFreeConfig(lr=0.02, warmup_steps=2)

    def run(evaluate: bool = True, dies_at: int = -1, load: bool = False, save: bool = False):
        callbacks: Dict[str, Callback] = {"averages": SeesAverage()}
        if evaluate:
            callbacks["averaging"] = AveragingCallback()
            callbacks["evaluates"] = Evaluates(eval_interval=EVAL_EVERY, dies_at=dies_at)
        trainer = build(folder, config, callbacks, save=save)
        if load:
            path = folder / f"step{SAVE_AT}"
            trainer.load_checkpoint(path, load_trainer_state=True, load_optim_state=True)
        try:
            trainer.fit()
        except RuntimeError as failure:
            assert "killed" in str(failure)
        return trainer

    whole_run = run(save=True)
    evaluates, averages = whole_run.callbacks["evaluates"], whole_run.callbacks["averages"]
    assert isinstance(evaluates, Evaluates) and isinstance(averages, SeesAverage)
    end = local(whole_run)
    killed = run(dies_at=6)
    module = module_of(whole_run)
    assert isinstance(module.optim, ScheduleFree)
    exported = export_averaged(module.model, module.optim)
    wanted = {}
    for name, param in module.model.named_parameters():
        y, z = whole(param), whole(module.optim.state[param]["z"])
        wanted[name] = y + (1 - 1 / 0.9) * (z - y)
    refused = ""
    try:
        build(folder, config, {"a": AveragingCallback()}, scheduler=CosWithWarmup(warmup=2))
    except OLMoConfigurationError as failure:
        refused = str(failure)
    return {
        "evaluated": sorted(evaluates.seen),
        "sees the average": all(
            torch.equal(weights[name], averages.averages[step][name])
            for step, weights in evaluates.seen.items()
            for name in weights
        ),
        "trains on": local(run(evaluate=False)) == end,
        "resumes": local(run(load=True)) == end,
        "back after an error": params_are(killed, run(evaluate=False, load=False), 6),
        "resumes after an error": local(run(load=True)) == end,
        "same after export": local(whole_run) == end,
        "exported": get_rank() > 0
        or (exported.keys() == wanted.keys())
        and all(torch.allclose(exported[k], wanted[k], atol=1e-7) for k in wanted),
        "refused": refused,
    }


def params_are(killed: Trainer, reference: Trainer, step: int) -> bool:
    """Whether a run that ended within an evaluation has weights whose average is what it saw."""
    averages = reference.callbacks["averages"]
    assert isinstance(averages, SeesAverage)
    module = module_of(killed)
    assert isinstance(module.optim, ScheduleFree) and not module.optim.is_averaged
    for name, param in module.model.named_parameters():
        y, z = get_local_tensor(param.detach()), get_local_tensor(module.optim.state[param]["z"])
        if not torch.equal(y + (1 - 1 / 0.9) * (z - y), averages.averages[step][name]):
            return False
    return True


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage often
    logging.disable(logging.CRITICAL)
    if int(os.environ["WORLD_SIZE"]) > 1:
        init_distributed(backend="gloo")
    found = {
        "sam": sam(folder / "sam", interval=1, adaptive=False),
        "asam": sam(folder / "asam", interval=3, adaptive=True),
        "changed batch": sam(folder / "changed", interval=2, adaptive=False, changed=True),
        "plain": sam_is_plain(folder / "plain"),
        "schedule_free": schedule_free(folder / "free"),
    }
    (folder / f"rank{get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
