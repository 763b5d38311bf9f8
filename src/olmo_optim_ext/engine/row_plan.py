"""
Which rows and columns of a parameter's matrices a rank has, for rules that know these by numbers.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from olmo_core.exceptions import OLMoError

from .layout import Block, MatrixLayout
from .placement import local_ranges

__all__ = ["Piece", "RowLayout", "RowMatrix", "RowPlan", "RowSums", "plan_of"]


@dataclass(frozen=True)
class RowLayout:
    """The matrices of a parameter, and how many rows share a number."""

    layout: MatrixLayout

    shared_by: Tuple[int, ...] = ()
    """For each matrix of how many rows; 1 if it is not said. It divides them."""

    is_vector: bool = False
    """Whether it is no matrix, but a vector, of one row."""

    @cached_property
    def matrices(self) -> List["RowMatrix"]:
        blocks = self.layout.blocks()
        sizes = self.shared_by or (1,) * len(blocks)
        return [
            RowMatrix(*_shape(block, self.layout), n, self.is_vector)
            for block, n in zip(blocks, sizes)
        ]


class RowMatrix(NamedTuple):
    """A matrix, with its outputs as rows."""

    n_rows: int
    n_cols: int
    shared_by: int
    """How many rows share a number."""
    is_vector: bool


class RowSums(NamedTuple):
    """Sums of squares of a whole gradient, float64."""

    rows: torch.Tensor
    """``(n_rows,)``."""
    cols: Optional[torch.Tensor]
    """``(n_cols,)``, if the rule wants them."""


class Piece(NamedTuple):
    """The part of a matrix that this rank has."""

    matrix: int
    """Which of the parameter's."""
    rows: slice
    """In the local part of the parameter, seen as ``(rows, cols)``."""
    cols: slice
    first_row: int
    """In the matrix, with its outputs as rows."""
    first_col: int


def _shape(block: Block, layout: MatrixLayout) -> Tuple[int, int]:
    shape = (block.n_rows, block.n_cols)
    return shape[::-1] if layout.in_out else shape


@dataclass(frozen=True)
class RowPlan:
    """What does not change from step to step for a parameter."""

    layout: RowLayout
    pieces: Sequence[Piece]
    shape: Tuple[int, int]
    """Of the local part, as ``(rows, cols)``."""
    columns: bool
    """Whether there are sums of columns."""

    def view(self, x: torch.Tensor, piece: Piece) -> torch.Tensor:
        """A piece of the local part of a parameter, ``(rows, cols)`` with outputs as rows."""
        # Detached, because dynamo guards on the shape of what a tensor is a view of.
        part = x.view(self.shape)[piece.rows, piece.cols].detach()
        return part.mT if self.layout.layout.in_out else part

    @cached_property
    def sizes(self) -> List[int]:
        """Of the parts of the vector that is added over ranks: rows, columns of each matrix."""
        return [
            n
            for matrix in self.layout.matrices
            for n in ((matrix.n_rows, matrix.n_cols) if self.columns else (matrix.n_rows,))
        ]

    def split(self, flat: torch.Tensor) -> List[RowSums]:
        """The sums of each matrix, as views."""
        parts = flat[: sum(self.sizes)].split(self.sizes)
        if not self.columns:
            return [RowSums(rows, None) for rows in parts]
        return [RowSums(*pair) for pair in zip(parts[::2], parts[1::2])]


def plan_of(param: torch.Tensor, layout: Optional[RowLayout], columns: bool) -> RowPlan:
    if layout is None:
        is_vector = param.ndim < 2
        shape = (1, param.numel()) if is_vector else param.shape
        layout = RowLayout(MatrixLayout.whole(shape), is_vector=is_vector)
    rows, cols = _ids(param, layout.layout)
    pieces = []
    for index, block in enumerate(layout.layout.blocks()):
        its_rows = _held(rows, block.first_row, block.n_rows)
        its_cols = _held(cols, block.first_col, block.n_cols)
        if its_rows is None or its_cols is None:
            continue
        first = (rows[its_rows.start] - block.first_row, cols[its_cols.start] - block.first_col)
        first_row, first_col = reversed(first) if layout.layout.in_out else first
        pieces.append(Piece(index, its_rows, its_cols, int(first_row), int(first_col)))
    return RowPlan(layout, pieces, (len(rows), len(cols)), columns)


def _ids(param: torch.Tensor, layout: MatrixLayout) -> Tuple[np.ndarray, np.ndarray]:
    """Which rows and columns of the whole parameter this rank has, in order."""
    ranges = local_ranges(param)
    for k in range(param.ndim + 1):
        if math.prod(param.shape[:k]) == layout.rows:
            return _flat(ranges[:k], param.shape[:k]), _flat(ranges[k:], param.shape[k:])
    raise OLMoError(f"a parameter of shape {tuple(param.shape)} has no {layout.rows} rows")


def _flat(ranges: Sequence[Tuple[int, int]], shape: Sequence[int]) -> np.ndarray:
    ids = np.zeros(1, dtype=np.int64)
    for (first, n), size in zip(ranges, shape):
        ids = (ids[:, None] * size + np.arange(first, first + n)).reshape(-1)
    return ids


def _held(ids: np.ndarray, first: int, n: int) -> Optional[slice]:
    """Which of the sorted ids lie in a range; ``None`` if none."""
    begin, end = np.searchsorted(ids, [first, first + n])
    if begin == end:
        return None
    if ids[end - 1] - ids[begin] != end - begin - 1:
        raise OLMoError("the rows of a matrix that a rank has are not consecutive")
    return slice(int(begin), int(end))
