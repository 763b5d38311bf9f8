"""
What each rank of the tests of a long run does, as a script under torchrun: a third of it on some
mesh, from a checkpoint and to one.
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from olmo_core.distributed.checkpoint import (
    load_model_and_optim_state,
    save_model_and_optim_state,
)

from .case import STEPS, MixedShapes
from .mesh_worker import meshes, places, save, train, whole_weights
from .reshard_test import CONFIGS, WAYS


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # each load of a checkpoint collects garbage
    dist.init_process_group("gloo")
    for name, config in CONFIGS.items():
        for way, labels in WAYS.items():
            for third, label in enumerate(labels):
                if not label.startswith(("fsdp", "hsdp")) or label not in meshes(MixedShapes):
                    continue
                shard = meshes(MixedShapes)[label]
                model, at = shard(MixedShapes(seed=third)), places(MixedShapes, shard)
                optim = config.build(model)
                if third:
                    where = folder / f"{name}-{way}-{third}"
                    load_model_and_optim_state(where, model, optim, flatten_optimizer_state=True)
                train(model, optim, MixedShapes(0), at, third * STEPS, (third + 1) * STEPS)
                where = folder / f"{name}-{way}-{third + 1}"
                save_model_and_optim_state(where, model, optim, flatten_optimizer_state=True)
                save(where.with_suffix(".pt"), whole_weights(model, at))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
