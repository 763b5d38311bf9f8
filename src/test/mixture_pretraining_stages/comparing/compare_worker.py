"""
``olmo-optim compare`` with the arguments given, where runs are forks of this process: as a script,
so that what is expensive to import is imported once.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any, Tuple

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
from rich.console import Console

from mixture_pretraining_stages import launch
from mixture_pretraining_stages.comparing import workers
from mixture_pretraining_stages.comparing.comparison import RunPlan
from mixture_pretraining_stages.reading import load_spec
from olmo_optim_ext import cli


def train(
    self: workers.Crew, run: RunPlan, spec: Path, log: Path, place: Any, observe: Any
) -> Tuple[int, None]:
    child = os.fork()
    if child == 0:
        with open(log, "w") as file:
            code = launch.run(load_spec(spec), Console(file=file), "olmo-optim")
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for step, loss in workers.Metrics(run).read():
        observe(step, loss)
    return code, None


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # OLMo-core collects garbage at every turn
    workers.Crew._train = train  # type: ignore[method-assign]
    workers.REFRESH = 0.2
    sys.exit(cli.main())
