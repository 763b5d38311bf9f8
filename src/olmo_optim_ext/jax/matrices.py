"""
Which parameters are matrices, and along which of their axes.
"""

import math
import re
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, Callable, Optional, Sequence, Tuple, Union

import jax
import optax
from optax.contrib import MuonDimensionNumbers

__all__ = ["Matrix", "Parameter", "WeightDimNumOrFn", "matrix_dimension_numbers", "parameters_of"]

WeightDimNumOrFn = Union[MuonDimensionNumbers, Any, Callable[[optax.Params], Any]]

_NO_MATRIX = re.compile(
    r"embed|(^|_)emb(_|$)|^w[tp]e$"
    r"|(^|_)head(_\d+)?$|^lmhead$|(^|_)logits(_\d+)?$|^classifier(_\d+)?$"
    r"|^(bias|scale|offset|beta|gamma)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Matrix:
    """A parameter as a stack of matrices ``(out, in)``, each of which several axes may make."""

    shape: Tuple[int, ...]
    """Of the parameter."""

    inputs: Tuple[int, ...]
    """Axes that are summed over where the layer is applied."""

    outputs: Tuple[int, ...]
    """Axes that its result has."""

    @property
    def n_in(self) -> int:
        return math.prod(self.sizes(self.inputs))

    @property
    def n_out(self) -> int:
        return math.prod(self.sizes(self.outputs))

    @property
    def longer(self) -> Tuple[int, ...]:
        """Axes of the longer side; of a square matrix the outputs."""
        return self.inputs if self.n_in > self.n_out else self.outputs

    @property
    def shorter(self) -> Tuple[int, ...]:
        return self.outputs if self.n_in > self.n_out else self.inputs

    @property
    def batch(self) -> Tuple[int, ...]:
        """Axes over which matrices are stacked."""
        matrix = (*self.inputs, *self.outputs)
        return tuple(axis for axis in range(len(self.shape)) if axis not in matrix)

    def labels(self, axes: Optional[Sequence[int]] = None) -> str:
        """A letter for each of these axes, or for all, as einsum wants them."""
        axes = range(len(self.shape)) if axes is None else axes
        return "".join(ascii_lowercase[axis] for axis in axes)

    def sizes(self, axes: Sequence[int]) -> Tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def matrix_dimension_numbers(params: optax.Params) -> Any:
    """Axes of the parameters that Dion is for: the default of :func:`dion`.

    These are arrays ``(in, out)``, neither of them 1, that are no embedding, no output head and no
    biases or scales, which have two axes where they are stacked ``(layers, width)`` or per head
    ``(heads, head_dim)``. They are known by the names on the way to the parameter, cut at ``/`` and
    ``.``: ``bias``, ``scale``, ``offset``, ``beta``, ``gamma``; ``wte``, ``wpe``, what contains
    ``embed``, or ``emb`` between underscores; ``lmhead``, ``classifier``, ``head``, ``logits``, and
    what ends in ``_head`` or ``_logits``, perhaps with a number. A head of another name has to be
    told: with Dion it trains badly.

    Args:
      params: Parameters, or anything with shapes in their tree.

    Returns:
      The tree, with ``optax.contrib.MuonDimensionNumbers()`` for matrices and ``None`` for others.

    Examples:
      Attention in Flax has kernels of three axes, and layers under ``nn.scan`` are stacked. Those
      who keep ``(out, in)``, such as Equinox, declare ``MuonDimensionNumbers(1, 0)``::

        def axes_of(params):
            axes = matrix_dimension_numbers(params)
            axes["attention"]["query"]["kernel"] = MuonDimensionNumbers(0, (1, 2))
            axes["attention"]["out"]["kernel"] = MuonDimensionNumbers((0, 1), 2)
            axes["layers"]["up"]["kernel"] = MuonDimensionNumbers(1, 2)  # (layers, in, out)
            return axes

        optimizer = dion(0.01, weight_dimension_numbers=axes_of)

      ``MuonDimensionNumbers(0, 2)`` of a query takes each head for a matrix of its own.
    """

    def of_leaf(path: Any, leaf: Any) -> Optional[MuonDimensionNumbers]:
        names = (name for key in path for name in re.split("[/.]", _name(key)))
        named = any(map(_NO_MATRIX.search, names))
        shape = _shape(leaf)
        is_matrix = len(shape) == 2 and min(shape) > 1 and not named
        return MuonDimensionNumbers() if is_matrix else None

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _name(key: Any) -> str:
    """Of an entry of a path."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


@dataclass(frozen=True)
class Parameter:
    name: str
    """Its path."""

    matrix: Optional[Matrix]
    """``None`` if it is none."""


def parameters_of(spec: Optional[WeightDimNumOrFn], params: optax.Params) -> Any:
    """
    A tree like ``params`` with a :class:`Parameter` for each.

    :param spec: Dimension numbers of all, or a tree of them with ``None`` for what is no matrix,
        which may be a prefix, or a function from parameters to such a tree. ``None`` stands for
        two-dimensional ones.

    :raises ValueError: If they do not fit the parameters.
    """
    if callable(spec) and jax.tree_util.all_leaves([spec]):
        spec = spec(params)

    paths = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    if spec is None:
        return jax.tree.map(lambda x, path: _parameter(x, _of_two_axes(x), path), params, paths)

    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, MuonDimensionNumbers)

    # First whether the trees fit, then the rest, so that errors keep their words.
    def below(dims: Any, params: Any, paths: Any) -> Any:
        return jax.tree.map(lambda x, path: lambda: _parameter(x, dims, path), params, paths)

    try:
        fitted = jax.tree.map(below, spec, params, paths, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"weight_dimension_numbers is no prefix of the tree of parameters: {error}"
        ) from error
    return jax.tree.map(lambda parameter: parameter(), fitted)


def _of_two_axes(x: Any) -> Optional[MuonDimensionNumbers]:
    return MuonDimensionNumbers() if len(_shape(x)) == 2 else None


def _parameter(x: Any, dims: Any, path: str) -> Parameter:
    shape = _shape(x)
    if dims is None:
        return Parameter(path, None)
    if not isinstance(dims, MuonDimensionNumbers):
        raise ValueError(
            f"weight_dimension_numbers has {dims!r} for the parameter {path}, and must have "
            f"MuonDimensionNumbers or None"
        )
    inputs, outputs = (_axes(axes, len(shape)) for axes in dims)
    named = (*inputs, *outputs)
    if not inputs or not outputs or len(set(named)) < len(named) or None in named:
        raise ValueError(
            f"{dims} does not fit the parameter {path} of shape {shape}: reduction_axis and "
            f"output_axis must name different axes of it"
        )
    if 0 in shape:
        raise ValueError(f"the parameter {path} of shape {shape} has no elements")
    return Parameter(path, Matrix(shape, inputs, outputs))


def _shape(x: Any) -> Tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))


def _axes(axes: Any, ndim: int) -> Tuple[Any, ...]:
    """None for an axis that there is not."""
    several = (axes,) if hasattr(axes, "__index__") else tuple(axes)
    return tuple(int(axis) % ndim if -ndim <= axis < ndim else None for axis in several)
