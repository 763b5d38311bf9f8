"""
What each rank of the tests of further passes and of range tests runs, as a script under torchrun.
"""

import gc
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Dict

import torch
from olmo_core.distributed.utils import get_rank, init_distributed
from olmo_core.train.callbacks import Callback

from olmo_optim_ext.training import LRFinderCallback

from .bad_batch_worker import Witness, bits, build_trainer, run, tensors_of

MARS_FORMS: Dict[str, Dict[str, Any]] = {
    "exact": {"exact": True},
    "approximate": {"first_step": "current"},
}
"""The same rule, as the same batch comes at every step: its gradient at the last weights is the
last gradient."""

WITH_PASSES: Dict[str, Dict[str, Any]] = {
    "mars": {"exact": True, "lr": 0.03, "gamma": 0.5},
    "sophia": {"hessian_update_interval": 2, "lr": 0.03},
    "sophia hutchinson": {
        "hessian_update_interval": 2,
        "lr": 0.03,
        "estimator": "hutchinson",
        "hutchinson_epsilon": 0.1,
    },
    "sam": {"rho": 0.5, "lr": 0.03},
}
"""Optimizers with further passes over a batch, and fields with which these matter."""


@dataclass
class Looks(Callback):
    """A forward pass without a backward one before each step, as an evaluation has."""

    priority: ClassVar[int] = 500

    def pre_step(self, batch: Dict[str, Any]):
        module: Any = self.trainer.train_module
        module.eval_batch({"input_ids": batch["input_ids"].clone()})


def weights(folder: Path, name: str, **options: Any) -> Dict[str, str]:
    record = run(folder / "run", name, bad_steps={}, **options)
    assert record.error is None, record.error
    return {key: value for key, value in record.end.items() if key.startswith("param ")}


RANGE_TESTS = ("ext_muon", "soap", "sophia")
"""Optimizers of range tests: with owners, with factors on them, with further passes."""


def range_test(folder: Path, name: str) -> Dict[str, Any]:
    """What there was before a range test and after it, and its losses."""
    finder = LRFinderCallback(high=1e5, steps=12)
    trainer = build_trainer(folder, name, Witness(), max_grad_norm=1.0, further=finder)
    module: Any = trainer.train_module
    before = {key: bits(value).hex() for key, value in tensors_of(module).items()}
    trainer.fit()
    after = {key: bits(value).hex() for key, value in tensors_of(module).items()}
    return {"before": before, "after": after, "losses": finder.losses}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage often
    logging.disable(logging.CRITICAL)
    init_distributed(backend="gloo")
    found: Dict[str, Any] = {
        form: weights(folder, "mars", lr=0.03, gamma=0.5, **fields)
        for form, fields in MARS_FORMS.items()
    }
    for name, fields in WITH_PASSES.items():
        optimizer = name.split()[0]
        found[name] = weights(folder, optimizer, **fields)
        found[f"{name}, looked at"] = weights(folder, optimizer, further=Looks(), **fields)
    for name in RANGE_TESTS:
        found[f"range test of {name}"] = range_test(folder / "range", name)
    (folder / f"rank{get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo's may abort the interpreter's own shutdown
