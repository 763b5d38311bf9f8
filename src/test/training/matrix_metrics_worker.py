"""
What each rank of the tests of matrix metrics runs, as a script under torchrun: whole runs of
OLMo-core's trainer on a tiny transformer, and steps on models without a forward pass.

Beside what was recorded, a rank writes down what it should have been: from momentum, gradients and
weights, all whole, by an SVD.
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
from types import SimpleNamespace
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from olmo_core.distributed import parallel
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import (
    get_full_tensor,
    get_local_tensor,
    get_rank,
    get_world_size,
    init_distributed,
)
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import OptimConfig
from olmo_core.train import Duration, LoadStrategy, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer.config import TransformerDataParallelConfig
from olmo_core.utils import seed_all
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from olmo_optim_ext import AlphaAnnealing, DionConfig, MuonConfig, MuonOrthoNoiseConfig
from olmo_optim_ext.engine.roles import RowBlocks, classify, layout_of
from olmo_optim_ext.training import MatrixMetricsCallback

from ..optim.models import ExpertShapes
from .bad_batch_worker import INSTANCES, LENGTH, VOCAB_SIZE, OneBatch, bits, tensors_of

STEPS, INTERVAL, BAD_STEP = 9, 3, 6
NOISE = dict(rank_threshold=None, start_step=1, alpha=0.1, annealing=AlphaAnnealing.none)
CONFIGS: Dict[str, OptimConfig] = {
    "muon": MuonConfig(),
    "muon_fused": MuonConfig(row_blocks=RowBlocks.heads),
    "muon_on_all": MuonConfig(share_replicas=False),
    "noise": MuonOrthoNoiseConfig(**NOISE),  # type: ignore[arg-type]
    "dion": DionConfig(),
}

Numbers = Dict[str, float]


@dataclass
class Record:
    """What was seen of a run on one rank."""

    metrics: Dict[int, Numbers] = field(default_factory=dict)
    """What the trainer logged, by step."""

    expected: Dict[int, Dict[str, List[Numbers]]] = field(default_factory=dict)
    """By step and parameter, of each matrix."""

    end: Dict[str, str] = field(default_factory=dict)
    """All parameters and state tensors after the run, as hex."""


def whole(x: Optional[torch.Tensor]) -> torch.Tensor:
    assert x is not None
    return get_full_tensor(x.detach()).double().clone()


def expect(optim: Any, name: str, shape: Any, *matrices: torch.Tensor) -> Numbers:
    """
    The measures of a matrix.

    :param shape: ``(out, in)``.
    :param matrices: Weight, gradient and momentum before the step, weight and momentum after it.
    """
    group = optim.param_groups[0]
    mu, lr, decay = group["momentum"], group["lr"], group["lr"] * group["weight_decay"]
    weight, grad, old, new_weight, momentum = matrices
    if name == "dion":
        u, scale = old + grad, math.sqrt(shape[0] / shape[1])
    else:
        u = grad + mu * momentum if name == "noise" else (1 - mu) * grad + mu * momentum
        scale = 0.2 * math.sqrt(max(shape))
    update = ((1 - decay) * weight - new_weight) / lr
    values = torch.linalg.svdvals(u)
    share = values / values.sum()
    squares = torch.linalg.svdvals(update / scale).square()
    out = {
        "short": float(min(shape)),
        "effective rank": share.pow(-share).prod().item(),
        "stable rank": (values.square().sum() / values[0] ** 2).item(),
        "orthogonality error": (squares - 1).square().mean().sqrt().item(),
        "update RMS": update.square().mean().sqrt().item(),
    }
    if name == "noise":
        out["noise scale"] = 0.1 * grad.norm().item()
    return out


@dataclass
class Witness(Callback):
    """Sees to the bad step, and writes everything down."""

    priority: ClassVar[int] = 200

    name: str = ""
    record: Record = field(default_factory=Record)
    before: Dict[str, List[torch.Tensor]] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        return self.trainer.train_module

    def matrices(self) -> Dict[str, Tuple[nn.Parameter, Any]]:
        blocks = CONFIGS[self.name].row_blocks if self.name in CONFIGS else RowBlocks.whole  # type: ignore[attr-defined]
        found = {}
        params = {key.removeprefix("module."): p for key, p in self.module.model.named_parameters()}
        for name, row in classify(self.module.model).items():
            if row.role in ("matrix", "experts"):
                found[name] = (params[name], layout_of(row, blocks))
        return found

    def pre_optim_step(self):
        if self.step == BAD_STEP:
            param, _ = next(iter(self.matrices().values()))
            assert param.grad is not None
            get_local_tensor(param.grad).view(-1)[0] = math.nan
        elif self.step % INTERVAL == 0:
            state = self.module.optim.state
            self.before = {
                key: [whole(param), whole(param.grad), whole(state[param]["momentum"])]
                for key, (param, _) in self.matrices().items()
            }

    def post_train_batch(self):
        optim = self.module.optim
        for key, before in self.before.items():
            param, layout = self.matrices()[key]
            seen = [*before, whole(param), whole(optim.state[param]["momentum"])]
            its = self.record.expected.setdefault(self.step, {}).setdefault(key, [])
            for block in layout.blocks():
                rows = slice(block.first_row, block.first_row + block.n_rows)
                cols = slice(block.first_col, block.first_col + block.n_cols)
                shape = (block.n_rows, block.n_cols)[:: -1 if layout.in_out else 1]
                matrices = [x.view(layout.rows, layout.cols)[rows, cols] for x in seen]
                its.append(expect(optim, self.name, shape, *matrices))
        self.before = {}

    def log_metrics(self, step: int, metrics: Dict[str, float]):
        self.record.metrics.setdefault(step, {}).update(metrics)


def fit(
    folder: Path,
    name: str,
    parallelism: Optional[DataParallelType] = None,
    metrics: Optional[MatrixMetricsCallback] = None,
) -> Record:
    """A whole run of the trainer."""
    seed_all(0)
    model = TransformerConfig.llama_like(
        d_model=16,
        vocab_size=VOCAB_SIZE,
        n_layers=2,
        n_heads=2,
        hidden_size_multiple_of=16,
        attn_backend=AttentionBackendName.torch,
    ).build(init_device="meta")
    parallel._WORLD_MESH = None  # OLMo-core expects one train module a process
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH * INSTANCES // 2,
        max_sequence_length=LENGTH,
        optim=CONFIGS[name],
        max_grad_norm=None,
        dp_config=TransformerDataParallelConfig(name=parallelism) if parallelism else None,
    ).build(model, torch.device("cpu"))
    assert isinstance(module, TransformerTrainModule)
    witness = Witness(name=name)
    callbacks: Dict[str, Callback] = {
        "witness": witness,
        "checkpointer": CheckpointerCallback(enabled=False),
    }
    if metrics is not None:
        callbacks["matrix_metrics"] = metrics
    TrainerConfig(
        save_folder=str(folder),
        device="cpu",
        max_duration=Duration.steps(STEPS),
        load_strategy=LoadStrategy.never,
        callbacks=callbacks,
        async_bookkeeping=False,
    ).build(module, OneBatch(folder)).fit()
    witness.record.end = {k: bits(v).hex() for k, v in tensors_of(module).items()}
    return witness.record


def step_once(
    model: nn.Module, config: OptimConfig, gradients: Mapping[str, torch.Tensor]
) -> Record:
    """One step with a report, without a trainer."""
    if get_world_size() > 1:
        mesh = init_device_mesh("cpu", (get_world_size(),))
        fully_shard(model, mesh=mesh)
    optim = config.build(model)
    recorded: Numbers = {}
    trainer = SimpleNamespace(
        train_module=SimpleNamespace(optim=optim, model=model),
        global_step=INTERVAL,
        record_metric=lambda name, value: recorded.update({name: value}),
    )
    witness, callback = Witness(), MatrixMetricsCallback(interval=INTERVAL)
    for each in (witness, callback):
        each.trainer = trainer  # type: ignore[assignment]
    for name, param in model.named_parameters():
        param.grad = gradients[name]
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(gradients[name], param.device_mesh, param.placements)
    callback.post_attach()
    witness.pre_optim_step()
    callback.pre_optim_step()
    optim.step()
    witness.post_train_batch()
    callback.post_train_batch()
    witness.record.metrics[INTERVAL] = recorded
    return witness.record


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage often, and the modules are most of what it looks at
    logging.disable(logging.CRITICAL)
    kinds: List[Optional[DataParallelType]] = [None]
    if int(os.environ["WORLD_SIZE"]) > 1:
        init_distributed(backend="gloo")
        kinds = [DataParallelType.fsdp, DataParallelType.ddp]
    records: Dict[str, Record] = {}
    for kind in kinds:
        for name in CONFIGS:
            if name == "muon_on_all" and kind != DataParallelType.ddp:
                continue
            key = f"{name} {kind}"
            records[key] = fit(folder, name, kind, MatrixMetricsCallback(interval=INTERVAL))
            if name in ("muon", "noise"):
                records[f"{key} without"] = fit(folder, name, kind)
    coarse = MatrixMetricsCallback(interval=INTERVAL, per_layer=False)
    records["per role"] = fit(folder, "muon", kinds[0], coarse)

    generator = torch.Generator().manual_seed(0)
    for key, model in {
        "experts": ExpertShapes(),
        "one matrix": nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)),
    }.items():
        gradients = {
            name: torch.randn(param.shape, generator=generator)
            for name, param in model.named_parameters()
        }
        records[key] = step_once(model, MuonConfig(), gradients)

    (folder / f"rank{get_rank()}.json").write_text(
        json.dumps({key: dataclasses.asdict(record) for key, record in records.items()})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
