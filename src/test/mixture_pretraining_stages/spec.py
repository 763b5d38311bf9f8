"""
A tiny experiment on text made here, for tests.
"""

import random
from pathlib import Path
from typing import Any, Dict

from omegaconf import OmegaConf

_WORDS = "the a weight of gradient matrix step loss rank norm moves shrinks grows is was".split()


def write_text(path: Path, seed: int, documents: int = 60) -> Path:
    """A folder of ``.txt`` files."""
    words = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        text = " ".join(words.choices(_WORDS, k=80))
        (path / f"{index:03d}.txt").write_text(text)
    return path


def tiny_spec(folder: Path, **changes: Any) -> Dict[str, Any]:
    """The spec as plain data; its texts are below ``folder``."""
    spec: Dict[str, Any] = {
        "name": "tiny",
        "model": {"factory": "llama_like", "d_model": 16, "n_layers": 1, "n_heads": 2},
        "sequence_length": 32,
        "global_batch_size": 256,
        "rank_microbatch_size": 128,
        "optimizer": {"name": "muon", "lr": 0.01},
        "scheduler": {"type": "wsd", "warmup": 2, "decay_fraction": 0.2},
        "sources": {
            "first": {"path": str(write_text(folder / "first", 1))},
            "second": {"path": str(write_text(folder / "second", 2))},
        },
        "stages": [
            {"name": "one", "tokens": 256 * 12, "mixture": {"first": 3, "second": 1}},
            {"name": "two", "tokens": 256 * 6, "mixture": {"second": 1}, "lr_scale": 0.5},
        ],
        "evaluation": {"every": 4, "tokens": 512},
        "checkpoint": {"every": 3, "keep": 2},
        "cache": str(folder / "cache"),
        "output": str(folder / "run"),
    }
    return {**spec, **changes}


def write_spec(path: Path, spec: Dict[str, Any]) -> Path:
    """Write a spec as YAML."""
    OmegaConf.save(OmegaConf.create(spec), path)
    return path
