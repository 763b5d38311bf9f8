"""
Run folders and comparisons written by hand, with losses that are known.
"""

import json
import math
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import yaml

TOKENS = 256
SOURCES = ("first", "second")
SPEC: Dict[str, Any] = {
    "name": "tiny",
    "sequence_length": 32,
    "global_batch_size": TOKENS,
    "rank_microbatch_size": 128,
    "optimizer": {"name": "muon", "lr": 0.01},
    "sources": {name: {"builtin": "python-code"} for name in SOURCES},
    "stages": [
        {"name": "one", "tokens": TOKENS * 12, "mixture": {"first": 3, "second": 1}},
        {"name": "two", "tokens": TOKENS * 6, "mixture": {"second": 1}},
    ],
}


def curve(final: float, steps: int, start: float = 5.5) -> Dict[int, float]:
    """Losses by step that fall from ``start`` and end at ``final``."""
    return {
        step: final + (start - final) * (math.exp(-6 * step / steps) - math.exp(-6))
        for step in range(1, steps + 1)
    }


def write_run(
    folder: Path,
    final: float = 2.0,
    *,
    steps: int = 18,
    until: Optional[int] = None,
    every: int = 3,
    step_seconds: float = 0.5,
    optimizer_seconds: float = 0.1,
    extra: Optional[Mapping[str, float]] = None,
    losses: Optional[Mapping[int, float]] = None,
    facts: bool = True,
    **spec: Any,
) -> Path:
    """
    A run of :data:`SPEC`, whose sources end at ``final -+ 0.1``.

    :param until: The step after which it was killed.
    :param losses: In place of a curve.
    :param extra: Metrics of each step that is evaluated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SPEC, "output": str(folder), "seed": 0, **spec}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    losses = losses or curve(final, steps)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, (until or steps) + 1):
            stage = "one" if step <= steps * 2 / 3 else "two"
            row: Dict[str, Any] = {"step": step, "stage": stage, "tokens": TOKENS * step}
            row["train/CE loss"] = losses[step] + 0.02 * math.sin(step)
            row["timing/step seconds"] = step_seconds * (10 if step == 1 else 1)
            row["timing/optimizer seconds"] = optimizer_seconds * (10 if step == 1 else 1)
            row["data/first tokens"] = 0.75 * TOKENS if stage == "one" else 0
            row["data/second tokens"] = 0.25 * TOKENS if stage == "one" else TOKENS
            if step % every == 0 or step == steps:
                for source, offset in zip(SOURCES, (-0.1, 0.1)):
                    loss = losses[step] + offset
                    row[f"eval/validation/{source}/CE loss"] = loss
                    row[f"eval/validation/{source}/BPB"] = loss / math.log(2)
                row.update(extra or {})
            file.write(json.dumps(row) + "\n")
    if facts:
        write_facts(folder)
    return folder


def write_facts(folder: Path, **changes: Any) -> None:
    facts = {
        "parameters": 1000,
        "state_bytes": {"one": 4000, "two": 8000},
        "asked": {"one": {"first": 0.75, "second": 0.25}, "two": {"second": 1.0}},
        "ranks": 1,
        "device": {"type": "cpu", "name": "a processor"},
        "versions": {"python": "3.11.1", "torch": "2.13.0", "ai2-olmo-core": "3.0.0"},
        "command": "olmo-optim pretrain",
        "time": "2025-01-01T00:00:00+00:00",
    }
    (folder / "run.json").write_text(json.dumps({**facts, **changes}))


def write_trial(
    root: Path,
    arm: str,
    lr: float,
    seed: int,
    final: float = 2.0,
    *,
    state: str = "complete",
    error: Optional[str] = None,
    **run: Any,
) -> Path:
    """A run of a comparison."""
    folder = root / "runs" / arm / f"lr-{lr:g}" / f"seed-{seed}"
    optimizer = run.pop("optimizer", {"name": arm, "lr": lr})
    write_run(folder, final, seed=seed, optimizer=optimizer, **run)
    trial = {"arm": arm, "lr": lr, "seed": seed, "state": state, "error": error}
    (folder / "trial.json").write_text(json.dumps(trial))
    return folder


def write_comparison(
    root: Path,
    lrs: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    baseline: str = "adamw",
    **changes: Any,
) -> Path:
    """What was asked for; runs are written by :func:`write_trial`."""
    root.mkdir(parents=True, exist_ok=True)
    comparison = {
        "name": root.name,
        "baseline": baseline,
        "tolerance": None,
        "criteria": False,
        "lrs": {arm: list(rates) for arm, rates in lrs.items()},
        "seeds": list(seeds),
        "tune": False,
        "spec": {},
        **changes,
    }
    (root / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    return root
