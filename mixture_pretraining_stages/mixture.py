"""
The mixture of a stage: how many tokens of each source, in which order, and what was really drawn.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
from olmo_core.data.composable import ComposableDataLoader, InstanceSource, MixingInstanceSource
from olmo_core.data.utils import get_rng
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.callbacks import Callback
from olmo_core.train.common import ReduceType

from .plans import StagePlan
from .spec_parts import ShareSpec

__all__ = [
    "DrawnTokens",
    "MixtureLoader",
    "Share",
    "build_mixture",
    "drawn_metric",
    "drawn_tokens",
    "share_out",
]


class Share(NamedTuple):
    """What a stage takes of a source."""

    source: str
    asked: float
    """Of the stage's tokens, before any limit on repetitions."""
    planned: float
    """Of the stage's tokens."""
    repetitions: float
    """How often the stage goes through the source's training tokens."""


def share_out(plan: StagePlan, sizes: Mapping[str, int]) -> List[Share]:
    """
    What a stage takes of each source.

    :param sizes: Training tokens of each source.

    :raises OLMoConfigurationError: If the amounts do not add up to the stage's tokens.
    """
    where, total = f"stages.{plan.index}.mixture", float(plan.tokens)
    specs = {
        name: share if isinstance(share, ShareSpec) else ShareSpec(weight=share)
        for name, share in plan.spec.mixture.items()
    }
    fixed = {name: _fixed(spec, sizes[name]) for name, spec in specs.items() if not spec.weight}
    fixed = {name: tokens for name, tokens in fixed.items() if tokens > 0}
    weights = {name: spec.weight for name, spec in specs.items() if spec.weight}
    rest = total - sum(fixed.values())
    if rest < -plan.global_batch_size or (not weights and rest > plan.global_batch_size):
        raise OLMoConfigurationError(
            f"{where}: tokens and repetitions are {sum(fixed.values()):,.0f} tokens in all, "
            f"allowed are {'at most ' if weights else ''}the {plan.tokens:,} of the stage, give or "
            "take a batch"
        )
    if weights and rest < plan.sequence_length:
        raise OLMoConfigurationError(
            f"{where}.{next(iter(weights))}: tokens and repetitions of the others leave "
            f"{max(0.0, rest):,.0f} of the stage's {plan.tokens:,} tokens to weights, allowed is "
            f"enough for a sequence of {plan.sequence_length}, or weight 0"
        )
    if not weights:  # rounding to batches
        fixed = {name: tokens * total / sum(fixed.values()) for name, tokens in fixed.items()}
    limits = {
        name: spec.max_repetitions * sizes[name]
        for name, spec in specs.items()
        if spec.max_repetitions is not None
    }
    for name, tokens in fixed.items():
        if tokens > limits.get(name, float("inf")) * (1 + 1e-9):
            raise OLMoConfigurationError(
                f"{where}.{name}.tokens: {tokens:,.0f} tokens are {tokens / sizes[name]:.2f} times "
                f"the source's {sizes[name]:,}, allowed by max_repetitions is "
                f"{specs[name].max_repetitions:g}"
            )
    given = _by_weight(weights, limits, rest, where) if weights else {}
    asked = {name: rest * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = []
    for name, tokens in {**fixed, **given}.items():
        if 0 < tokens < plan.sequence_length:
            raise OLMoConfigurationError(
                f"{where}.{name}: {tokens:,.1f} tokens are not allowed, allowed is 0, or enough "
                f"for a sequence of {plan.sequence_length} in {plan.tokens:,} tokens"
            )
        asked_tokens = {**fixed, **asked}[name]
        shares.append(Share(name, asked_tokens / total, tokens / total, tokens / sizes[name]))
    return [share for name in specs for share in shares if share.source == name]


def _fixed(spec: ShareSpec, size: int) -> float:
    if spec.tokens is not None:
        return float(spec.tokens)
    return (spec.repetitions or 0.0) * size


def _by_weight(
    weights: Mapping[str, float], limits: Mapping[str, float], tokens: float, where: str
) -> Dict[str, float]:
    """Tokens in proportion to weights; what is above a limit goes to the others."""
    given: Dict[str, float] = {}
    open_ = dict(weights)
    while open_:
        left, total = tokens - sum(given.values()), sum(open_.values())
        full = [n for n, w in open_.items() if left * w / total > limits.get(n, float("inf"))]
        if not full:
            return {**given, **{name: left * w / total for name, w in open_.items()}}
        given.update({name: limits[name] for name in full})
        open_ = {name: w for name, w in open_.items() if name not in given}
    raise OLMoConfigurationError(
        f"{where}: with max_repetitions the sources have {sum(given.values()):,.0f} tokens for "
        f"{tokens:,.0f}, allowed are fewer tokens, more sources or more repetitions"
    )


def build_mixture(
    plan: StagePlan,
    shares: Sequence[Share],
    sources: Mapping[str, InstanceSource],
    work_dir: Path,
    seed: int,
) -> MixingInstanceSource:
    """
    The instances of a stage, and a batch more: shares are rounded down to whole instances.

    :param sources: Training instances of each source.
    """
    tokens = plan.tokens + plan.global_batch_size
    specs = [
        MixingInstanceSource.Spec(
            source=sources[share.source],
            ratio=share.planned,
            max_repetition_factor=max(
                1.0, 1.01 * tokens * share.planned / sources[share.source].num_tokens
            ),
            label=share.source,
        )
        for share in shares
    ]
    return MixingInstanceSource(*specs, work_dir=work_dir, seed=seed, num_tokens=tokens)


class MixtureLoader(ComposableDataLoader):
    """
    OLMo-core's loader, in an order in which each part of the run has the mixture's shares: of the
    first ``n`` instances a source has its share, give or take one. A source is gone through once,
    in random order, before anything of it comes again. Where in its stratum an instance stands is
    random, too.

    :param mixture: The instances.
    """

    def __init__(self, mixture: MixingInstanceSource, **options: Any):
        super().__init__(mixture, **options)
        self.source_names = [str(source.label) for source in mixture.sampled_sources]
        self.source_ends = np.cumsum([len(source) for source in mixture.sampled_sources])
        # A sampled source is the whole one, again and again.
        self.pass_sizes = [sum(map(len, source.sources)) for source in mixture.sampled_sources]

    def _build_global_indices(self) -> np.ndarray:
        random = get_rng(self.seed + (self._epoch or 1))
        orders, places = [], []
        sizes = np.diff(self.source_ends, prepend=0)
        for end, size, once in zip(self.source_ends, sizes, self.pass_sizes):
            for begin in range(0, size, once):
                orders.append(random.permutation(min(once, size - begin)) + end - size + begin)
            places.append((np.arange(size) + random.random(size)) / size)
        order = np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]
        return order.astype(np.uint32)

    def count(self, batch: Mapping[str, Any]) -> Dict[str, int]:
        """How many tokens of a batch are from each source."""
        of_source = np.searchsorted(self.source_ends, np.asarray(batch["index"]), side="right")
        counts = np.bincount(of_source, minlength=len(self.source_names)) * self.sequence_length
        return dict(zip(self.source_names, counts.tolist()))


def drawn_metric(source: str) -> str:
    """The name of the metric: tokens of a step that were drawn from a source."""
    return f"data/{source} tokens"


@dataclass
class DrawnTokens(Callback):
    """Records how many tokens of each step were drawn from each source."""

    tensor_ranks: int = 1
    """Ranks that see the same batch."""

    def pre_step(self, batch: Dict[str, Any]):
        assert isinstance(self.trainer.data_loader, MixtureLoader)
        for source, tokens in self.trainer.data_loader.count(batch).items():
            self.trainer.record_metric(
                drawn_metric(source), tokens / self.tensor_ranks, ReduceType.sum
            )


def drawn_tokens(
    rows: Sequence[Mapping[str, Any]], stage: str, sources: Sequence[str]
) -> Dict[str, Tuple[float, float]]:
    """
    What a stage has drawn so far.

    :param rows: The metrics of a run.

    :returns: By source, tokens and their share of the stage's.
    """
    of_stage = [row for row in rows if row.get("stage") == stage]
    drawn = {s: sum(row.get(drawn_metric(s), 0.0) for row in of_stage) for s in sources}
    total = sum(drawn.values())
    return {s: (n, n / total if total else 0.0) for s, n in drawn.items()}
