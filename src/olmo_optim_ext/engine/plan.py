"""
What a rule for whole matrices knows of a parameter: its matrices, where their rows are, and who
computes each.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor

from .base import GroupWork, Member
from .factors import FactorPlan
from .layout import Block, MatrixLayout
from .placement import Path, Placing, element_index

__all__ = ["Item", "Job", "Plan", "items_of"]


@dataclass(frozen=True)
class Plan:
    """What does not change from step to step for a parameter."""

    layout: MatrixLayout
    placing: Placing
    blocks: Sequence[Tuple[int, Block]]
    """The matrices that the group has, with their index in the parameter."""
    owners: Sequence[int]
    """Rank in the group; empty where every rank computes all."""
    factors: FactorPlan

    def shape(self, block: Block) -> Tuple[int, int]:
        """``(out, in)`` of a matrix."""
        shape = (block.n_rows, block.n_cols)
        return shape[::-1] if self.layout.in_out else shape

    @cached_property
    def rows_on(self) -> List[Tuple[int, ...]]:
        """For each of :data:`blocks` how many of its rows each rank holds."""
        ends = list(accumulate([self.placing.first_row, *self.placing.rows_of]))
        return [
            tuple(
                max(0, min(end, block.first_row + block.n_rows) - max(first, block.first_row))
                for first, end in zip(ends, ends[1:])
            )
            for _, block in self.blocks
        ]

    @cached_property
    def sole_holders(self) -> List[Optional[int]]:
        """The rank that holds all rows of a matrix, if there is one: it needs no exchange."""
        if self.placing.path != Path.rows:
            return [None] * len(self.blocks)
        holders = [[rank for rank, n in enumerate(rows) if n] for rows in self.rows_on]
        return [ranks[0] if len(ranks) == 1 else None for ranks in holders]

    @cached_property
    def here(self) -> List[Tuple[slice, slice]]:
        """Where each matrix lies in what this rank has of the parameter, as ``(rows, cols)``."""
        out = []
        for k, (_, block) in enumerate(self.blocks):
            first, n = block.first_row, block.n_rows
            if self.placing.path == Path.rows:
                rank, held = dist.get_rank(self.placing.group), self.placing.rows_of
                first -= self.placing.first_row + sum(held[:rank])
                first, n = min(max(first, 0), held[rank]), self.rows_on[k][rank]
            cols = slice(block.first_col, block.first_col + block.n_cols)
            out.append((slice(first, first + n), cols))
        return out

    def index_at(self, places: torch.Tensor) -> torch.Tensor:
        """Which of :data:`blocks` elements belong to, from their places in the whole parameter."""
        if places.device not in self._ends:  # kept: a copy from the host would be a sync
            sizes = (self.layout.row_sizes, self.layout.col_sizes)
            self._ends[places.device] = [
                torch.tensor(list(accumulate(each)), device=places.device) for each in sizes
            ]
        row_ends, col_ends = self._ends[places.device]
        row = torch.bucketize(places // self.layout.cols, row_ends, right=True)
        col = torch.bucketize(places % self.layout.cols, col_ends, right=True)
        return row * len(col_ends) + col - self.blocks[0][0]

    @cached_property
    def _ends(self) -> Dict[torch.device, List[torch.Tensor]]:
        return {}

    @property
    def largest(self) -> int:
        """Elements of the largest of its matrices."""
        return max((block.numel for _, block in self.blocks), default=0)


@dataclass
class Job:
    """One parameter of a step."""

    work: GroupWork
    member: Member
    plan: Plan

    numbers: Optional[torch.Tensor] = None
    """Of each matrix that the group has, ``(n, s)``, if the rule measures any."""

    @property
    def group(self) -> Dict[str, Any]:
        return self.work.group

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """What is shaped like the parameter, or its local part, as ``(rows, cols)``."""
        cols = self.plan.layout.cols
        return x.view(x.numel() // cols, cols)

    def weights(self) -> torch.Tensor:
        """The local part of the parameter, as ``(rows, cols)``."""
        return self.view(get_local_tensor(self.member.param))

    def here(self, k: int) -> Tuple[slice, slice]:
        return self.plan.here[k]

    def numbers_at(self, begin: int, end: int) -> Optional[torch.Tensor]:
        """
        :data:`numbers` of the matrices to which some of the local elements belong: ``(s,)`` where
        there is one matrix, else ``(s, end - begin)``.
        """
        if self.numbers is None or len(self.numbers) == 1:
            return None if self.numbers is None else self.numbers[0]
        places = self._places
        if places.ndim == 0:  # of the first of consecutive elements
            places = torch.arange(begin, end, device=places.device) + places
        else:
            places = places[begin:end]
        return self.numbers[self.plan.index_at(places)].T

    @cached_property
    def _places(self) -> torch.Tensor:
        return element_index(self.member.param)


Item = Tuple[Job, int]
"""A parameter, and which of ``plan.blocks``."""


def items_of(jobs: Sequence[Job]) -> List[Item]:
    """All matrices of some parameters."""
    return [(job, k) for job in jobs for k in range(len(job.plan.blocks))]
