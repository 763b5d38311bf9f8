"""
Runs as they are found on disk, finished or not: of one experiment, or of a comparison.
"""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import yaml
from olmo_core.exceptions import OLMoConfigurationError

from olmo_optim_ext.catalog import get_config_class

from ..callbacks import read_metrics
from ..evaluation import EVALUATOR
from ..facts import read_facts
from ..plans import plan_stages
from ..reading import load_spec
from ..timing import STEP_SECONDS
from .lone_runs import name_arms, unlike

__all__ = ["Comparison", "Evaluation", "Results", "RunResult", "load_runs"]

COMPLETE, FAILED, PRUNED, RUNNING = "complete", "failed", "pruned", "running"
STATES = (COMPLETE, FAILED, PRUNED, RUNNING)

EVALUATED = re.compile(rf"eval/{EVALUATOR}/(.+)/(CE loss|BPB)")


class Evaluation(NamedTuple):
    """What was measured of held-out text after a step."""

    step: int
    tokens: int
    seconds: Optional[float]
    """Of all steps up to this one; ``None`` if the run did not record them."""
    losses: Dict[str, float]
    """Nats per token, by source."""
    bits: Dict[str, float]
    """Bits per byte, by source, where the text is known."""

    @property
    def loss(self) -> float:
        """
        The mean over sources, all with the same weight: an evaluation takes as many tokens of each.
        """
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class RunResult:
    """A run folder. Whatever it lacks is empty or ``None``."""

    folder: Path
    arm: str = ""
    """What the run is compared as: an optimizer with its options, but for the learning rate."""
    lr: Optional[float] = None
    seed: Optional[int] = None
    state: str = RUNNING
    """``complete``, ``failed``, ``pruned``, or ``running`` for one that is not finished."""
    error: Optional[str] = None
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def seconds(self) -> Optional[Dict[int, float]]:
        """By step, the seconds of all steps up to it; ``None`` if some are not known."""
        timed = [row for row in self.rows if "train/CE loss" in row or STEP_SECONDS in row]
        if not timed or any(STEP_SECONDS not in row for row in timed):
            return None
        sums = accumulate(row[STEP_SECONDS] for row in timed)
        return dict(zip((row["step"] for row in timed), sums))

    @cached_property
    def evaluations(self) -> List[Evaluation]:
        """Those that have all sources of the last one."""
        found = []
        for row in self.rows:
            by_kind: Dict[str, Dict[str, float]] = {"CE loss": {}, "BPB": {}}
            for key, value in row.items():
                if match := EVALUATED.fullmatch(key):
                    by_kind[match[2]][match[1]] = value
            if by_kind["CE loss"]:
                seconds = (self.seconds or {}).get(row["step"])
                found.append(Evaluation(row["step"], row["tokens"], seconds, *by_kind.values()))
        return [each for each in found if each.losses.keys() >= found[-1].losses.keys()]

    @property
    def final(self) -> Optional[Evaluation]:
        """The last evaluation of a run that is complete."""
        return self.evaluations[-1] if self.state == COMPLETE and self.evaluations else None

    @property
    def broken(self) -> Optional[str]:
        """Why the run has no result that can be compared although it has ended."""
        if self.state == FAILED:
            return self.error or "failed"
        if self.state == COMPLETE and self.final is None:
            return "complete, but without an evaluation in metrics.jsonl"
        if self.final is not None and not math.isfinite(self.final.loss):
            return f"diverged: its final loss is {self.final.loss}"
        return None

    @property
    def optimizer(self) -> str:
        """Its name in the config."""
        optimizer = self.config.get("optimizer")
        return str(optimizer.get("name", "")) if isinstance(optimizer, dict) else ""


@dataclass(frozen=True)
class Comparison:
    """What ``olmo-optim compare`` was asked for."""

    folder: Path
    name: str
    baseline: str
    """An arm."""
    tolerance: Optional[float] = None
    criteria: bool = False
    """Whether it is a study with criteria of success."""
    lrs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By arm, the rates that were to be tried; of a search those that were suggested."""
    seeds: Sequence[int] = ()
    tune: bool = False
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """All that a report is about."""

    runs: Sequence[RunResult]
    comparisons: Sequence[Comparison] = ()


def load_runs(paths: Sequence[Path]) -> Results:
    """
    The runs in folders of ``olmo-optim pretrain`` and ``olmo-optim compare``. Those that are
    unfinished, failed or half-written are among them, with what can be read. A run is in it once,
    also if it is asked for beside the comparison that made it.

    :raises OLMoConfigurationError: If a path is neither, or a ``comparison.yaml`` is damaged.
    """
    runs: List[RunResult] = []
    lone: List[RunResult] = []
    comparisons: List[Comparison] = []
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        if (path / "comparison.yaml").is_file():
            comparison = _read_comparison(path)
            taken = {run.arm for run in runs} | {arm for each in comparisons for arm in each.lrs}
            its_runs = [_trial(folder) for folder in sorted((path / "runs").glob("*/lr-*/seed-*"))]
            comparison, its_runs = _apart(comparison, its_runs, taken)
            comparisons.append(comparison)
            runs += its_runs
        elif any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            lone.append(_lone(path))
        elif (path / "trial.json").is_file():
            lone.append(_trial(path))
        else:
            raise OLMoConfigurationError(
                f"{path}: it is neither a run nor a comparison, allowed is a folder that "
                "olmo-optim pretrain or olmo-optim compare has written"
            )
    known = {run.folder for run in runs}
    lone = [run for run in lone if run.folder not in known]
    return Results([*runs, *name_arms(lone, {run.arm for run in runs})], comparisons)


def _apart(
    comparison: Comparison, runs: List[RunResult], taken: Set[str]
) -> Tuple[Comparison, List[RunResult]]:
    """With other names for arms that another comparison has, too."""
    arms = sorted({*comparison.lrs, comparison.baseline, *(run.arm for run in runs)})
    names: Dict[str, str] = {}
    for arm in arms:
        name = arm if arm not in taken else f"{comparison.name}: {arm}"
        others = {*taken, *names.values(), *(each for each in arms if each != arm)}
        names[arm] = unlike(name, others)
    return (
        replace(
            comparison,
            baseline=names[comparison.baseline],
            lrs={names[arm]: rates for arm, rates in comparison.lrs.items()},
        ),
        [replace(run, arm=names[run.arm]) for run in runs],
    )


def _read_comparison(folder: Path) -> Comparison:
    path = folder / "comparison.yaml"
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        lrs = {
            str(arm): [float(rate) for rate in rates]
            for arm, rates in (plain.get("lrs") or {}).items()
        }
        tolerance = plain.get("tolerance")
        return Comparison(
            folder=folder,
            name=str(plain.get("name", folder.name)),
            baseline=str(plain["baseline"]),
            tolerance=None if tolerance is None else float(tolerance),
            criteria=bool(plain.get("criteria")),
            lrs=lrs,
            seeds=[int(seed) for seed in plain.get("seeds") or []],
            tune=bool(plain.get("tune")),
            spec=plain.get("spec") or {},
        )
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise OLMoConfigurationError(
            f"{path}: it is damaged ({type(error).__name__}: {error}), allowed is the one that "
            "olmo-optim compare has written"
        ) from None


def _read(folder: Path) -> RunResult:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    config = config if isinstance(config, dict) else {}
    return RunResult(
        folder=folder,
        lr=_rate(config),
        seed=_whole(config.get("seed"), None),
        config=config,
        facts=read_facts(folder / "run.json"),
        rows=_rows(folder),
    )


def _rows(folder: Path) -> List[Dict[str, Any]]:
    """Metrics of a run; what another program has written, without tokens or numbers, is not."""
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    return [
        {key: value for key, value in row.items() if key == "stage" or _is_number(value)}
        for row in rows
        if _is_number(row.get("tokens"))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _trial(folder: Path) -> RunResult:
    """A run of a comparison: what it is says ``trial.json``, or else where it is."""
    run = _read(folder)
    trial = read_facts(folder / "trial.json")
    arm, lr, seed = folder.parent.parent.name, folder.parent.name[3:], folder.name[5:]
    state = trial.get("state")
    return replace(
        run,
        arm=str(trial.get("arm", arm)),
        lr=_number(trial.get("lr", lr), run.lr),
        seed=_whole(trial.get("seed", seed), run.seed),
        state=state if state in STATES else RUNNING,
        error=str(trial["error"]) if trial.get("error") else None,
    )


def _lone(folder: Path) -> RunResult:
    """A run on its own, or one of a comparison that was asked for by itself."""
    if (folder / "trial.json").is_file():
        return _trial(folder)
    run = _read(folder)
    try:
        last_step = plan_stages(load_spec(folder / "config.yaml"))[-1].last_step
    except OLMoConfigurationError as error:
        return replace(run, error=f"config.yaml cannot be read: {error}")
    complete = bool(run.evaluations) and run.evaluations[-1].step >= last_step
    return replace(run, state=COMPLETE if complete else RUNNING)


def _rate(config: Mapping[str, Any]) -> Optional[float]:
    """The learning rate of a config, the optimizer's default if it has none."""
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict):
        return None
    if optimizer.get("lr") is not None:
        return _number(optimizer["lr"], None)
    fields = {key: optimizer[key] for key in ("inner",) if key in optimizer}
    try:
        default = get_config_class(str(optimizer.get("name")))(**fields).hyperparameters()
    except OLMoConfigurationError:  # of OLMo-core, or of another version
        return None
    return _number(default.get("lr"), None)


def _number(value: Any, otherwise: Optional[float]) -> Optional[float]:
    try:
        return float(value)
    except (TypeError, ValueError):
        return otherwise


def _whole(value: Any, otherwise: Optional[int]) -> Optional[int]:
    number = _number(value, None)
    return otherwise if number is None else int(number)
