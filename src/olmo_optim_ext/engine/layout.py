"""
Which matrices a parameter stores, and where.
"""

import math
from dataclasses import dataclass, replace
from typing import List, NamedTuple, Sequence, Tuple

__all__ = ["Block", "MatrixLayout"]


class Block(NamedTuple):
    """The place of one matrix in the two-dimensional view of its parameter."""

    first_row: int
    n_rows: int
    first_col: int
    n_cols: int

    @property
    def numel(self) -> int:
        return self.n_rows * self.n_cols


@dataclass(frozen=True)
class MatrixLayout:
    """
    A parameter, seen as ``(rows, cols)``, as a grid of matrices.

    Leading dimensions of stacks are rows: ``(experts, out, in)`` is seen as
    ``(experts * out, in)``. Trailing dimensions of convolutions are columns: ``(out, in, height,
    width)`` is seen as ``(out, in * height * width)``.
    """

    row_sizes: Tuple[int, ...]
    """Rows of the matrices, from top to bottom."""

    col_sizes: Tuple[int, ...]
    """Columns of the matrices, from left to right."""

    in_out: bool = False
    """Whether rows are inputs and columns outputs, the other way round than in ``nn.Linear``."""

    @classmethod
    def whole(cls, shape: Sequence[int], in_out: bool = False) -> "MatrixLayout":
        """One matrix; dimensions after the first are columns."""
        return cls((shape[0],), (math.prod(shape[1:]),), in_out)

    @classmethod
    def stacked(cls, shape: Sequence[int], n: int, in_out: bool = False) -> "MatrixLayout":
        """``n`` matrices of one shape on top of each other; the last dimension is columns."""
        rows = math.prod(shape[:-1])
        return cls((rows // n,) * n, (shape[-1],), in_out)

    @classmethod
    def side_by_side(cls, shape: Sequence[int], n: int, in_out: bool = False) -> "MatrixLayout":
        """``n`` matrices of one shape beside each other in a ``(rows, cols)`` parameter."""
        rows, cols = shape
        return cls((rows,), (cols // n,) * n, in_out)

    @property
    def rows(self) -> int:
        return sum(self.row_sizes)

    @property
    def cols(self) -> int:
        return sum(self.col_sizes)

    @property
    def out_sizes(self) -> Tuple[int, ...]:
        """Outputs of the matrices along the axis of outputs."""
        return self.col_sizes if self.in_out else self.row_sizes

    @property
    def smallest_dim(self) -> int:
        """Of all matrices."""
        return min(self.row_sizes + self.col_sizes)

    def split_outputs(self, sizes: Sequence[int]) -> "MatrixLayout":
        """
        Each matrix split into several, along its outputs.

        :param sizes: Outputs of each; they add up to those of every matrix.
        """
        split = tuple(sizes) * len(self.out_sizes)
        return replace(self, col_sizes=split) if self.in_out else replace(self, row_sizes=split)

    def split(self, size: int) -> "MatrixLayout":
        """Each matrix split into blocks of at most this many rows and columns."""

        def parts(sizes: Tuple[int, ...]) -> Tuple[int, ...]:
            return tuple(min(size, n - i) for n in sizes for i in range(0, n, size))

        return replace(self, row_sizes=parts(self.row_sizes), col_sizes=parts(self.col_sizes))

    def blocks(self) -> List[Block]:
        """The place of each matrix, row by row of the grid."""
        out = []
        first_row = 0
        for n_rows in self.row_sizes:
            first_col = 0
            for n_cols in self.col_sizes:
                out.append(Block(first_row, n_rows, first_col, n_cols))
                first_col += n_cols
            first_row += n_rows
        return out
