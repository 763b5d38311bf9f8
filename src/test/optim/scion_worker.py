"""
What each rank of a test of :mod:`scion_test` runs: the initialisation on every mesh.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from .mesh_worker import meshes, places, whole_weights
from .models import ExpertShapes
from .scion_cases import INITIALIZED, MixedShapes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in (MixedShapes, ExpertShapes):
        for label, shard in meshes(kind).items():
            model, at = shard(kind(0)), places(kind, shard)
            INITIALIZED.initialize_weights(model)
            whole = whole_weights(model, at)
            if dist.get_rank() == 0:
                torch.save(whole, folder / f"{kind.__name__}-{label}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
