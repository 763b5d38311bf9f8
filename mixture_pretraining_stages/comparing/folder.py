"""
What a comparison keeps in its folder beside the runs: ``comparison.yaml``, which says what is
compared, and a ``trial.json`` in the folder of each run, which says what became of it.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from filelock import FileLock
from olmo_core.exceptions import OLMoConfigurationError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..callbacks import read_metrics
from ..drafts import write_whole
from ..folder import MAY_CHANGE
from ..plans import plan_stages
from .comparison import Comparison, RunPlan, validation_losses

__all__ = [
    "Result",
    "claim_folder",
    "final_loss",
    "read_trial",
    "results",
    "steps_of",
    "write_trial",
]

FILE = "comparison.yaml"
TRIAL = "trial.json"

FREE = MAY_CHANGE - {"evaluation"}
"""Keys of the spec that may change while a comparison continues: losses stay comparable."""


def claim_folder(comparison: Comparison) -> str:
    """
    Write ``comparison.yaml``, or extend what is there: further arms, learning rates and seeds.

    :returns: An identifier that stays with the folder.

    :raises OLMoConfigurationError: If the folder has a comparison that this one contradicts, or
        cannot be written.
    """
    path = comparison.folder / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of two machines that begin at the same moment one is first.
        with FileLock(path.with_name(".comparison.lock")):
            now = {**_plain(comparison), "id": uuid.uuid4().hex[:12]}
            if path.exists():
                before = _read(path)
                problems = _contradictions(before, now)
                if problems and (comparison.folder / "runs").exists():
                    raise OLMoConfigurationError(
                        f"output: {comparison.folder} has another comparison "
                        f"({'; '.join(problems)}), allowed is the same with more arms, or without "
                        "--tune more learning rates and seeds, or another folder: output=FOLDER"
                    )
                if not problems:
                    now["id"] = before["id"]
            write_whole(path, OmegaConf.to_yaml(OmegaConf.create(now)))
    except OSError as error:
        raise OLMoConfigurationError(
            f"output: {comparison.folder} cannot be written ({error.strerror}), allowed is a "
            "folder that can"
        ) from None
    return now["id"]


def _plain(comparison: Comparison) -> Dict[str, Any]:
    config = OmegaConf.create(
        {
            "name": comparison.name,
            "baseline": comparison.baseline,
            "tolerance": comparison.tolerance,
            "criteria": comparison.criteria,
            "lrs": comparison.rates,
            "seeds": comparison.seeds,
            "tune": comparison.tune,
            "arms": comparison.arms,
            "spec": comparison.spec.as_plain(),
        }
    )
    plain: Any = OmegaConf.to_container(config)  # tuples are lists, as they are read back
    return plain


def _read(path: Path) -> Dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException):
        content = None
    if not isinstance(content, dict) or not {"id", "spec", "arms", "lrs", "seeds"} <= set(content):
        raise OLMoConfigurationError(
            f"output: {path} is damaged, allowed is the one that a comparison wrote, or another "
            "folder: output=FOLDER"
        )
    return {str(key): value for key, value in content.items()}


def _contradictions(before: Mapping[str, Any], now: Mapping[str, Any]) -> List[str]:
    problems = _changes("", before["spec"], now["spec"], FREE | {"optimizer"})
    for arm, overrides in before["arms"].items():
        if arm not in now["arms"]:
            problems.append(f"arm {arm} left out")
            continue
        problems += _changes(f"comparison.arms.{arm}.", overrides, now["arms"][arm], FREE)
        gone = [lr for lr in before["lrs"][arm] if lr not in now["lrs"][arm]]
        problems += [f"rate {lr:.6g} of {arm} left out" for lr in gone]
    problems += [f"seed {seed} left out" for seed in before["seeds"] if seed not in now["seeds"]]
    problems += _changes("", before, now, set(now) - {"tune"})
    if now["tune"] and not problems:
        # What is sampled depends on the samples before, and on how many there will be.
        rates = {arm: now["lrs"][arm] for arm in before["lrs"]}
        problems += _changes("", {"lrs": before["lrs"]}, {"lrs": rates}, ())
        problems += _changes("", before, now, set(now) - {"seeds"})
    return problems


def _changes(
    prefix: str, before: Mapping[str, Any], now: Mapping[str, Any], free: Any
) -> List[str]:
    keys = [key for key in {**before, **now} if key not in free]
    return [
        f"{prefix}{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def write_trial(run: RunPlan, state: str, error: Optional[str] = None) -> None:
    """Note what became of a run: ``running``, ``complete``, ``pruned`` or ``failed``."""
    run.folder.mkdir(parents=True, exist_ok=True)
    content = {"arm": run.arm, "lr": run.lr, "seed": run.seed, "state": state, "error": error}
    write_whole(run.folder / TRIAL, json.dumps(content, indent=2) + "\n")


def read_trial(folder: Path) -> Optional[Dict[str, Any]]:
    """What :func:`write_trial` has noted of the run in a folder."""
    path = folder / TRIAL
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Result(NamedTuple):
    """What became of a run."""

    run: RunPlan
    state: str
    error: Optional[str]
    loss: float
    """The last validation loss, infinite if there is none."""


def results(comparison: Comparison) -> List[Result]:
    """Of all runs in the comparison's folder, by arm, learning rate and seed."""
    found = []
    for path in (comparison.folder / "runs").glob(f"*/*/*/{TRIAL}"):
        trial = json.loads(path.read_text(encoding="utf-8"))
        if trial["arm"] in comparison.arms:
            run = comparison.run(trial["arm"], trial["lr"], trial["seed"])
            found.append(Result(run, trial["state"], trial["error"], final_loss(run)))
    arms = list(comparison.arms)
    return sorted(found, key=lambda each: (arms.index(each.run.arm), each.run.lr, each.run.seed))


def steps_of(run: RunPlan) -> int:
    """How many steps a run has."""
    return plan_stages(run.spec)[-1].last_step


def final_loss(run: RunPlan) -> float:
    """The validation loss after the last step, infinite if it is not finite or missing."""
    rows = read_metrics(run.folder / "metrics.jsonl")
    losses = dict(validation_losses(rows, list(run.spec.sources)))
    loss = losses.get(steps_of(run), float("inf"))
    return loss if loss < float("inf") else float("inf")  # also of NaN
