"""
Thin factors of matrices that ranks share: parts that each rank computed, added up by an owner, and
parts that each rank needs, sent by the owner.
"""

from dataclasses import dataclass
from typing import Dict, List, Mapping, Sequence, Tuple

import torch
import torch.distributed as dist

__all__ = ["Thin", "ThinExchange"]

Rows = Tuple[int, int]
"""First row and the row after the last."""


@dataclass(frozen=True)
class Thin:
    """A thin factor ``(rows, cols)``."""

    rows: int
    cols: int
    owner: int
    """A rank of the group."""
    sources: Sequence[Rows]
    """Of which rows each rank of the group has a summand."""
    targets: Sequence[Rows]
    """Which rows each rank of the group needs."""


class ThinExchange:
    """
    Moves thin factors between the ranks of a group and their owners, all in one exchange.

    :param factors: The factors, in the same order on all ranks.
    """

    def __init__(self, factors: Sequence[Thin], group: dist.ProcessGroup):
        self.factors = list(factors)
        self.group = group
        self.rank = dist.get_rank(group)
        self._ranks = range(dist.get_world_size(group))
        self._owned_by = [
            [i for i, factor in enumerate(self.factors) if factor.owner == rank]
            for rank in self._ranks
        ]

    def collect(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> Dict[int, torch.Tensor]:
        """
        :param parts: For each factor this rank's summand, ``(rows of its source, cols)``.
        :param like: Gives dtype and device.

        :returns: The sums of the factors that this rank owns, added in the order of ranks.
        """
        mine = self._owned_by[self.rank]
        sends = [[parts[i] for i in owned] for owned in self._owned_by]
        shapes = [
            [(i, _shape(self.factors[i].sources[rank], self.factors[i].cols)) for i in mine]
            for rank in self._ranks
        ]
        received = self._exchange(sends, shapes, like)
        out: Dict[int, torch.Tensor] = {}
        for (rank, i), part in received.items():
            factor = self.factors[i]
            if i not in out:
                out[i] = like.new_zeros(factor.rows, factor.cols)
            begin, end = factor.sources[rank]
            out[i][begin:end] += part
        return out

    def spread(self, wholes: Mapping[int, torch.Tensor], like: torch.Tensor) -> List[torch.Tensor]:
        """
        :param wholes: The factors that this rank owns.

        :returns: For each factor the rows that this rank needs, ``(rows of its target, cols)``.
        """
        mine = self._owned_by[self.rank]
        sends = [
            [wholes[i][slice(*self.factors[i].targets[rank])] for i in mine] for rank in self._ranks
        ]
        shapes = [
            [(i, _shape(self.factors[i].targets[self.rank], self.factors[i].cols)) for i in owned]
            for owned in self._owned_by
        ]
        received = self._exchange(sends, shapes, like)
        return [received[factor.owner, i] for i, factor in enumerate(self.factors)]

    def _exchange(
        self,
        sends: Sequence[Sequence[torch.Tensor]],
        shapes: Sequence[Sequence[Tuple[int, Tuple[int, int]]]],
        like: torch.Tensor,
    ) -> Dict[Tuple[int, int], torch.Tensor]:
        """
        :param sends: For each rank what goes there.
        :param shapes: For each rank which factors come from there, and their shapes.

        :returns: What came, by rank and factor.
        """
        flat = [part.reshape(-1) for parts in sends for part in parts]
        send = torch.cat([like.new_empty(0), *flat])
        counts = [sum(n * cols for _, (n, cols) in each) for each in shapes]
        received = like.new_empty(sum(counts))
        dist.all_to_all_single(
            received, send, counts, [sum(p.numel() for p in parts) for parts in sends], self.group
        )
        out, offset = {}, 0
        for rank, each in enumerate(shapes):
            for i, (n, cols) in each:
                out[rank, i] = received[offset : offset + n * cols].view(n, cols)
                offset += n * cols
        return out


def _shape(rows: Rows, cols: int) -> Tuple[int, int]:
    return rows[1] - rows[0], cols
