"""
What each rank of the tests of exact MARS runs, as a script under torchrun. As the same batch comes
at every step, its gradient at the last weights is the last gradient.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Dict

import torch
from olmo_core.distributed.utils import get_rank, init_distributed

from .bad_batch_worker import run

FORMS: Dict[str, Dict[str, Any]] = {
    "exact": {"exact": True},
    "approximate": {"first_step": "current"},
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    init_distributed(backend="gloo")
    found: Dict[str, Dict[str, str]] = {}
    for name, fields in FORMS.items():
        record = run(folder / name, "mars", bad_steps={}, lr=0.03, gamma=0.5, **fields)
        assert record.error is None, record.error
        found[name] = {k: v for k, v in record.end.items() if k.startswith("param ")}
    (folder / f"rank{get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
