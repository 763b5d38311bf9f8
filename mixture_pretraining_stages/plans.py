"""
The stages of a run with their places in it: steps, tokens, and what each takes of the run's spec.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence

from olmo_core.optim import OptimConfig, Scheduler

from .schedule import Span, StageScheduler

if TYPE_CHECKING:
    from .spec_parts import StageSpec
    from .training import JolmoModel

__all__ = ["StagePlan", "over_run", "plan_stages", "run_span", "same_kind"]

LONGEST_WARMUP = 100
""":data:`StageSpec.warmup` where the optimizer changes, at most; else a twentieth of the stage."""


@dataclass(frozen=True)
class StagePlan:
    """A stage and its place in the run. What the stage leaves open is the run's."""

    spec: "StageSpec"
    index: int
    first_step: int
    """Steps of the run before it."""
    last_step: int
    first_token: int
    """Tokens of the run before it."""
    folder: Path
    sequence_length: int
    global_batch_size: int
    """In tokens, as are the others."""
    rank_microbatch_size: int
    optimizer: Dict[str, Any]
    before: Optional[Dict[str, Any]]
    """The optimizer of the stage before; of the first stage ``None``."""

    @property
    def changes_optimizer(self) -> bool:
        """Whether the optimizer of the stage before was another, and not only its options."""
        return self.before is not None and _name(self.before) != _name(self.optimizer)

    @property
    def warmup(self) -> int:
        """Steps of the stage's own warm-up."""
        if self.spec.warmup is not None:
            return self.spec.warmup
        return min(LONGEST_WARMUP, max(1, self.steps // 20)) if self.changes_optimizer else 0

    def scheduler(self, spec: "JolmoModel", plans: Sequence["StagePlan"]) -> StageScheduler:
        """
        Its learning rate.

        :param plans: Those of the run.
        """
        run = run_span(plans)
        return StageScheduler(
            inner=spec.scheduler_config(self.spec),
            scale=self.spec.lr_scale,
            warmup=self.warmup,
            stage=self.span,
            over=run if self.spec.scheduler is None else self.span,
        )

    @property
    def span(self) -> Span:
        return Span(self.first_step, self.last_step, self.first_token, self.last_token)

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step

    @property
    def tokens(self) -> int:
        """In whole batches."""
        return self.steps * self.global_batch_size

    @property
    def last_token(self) -> int:
        return self.first_token + self.tokens

    def tokens_at(self, step: int) -> int:
        """Tokens of the run after one of its steps, which is of this stage."""
        return self.first_token + (step - self.first_step) * self.global_batch_size


def plan_stages(spec: "JolmoModel") -> List[StagePlan]:
    """The stages with their steps and tokens, which are counted over the whole run."""
    plans: List[StagePlan] = []
    step = token = 0
    before: Optional[Dict[str, Any]] = None
    for index, stage in enumerate(spec.stages):
        sizes = spec.sizes(stage)
        last = step + math.ceil(stage.tokens / sizes.global_batch_size)
        plan = StagePlan(
            stage,
            index,
            step,
            last,
            token,
            Path(spec.output) / "stages" / f"{index:02d}-{stage.name}",
            *sizes,
            optimizer=spec.optimizer_of(stage),
            before=before,
        )
        plans.append(plan)
        step, token, before = last, plan.last_token, plan.optimizer
    return plans


def run_span(plans: Sequence[StagePlan]) -> Span:
    """All of a run."""
    return Span(0, plans[-1].last_step, 0, plans[-1].last_token)


def over_run(scheduler: Scheduler, plans: Sequence[StagePlan]) -> StageScheduler:
    """
    A schedule over a whole run. A trainer alone does not know its tokens, if other stages have
    batches of other sizes.
    """
    return StageScheduler(inner=scheduler, stage=run_span(plans), over=run_span(plans))


def same_kind(one: OptimConfig, other: OptimConfig) -> bool:
    """Of optimizers of one kind state means the same, whatever their options are."""
    kinds = [(type(c), type(getattr(c, "rule_config", c))) for c in (one, other)]
    return kinds[0] == kinds[1]


def _name(optimizer: Dict[str, Any]) -> Any:
    """With those inside: what a wrapper keeps of its own is not all of its state."""
    inner = optimizer.get("inner")
    return optimizer.get("name"), _name(inner) if isinstance(inner, dict) else None
