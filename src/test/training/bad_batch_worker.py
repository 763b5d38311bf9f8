"""
What each rank of the tests of bad batches runs, as a script under torchrun: whole runs of
OLMo-core's trainer on a tiny transformer, all names in one group of processes.

Each run is written down as a :class:`Record`, one JSON file a rank, for the tests to judge.
"""

import dataclasses
import gc
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Mapping, Optional

import torch
from olmo_core.data import DataLoaderBase
from olmo_core.distributed import parallel
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import (
    get_local_tensor,
    get_rank,
    get_world_size,
    init_distributed,
)
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer.config import TransformerDataParallelConfig
from olmo_core.utils import seed_all

from olmo_optim_ext import get_config_class, list_optimizers
from olmo_optim_ext.training import needed_callbacks

VOCAB_SIZE, LENGTH, INSTANCES = 32, 8, 4
STEPS, SAVE_AT = 12, 6
FIELDS: Dict[str, Dict[str, Any]] = {
    # So that the loss falls from step to step, where the default goes back at times.
    "lookahead": {"alpha": 0.95},
    "ranger": {"alpha": 0.95},
    # So that bad batches come with an estimate of the Hessian.
    "sophia": {"hessian_update_interval": 1},
}
"""Fields of some configs."""

PLAIN = (
    *("nadamw", "ext_lion", "adan", "adopt", "ademamix", "lars", "radam", "eva"),
    *("sgd", "adagrad", "rmsprop", "ext_adam"),
)
"""
Rules that the loop of ``ext_adamw`` or ``lamb`` runs; the contracts have bad batches for each.
"""

NAMES = [name for name in list_optimizers() if name not in PLAIN]

BAD_STEPS = {
    2: "one nan gradient",
    4: "nan gradients",
    SAVE_AT: "nan loss",
    7: "spike",
    8: "inf loss",
}
"""
The save comes right after a bad batch, and another one, which only the history tells from a good
one, right after the save.
"""


@dataclass
class Record:
    """What was seen of a run on one rank."""

    metrics: Dict[int, Dict[str, float]] = field(default_factory=dict)
    """What the trainer logged, by step."""

    changed: Dict[int, List[str]] = field(default_factory=dict)
    """Which parameters and state tensors a step changed, bit by bit."""

    not_finite: Dict[int, List[str]] = field(default_factory=dict)
    """Which of them were not finite after a step."""

    history: Dict[int, List[int]] = field(default_factory=dict)
    """How many losses and gradient norms the gate had seen after a step."""

    error: Optional[str] = None
    """With which the trainer ended."""

    end: Dict[str, str] = field(default_factory=dict)
    """All parameters and state tensors after the run, as hex."""


class OneBatch(DataLoaderBase):
    """The same batch at every step."""

    def __init__(self, folder: Path):
        super().__init__(
            work_dir=folder,
            global_batch_size=INSTANCES * LENGTH,
            dp_world_size=get_world_size(),
            dp_rank=get_rank(),
        )

    @property
    def total_batches(self) -> int:
        return STEPS

    def state_dict(self) -> Dict[str, Any]:
        return {"batches_processed": self.batches_processed}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.batches_processed = state_dict["batches_processed"]

    def reshuffle(self, epoch: Optional[int] = None, **kwargs: Any) -> None:
        del kwargs
        self._epoch = epoch

    def get_mock_batch(self) -> Dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCAB_SIZE, (INSTANCES, LENGTH), generator=generator)
        return {"input_ids": tokens.chunk(self.dp_world_size)[self.dp_rank].clone()}

    def _iter_batches(self):
        for _ in range(self.batches_processed, STEPS):
            yield self.get_mock_batch()

    def global_num_tokens_in_batch(self, batch: Dict[str, Any]) -> int:
        del batch
        return self.global_batch_size


def tensors_of(module: TransformerTrainModule) -> Dict[str, torch.Tensor]:
    """The local parts of parameters and state."""
    out = {}
    assert module.optim is not None
    for name, param in module.model.named_parameters():
        out[f"param {name}"] = get_local_tensor(param.detach())
        for key, value in module.optim.state[param].items():
            out[f"{key} {name}"] = get_local_tensor(value)
    return out


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Witness(Callback):
    """Spoils batches, and writes down what each step does."""

    # Right before the optimizer sees the batch, and right after.
    priority: ClassVar[int] = 1000

    bad_steps: Dict[int, str] = field(default_factory=dict)
    record: Record = field(default_factory=Record)
    before: Dict[str, bytes] = field(default_factory=dict)
    kind: str = ""

    @property
    def module(self) -> TransformerTrainModule:
        assert isinstance(self.trainer.train_module, TransformerTrainModule)
        return self.trainer.train_module

    def pre_train(self):
        self.module.model.blocks["0"].register_forward_hook(self.spoil_gradients)
        self.module.model.register_forward_hook(self.spoil_loss)

    def pre_step(self, batch: Dict[str, Any]):
        del batch
        self.kind = self.bad_steps.get(self.step, "")
        self.before = {k: bits(v) for k, v in tensors_of(self.module).items()}

    def on_this_rank(self, kind: str) -> bool:
        return self.kind == kind and get_rank() == get_world_size() - 1

    def spoil_gradients(self, module, args, output):
        del module, args
        if self.on_this_rank("nan gradients"):
            # Of the first block and the embeddings; those of the second block stay finite.
            output.register_hook(lambda grad: grad * math.nan)

    def spoil_loss(self, module, args, output):
        del module, args
        if self.kind == "spike":
            return output._replace(loss=output.loss * 1000, ce_loss=output.ce_loss * 1000)
        if self.on_this_rank("nan loss"):  # which no gradient tells
            return output._replace(ce_loss=output.ce_loss * math.nan)
        if self.on_this_rank("inf loss"):
            return output._replace(loss=output.loss * math.inf, ce_loss=output.ce_loss * math.inf)
        return output

    def pre_optim_step(self):
        if self.on_this_rank("one nan gradient"):  # which no other rank has in its shards
            grad = self.module.model.lm_head.w_out.weight.grad
            assert grad is not None
            get_local_tensor(grad).view(-1)[0] = math.nan

    def post_train_batch(self):
        after = tensors_of(self.module)
        self.record.changed[self.step] = [k for k, v in after.items() if bits(v) != self.before[k]]
        self.record.not_finite[self.step] = [k for k, v in after.items() if not v.isfinite().all()]
        (count,) = [v for k, v in after.items() if k.startswith("gate_count ")]
        self.record.history[self.step] = count.tolist()

    def log_metrics(self, step: int, metrics: Dict[str, float]):
        self.record.metrics.setdefault(step, {}).update(metrics)


def build_trainer(
    folder: Path,
    name: str,
    witness: Witness,
    max_grad_norm: Optional[float],
    skip_step: bool = True,
    outlives: bool = True,
    save: bool = False,
    further: Optional[Callback] = None,
    **fields: Any,
) -> Trainer:
    """
    :param further: A callback beside those that are needed.
    :param fields: Of the optimizer's config.
    """
    seed_all(0)
    model = TransformerConfig.llama_like(
        d_model=16,
        vocab_size=VOCAB_SIZE,
        n_layers=2,
        n_heads=2,
        hidden_size_multiple_of=16,
        attn_backend=AttentionBackendName.torch,
    ).build(init_device="meta")
    distributed = get_world_size() > 1
    parallel._WORLD_MESH = None  # OLMo-core expects one train module a process
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH * INSTANCES // get_world_size(),
        max_sequence_length=LENGTH,
        optim=get_config_class(name)(
            **{"rolling_interval_length": 8, **FIELDS.get(name, {}), **fields}, skip_step=skip_step
        ),
        max_grad_norm=max_grad_norm,
        dp_config=TransformerDataParallelConfig(name=DataParallelType.fsdp)
        if distributed
        else None,
    ).build(model, torch.device("cpu"))
    assert isinstance(module, TransformerTrainModule)
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
    if further is not None:
        callbacks["further"] = further
    needed = needed_callbacks(module.optim)
    if not outlives:
        del needed["bad_batches"]
    return TrainerConfig(
        save_folder=str(folder),
        device="cpu",
        max_duration=Duration.steps(STEPS),
        load_strategy=LoadStrategy.never,
        callbacks={**callbacks, **needed},
        # Else ranks may learn of an error at different steps, and one waits for the other.
        async_bookkeeping=False,
    ).build(module, OneBatch(folder))


def run(
    folder: Path,
    name: str,
    max_grad_norm: Optional[float] = 1.0,
    bad_steps: Mapping[int, str] = BAD_STEPS,
    resume_from: Optional[Path] = None,
    **options: Any,
) -> Record:
    witness = Witness(bad_steps=dict(bad_steps))
    trainer = build_trainer(folder, name, witness, max_grad_norm, **options)
    module = trainer.train_module
    assert isinstance(module, TransformerTrainModule)
    try:
        if resume_from is not None:
            trainer.load_checkpoint(resume_from, load_trainer_state=True, load_optim_state=True)
        trainer.fit()
    except (RuntimeError, FileNotFoundError) as error:  # no checkpoint: the run before has failed
        witness.record.error = str(error)
    witness.record.end = {k: bits(v).hex() for k, v in tensors_of(module).items()}
    return witness.record


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage often, and the modules are most of what it looks at
    logging.disable(logging.CRITICAL)
    if int(os.environ["WORLD_SIZE"]) > 1:
        init_distributed(backend="gloo")
    records: Dict[str, Record] = {}
    for name in NAMES:
        here = folder / name
        saved = here / f"step{SAVE_AT}"
        records[f"{name} clipped"] = run(here, name, save=True)
        records[f"{name} unclipped"] = run(here, name, max_grad_norm=None)
        records[f"{name} resumed"] = run(here, name, resume_from=saved)
        ungated = {4: "nan gradients"}
        records[f"{name} ungated"] = run(here, name, bad_steps=ungated, skip_step=False)

    name = NAMES[0]
    here = folder / name
    saved = here / f"step{SAVE_AT}"
    at_nan: Dict[str, Any] = dict(bad_steps={SAVE_AT + 1: "nan loss"}, resume_from=saved)
    records["resumed at nan"] = run(here, name, **at_nan)
    records["without the callback"] = run(here, name, outlives=False, **at_nan)
    records["not skipped"] = run(here, name, skip_step=False, **at_nan)
    records["nan at once"] = run(here, name, bad_steps={1: "nan loss"})

    (folder / f"rank{get_rank()}.json").write_text(
        json.dumps({key: dataclasses.asdict(record) for key, record in records.items()})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
