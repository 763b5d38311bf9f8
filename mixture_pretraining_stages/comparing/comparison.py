"""
A comparison of optimizers: its arms, the learning rates and seeds of each, and the runs that
follow. Each arm gets as many runs of as many tokens as any other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

from olmo_core.exceptions import OLMoConfigurationError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmo_optim_ext.catalog import closest, optimizer_info
from olmo_optim_ext.config import ExtOptimConfig, learning_rate

from ..decoding import decode_fields, refuse
from ..evaluation import EVALUATOR
from ..tokenizers import load_tokenizer

if TYPE_CHECKING:
    from ..spec_parts import StageSpec
    from ..training import JolmoModel

__all__ = [
    "BASELINE",
    "Comparison",
    "ComparisonSpec",
    "RunPlan",
    "check_arms",
    "factors_of_two",
    "plan_comparison",
    "validation_losses",
]

BASELINE = "ext_adamw"
"""With which a comparison compares if it names no other arm."""

MOST_RATES = 64
"""In factors of 2; far beyond what a learning rate can be."""

NOT_OF_AN_ARM = {
    **dict.fromkeys(("name", "output", "seed", "comparison"), "the comparison sets it"),
    **dict.fromkeys(("sources", "tokenizer", "evaluation"), "losses would mean something else"),
}
"""Keys of the spec that no arm overrides, and why."""


@dataclass
class ComparisonSpec:
    """What ``olmo-optim compare`` compares; its flags override it."""

    baseline: Optional[str] = None
    """An arm; ``null`` is AdamW, which is added if no arm has it."""
    lrs: Union[int, List[float]] = 5
    """How many learning rates, see :func:`factors_of_two`, or factors of each arm's own one."""
    seeds: int = 3
    """How many, from the spec's ``seed`` on."""
    tolerance: Optional[float] = None
    """For the report: how far above the baseline's a loss may be, relative to it."""
    criteria: bool = False
    """Whether the report has the success criteria of a study."""
    arms: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    """By name, overrides of the spec; a key may be dotted, and a mapping replaces."""

    def check(self) -> None:
        """
        :raises OLMoConfigurationError: Names the key, the value and what is allowed.
        """
        for key in ("lrs", "seeds"):
            value = getattr(self, key)
            if isinstance(value, int) and value < 1:
                refuse(f"comparison.{key}", value, "an integer >= 1")
        if isinstance(self.lrs, int) and self.lrs > MOST_RATES:
            refuse("comparison.lrs", self.lrs, f"an integer from 1 to {MOST_RATES}")
        if isinstance(self.lrs, list):
            finite = all(0 < factor < math.inf for factor in self.lrs)
            if not self.lrs or not finite or len(set(self.lrs)) < len(self.lrs):
                refuse("comparison.lrs", self.lrs, "a list of different numbers > 0")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            refuse("comparison.tolerance", self.tolerance, "null or a finite number >= 0")

    def factors(self) -> List[float]:
        """Of an arm's own learning rate, ascending."""
        return factors_of_two(self.lrs) if isinstance(self.lrs, int) else sorted(self.lrs)


def factors_of_two(count: int) -> List[float]:
    """
    Powers of 2 around 1, ascending. Of an even count the odd one is below 1, so that a grid of
    more rates has those of one with fewer.
    """
    return [2.0**k for k in range(-(count // 2), (count + 1) // 2)]


@dataclass(frozen=True)
class RunPlan:
    """One run of a comparison."""

    arm: str
    lr: float
    seed: int
    folder: Path
    spec: "JolmoModel"

    @property
    def label(self) -> str:
        return f"{self.arm} lr {self.lr:.6g} seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """
    What is compared.

    :param spec: The spec that arms override, without its section ``comparison``.
    :param arms: By name, the overrides of each.
    :param specs: By name, the spec of each arm at its own learning rate.
    :param rates: By name, the grid of each; with ``tune`` the range is from its first to its last.
    :param seeds: The first is the spec's own.
    """

    name: str
    folder: Path
    spec: "JolmoModel"
    baseline: str
    tolerance: Optional[float]
    criteria: bool
    arms: Dict[str, Dict[str, Any]]
    specs: Dict[str, "JolmoModel"]
    rates: Dict[str, List[float]]
    seeds: List[int]
    tune: bool

    @property
    def budget(self) -> int:
        """Runs of each arm."""
        return len(self.rates[self.baseline]) * len(self.seeds)

    def own_rate(self, arm: str) -> float:
        """
        The learning rate of the arm without a comparison, in the first stage. Those of stages with
        another optimizer move with it.
        """
        return _own_rate(self.specs[arm])

    def run(self, arm: str, lr: float, seed: int) -> RunPlan:
        """The run of an arm with a learning rate and a seed."""
        folder = self.folder / "runs" / arm / f"lr-{lr:.6g}" / f"seed-{seed}"
        base = self.specs[arm]
        stages = [
            replace(stage, optimizer=self._moved(arm, lr, seed, stage))
            if stage.optimizer
            else stage
            for stage in base.stages
        ]
        spec = replace(
            base,
            name=f"{self.name}-{arm}-lr-{lr:.6g}-seed-{seed}",
            output=str(folder),
            seed=seed,
            optimizer=self._moved(arm, lr, seed),
            stages=stages,
        )
        return RunPlan(arm, lr, seed, folder, spec)

    def _moved(
        self, arm: str, lr: float, seed: int, stage: Optional["StageSpec"] = None
    ) -> Dict[str, Any]:
        """The optimizer of the run or of a stage, with its learning rate moved like the arm's."""
        spec, own = self.specs[arm], self.own_rate(arm)
        config = spec.optimizer_config(stage)
        optimizer = dict(spec.optimizer if stage is None else spec.optimizer_of(stage))
        rate = learning_rate(config)
        rate = lr if rate == own else rate * lr / own
        inner = optimizer.get("inner")
        if isinstance(inner, Mapping) and inner.get("lr") is not None:
            optimizer["inner"] = {**inner, "lr": rate}  # a wrapper takes one of the two
        else:
            optimizer["lr"] = rate
        # What is random in a step moves with the seed; that of the first is the spec's own.
        moved = seed - self.seeds[0]
        if moved and isinstance(config, ExtOptimConfig):
            optimizer["seed"] = optimizer.get("seed", 0) + moved
        return optimizer


def plan_comparison(
    spec: "JolmoModel",
    *,
    optimizers: Optional[Sequence[str]] = None,
    lrs: Optional[int] = None,
    seeds: Optional[int] = None,
    tune: bool = False,
) -> Comparison:
    """
    What a spec and the flags of ``olmo-optim compare`` ask for.

    :param optimizers: Names of arms of the spec's ``comparison``, or of optimizers: that of the
        spec is as the spec has it, others have the defaults of their configs.
    :param tune: Sample learning rates from the grid's range instead of taking all of its.

    :raises OLMoConfigurationError: If something of it is not allowed; no arm's spec is checked.
    """
    asked = spec.comparison or ComparisonSpec()
    asked = replace(
        asked,
        lrs=asked.lrs if lrs is None else lrs,
        seeds=asked.seeds if seeds is None else seeds,
        arms=asked.arms if optimizers is None else _arms_of(spec, asked.arms, optimizers),
    )
    asked.check()
    factors = asked.factors()
    if tune and len(factors) < 2:
        refuse("--lrs", len(factors), "at least 2 with --tune, which samples between them")
    base = replace(spec, comparison=None)
    if base.output == type(spec).output:
        base.output = str(Path(base.output) / base.name)
    arms, baseline = _with_baseline(base, asked)
    specs = {arm: _spec_of(base, arm, overrides) for arm, overrides in arms.items()}
    return Comparison(
        name=base.name,
        folder=Path(base.output),
        spec=base,
        baseline=baseline,
        tolerance=asked.tolerance,
        criteria=asked.criteria,
        arms=arms,
        specs=specs,
        rates={arm: _rates(arm, specs[arm], factors) for arm in arms},
        seeds=[base.seed + index for index in range(asked.seeds)],
        tune=tune,
    )


def _arms_of(
    spec: "JolmoModel", known: Mapping[str, Dict[str, Any]], names: Sequence[str]
) -> Dict[str, Dict[str, Any]]:
    resolved = [name if name in known else _catalogue_name(name) for name in names]
    for name in resolved:
        if resolved.count(name) > 1:
            refuse("--optimizers", ",".join(names), f"{name} once")
    return {name: known[name] if name in known else _arm_with(spec, name) for name in names}


def _arm_with(spec: "JolmoModel", name: str) -> Dict[str, Any]:
    if _catalogue_name(name) == _catalogue_name(spec.optimizer.get("name")):
        return {"optimizer": spec.optimizer}
    return {"optimizer": {"name": name}}


def _catalogue_name(name: Any) -> Any:
    """``muon`` and ``ext_muon`` are the same; what is no name of the catalogue stays."""
    try:
        return optimizer_info(name).name if isinstance(name, str) else name
    except OLMoConfigurationError:
        return name


def _with_baseline(
    base: "JolmoModel", asked: ComparisonSpec
) -> Tuple[Dict[str, Dict[str, Any]], str]:
    arms = {name: {"optimizer": base.optimizer, **arm} for name, arm in asked.arms.items()}
    if not arms:
        refuse("comparison.arms", {}, "at least one arm, or names with --optimizers")
    if asked.baseline is not None:
        if asked.baseline not in arms:
            refuse("comparison.baseline", asked.baseline, f"null or {closest('', arms)}")
        return arms, asked.baseline
    for name, arm in arms.items():
        optimizer = arm["optimizer"]
        if isinstance(optimizer, Mapping) and _catalogue_name(optimizer.get("name")) == BASELINE:
            return arms, name
    if BASELINE in arms:
        refuse("comparison.arms", BASELINE, f"this name for an arm with {BASELINE} alone")
    return {BASELINE: _arm_with(base, BASELINE), **arms}, BASELINE


def _spec_of(base: "JolmoModel", arm: str, overrides: Mapping[str, Any]) -> "JolmoModel":
    if not arm or set(arm) & set("/\\\0") or arm[0] == ".":
        refuse("comparison.arms", arm, "a name that can be the name of a folder")
    config = OmegaConf.create(base.as_plain())
    for key, value in overrides.items():
        where = f"comparison.arms.{arm}.{key}"
        if (reason := NOT_OF_AN_ARM.get(str(key).split(".")[0])) is not None:
            raise OLMoConfigurationError(f"{where}: an arm cannot override it, as {reason}")
        try:
            OmegaConf.update(config, str(key), value, merge=False)
        except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
            raise OLMoConfigurationError(f"{where}: {str(error).splitlines()[0]}") from None
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    with _naming(arm):
        spec = decode_fields(type(base), {str(k): v for k, v in plain.items()}, "")
        # What is recorded of matrices is for the arms that have a rule for them.
        if "optimizer_metrics" not in overrides and not any(map(spec.has_matrix_rule, spec.stages)):
            spec.optimizer_metrics = None
    tokens, allowed = (sum(stage.tokens for stage in each.stages) for each in (spec, base))
    if tokens != allowed:
        where = f"comparison.arms.{arm}.stages"
        refuse(where, f"{tokens} tokens", f"{allowed}, as all arms get as many")
    if spec.optimizer != base.optimizer and all(stage.optimizer for stage in spec.stages):
        raise OLMoConfigurationError(
            f"comparison.arms.{arm}.optimizer: each stage has an optimizer of its own, allowed is "
            "to override stages"
        )
    return spec


@contextmanager
def _naming(arm: str) -> Iterator[None]:
    try:
        yield
    except OLMoConfigurationError as error:
        raise OLMoConfigurationError(f"comparison.arms.{arm}.{error}") from None


def check_arms(comparison: Comparison, world_size: int = 1) -> None:
    """
    Check each arm's spec as a run of it would, and build its optimizer without memory.

    :raises OLMoConfigurationError: Names the arm, the key, the value and what is allowed.
    """
    for arm, spec in comparison.specs.items():
        with _naming(arm):
            spec.check(world_size)
            for stage in spec.stages:
                spec.build_on_meta(load_tokenizer(spec.tokenizer).config.vocab_size, stage)
            for lr in (comparison.rates[arm][0], comparison.rates[arm][-1]):
                comparison.run(arm, lr, comparison.seeds[-1]).spec.check(world_size)


def _own_rate(spec: "JolmoModel") -> Any:
    return learning_rate(spec.optimizer_config(spec.stages[0]))


def _rates(arm: str, spec: "JolmoModel", factors: Sequence[float]) -> List[float]:
    with _naming(arm):
        own = _own_rate(spec)
        if not isinstance(own, (int, float)) or not 0 < own < math.inf:
            refuse("optimizer.lr", own, "a finite number > 0")
    rates = [own * factor for factor in factors]
    if not all(0 < rate < math.inf for rate in rates):
        allowed = f"factors of {own:g}, the rate of {arm}, that give finite rates > 0"
        refuse("comparison.lrs", list(factors), allowed)
    if len({f"{rate:.6g}" for rate in rates}) < len(rates):
        refuse("comparison.lrs", list(factors), "factors that differ in their first 6 digits")
    return rates


def validation_losses(
    rows: Sequence[Mapping[str, Any]], sources: Sequence[str]
) -> List[Tuple[int, float]]:
    """
    ``(step, loss)`` of each evaluation: the mean over sources in nats per token, which is what
    a comparison compares.

    :param rows: As ``read_metrics`` gives them.
    """
    keys = [f"eval/{EVALUATOR}/{source}/CE loss" for source in sources]
    return [
        (row["step"], sum(row[key] for key in keys) / len(keys))
        for row in rows
        if all(key in row for key in keys)
    ]
