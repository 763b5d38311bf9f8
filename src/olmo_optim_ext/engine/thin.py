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

    def collect(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> Dict[int, torch.Tensor]:
        """
        :param parts: For each factor this rank's summand, ``(rows of its source, cols)``.
        :param like: Gives dtype and device.

        :returns: The sums of the factors that this rank owns, added in the order of ranks.
        """
        received = self._exchange(parts, [factor.sources for factor in self.factors], True, like)
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
        mine = [wholes.get(i, like.new_empty(0)) for i in range(len(self.factors))]
        targets = [factor.targets for factor in self.factors]
        received = self._exchange(mine, targets, False, like)
        return [received[factor.owner, i] for i, factor in enumerate(self.factors)]

    def _exchange(
        self,
        tensors: Sequence[torch.Tensor],
        rows: Sequence[Sequence[Rows]],
        to_owners: bool,
        like: torch.Tensor,
    ) -> Dict[Tuple[int, int], torch.Tensor]:
        """What each rank sent here of each factor, by rank and factor."""
        sends: List[List[torch.Tensor]] = []
        shapes: List[List[Tuple[int, Tuple[int, int]]]] = []
        for rank in self._ranks:
            sends.append([])
            shapes.append([])
            for i, factor in enumerate(self.factors):
                (mine, its), cols = (rows[i][self.rank], rows[i][rank]), factor.cols
                if to_owners:
                    sent, coming = factor.owner == rank, factor.owner == self.rank
                    tensor, shape = tensors[i], (its[1] - its[0], cols)
                else:
                    sent, coming = factor.owner == self.rank, factor.owner == rank
                    tensor, shape = tensors[i][slice(*its)], (mine[1] - mine[0], cols)
                if sent:
                    sends[-1].append(tensor.reshape(-1))
                if coming:
                    shapes[-1].append((i, shape))
        send = torch.cat([like.new_empty(0), *(part for parts in sends for part in parts)])
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
