"""
Dion: momentum, orthonormalised in a subspace that follows it (Ahn et al., arXiv:2504.05295,
algorithm 1), as Optax transformations.
"""

import functools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import orthonormal
from .keys import Key, impl_of, stream, typed_key
from .matrices import (
    Matrix,
    Parameter,
    WeightDimNumOrFn,
    matrix_dimension_numbers,
    parameters_of,
)
from .sharded import beside, contract, explicit_sharding, like_axes, reshard

__all__ = ["ScaleByDionState", "dion", "scale_by_dion"]

ROUNDING = 64
"""Columns of ``R`` that are shorter than this many roundings of the longest are taken for zero."""

RANGES: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "momentum_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "rank_fraction": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "rank_multiple_of": (lambda x: x >= 1 and x % 1 == 0, "an integer >= 1"),
    "eps": (lambda x: x > 0, "> 0"),
}

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


class ScaleByDionState(NamedTuple):
    """State of :func:`scale_by_dion`: arrays, of shapes that never change."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32. Steps so far.
    momentum: optax.Updates  # Like the parameters.
    basis: optax.Updates  # V: axes of the stack, axes of the shorter side, r.
    key: jax.Array  # Of the sketches, as jax.random.key_data has it: checkpointers can save it.


def scale_by_dion(
    momentum_decay: jax.typing.ArrayLike = 0.95,
    rank_fraction: float = 0.25,
    rank_multiple_of: int = 1,
    eps: jax.typing.ArrayLike = 1e-8,
    orthonormalize: orthonormal.Method = "rcqr",
    key: Key = 0,
    momentum_dtype: Optional[jax.typing.DTypeLike] = None,
    basis_dtype: Optional[jax.typing.DTypeLike] = None,
    *,
    weight_dimension_numbers: Optional[WeightDimNumOrFn] = None,
) -> optax.GradientTransformation:
    r"""Rescale updates of matrices according to the Dion algorithm.

    Dion keeps a momentum :math:`M` and a basis :math:`V` of rank :math:`r` for its right singular
    vectors, which each step brings nearer to them by one power iteration. It steps along the
    momentum within that subspace, orthonormalised, and takes a share of this part only out of the
    momentum, so that what the subspace misses stays there until it is seen (error feedback):

    .. math::
      B &= M + G \\
      P &= \text{orthonormal}(B V), \quad R = B^T P \\
      M &\leftarrow B - (1 - \mu) P R^T \\
      V_j &\leftarrow R_j / (\|R_j\| + \epsilon) \\
      U &= \sqrt{n_{out} / n_{in}} \, P V^T

    Columns of :math:`R` that are rounding, shorter than 64 times the precision of the longest,
    become zero, where the authors divide by their lengths; where :math:`B` is zero the update is
    zero, and :math:`V` stays.

    The matrix is that of shape :math:`(n_{out}, n_{in})` or, if it is wide, its transpose, so that
    :math:`P` has the longer side. It is only ever multiplied by matrices of rank :math:`r`: where
    it is sharded, no device needs the whole of it, but for :math:`r` near full, at which :math:`P`
    is as large. Call ``init`` outside of ``jit`` with sharded parameters: the momentum is sharded
    as its parameter, the basis as that parameter's shorter side. Under ``jit`` that needs
    ``out_shardings``, as with other transformations, or a mesh of ``Explicit`` axes that
    ``jax.set_mesh`` has set.

    All products are made in float32 at least, also for bfloat16 parameters, and ask for the highest
    precision. This was run on CPU, with one and with eight devices, on no accelerator and in one
    process only.

    Args:
      momentum_decay: :math:`\mu` in [0, 1). Of what a step applies, a share of
        ``1 - momentum_decay`` is taken out of the momentum, which has no other decay.
      rank_fraction: Rank of the update, as a share of the smaller side of a matrix, in (0, 1]. It
        decides shapes, so it cannot be a schedule.
      rank_multiple_of: The rank is rounded up to a multiple of this, at most the smaller side.
      eps: Added to the length of each column of ``R``, > 0.
      orthonormalize: ``"rcqr"``, randomised Cholesky QR, ``"cqr"``, Cholesky QR twice, or ``"qr"``,
        Householder QR. They agree to rounding, and the third stands in where the others fail.
      key: PRNG key, or a seed, of the first bases and the sketches. They depend on it, the step and
        the path of the parameter, and not on other parameters or the mesh.
      momentum_dtype: Of the momentum; ``None`` takes that of the parameter.
      basis_dtype: Of the basis; ``None`` takes that of the parameter, but float32 for shorter ones.
      weight_dimension_numbers: Which axes of the parameters make a matrix, as for
        :func:`optax.contrib.scale_by_muon`: ``optax.contrib.MuonDimensionNumbers`` for all, or a
        tree of them, or a function from parameters to such a tree. Matrices are stacked along the
        other axes. ``None`` stands for two-dimensional parameters ``(in, out)``, as Flax and Haiku
        keep them.

    Returns:
      The corresponding :class:`optax.GradientTransformation`.

    Raises:
      ValueError: If a value is out of its range, unless it is traced, or a parameter is no matrix:
        use :func:`dion`, or leave it out with :func:`optax.masked`.

    References:
      Ahn et al., `Dion: Distributed Orthonormalized Updates
      <https://arxiv.org/abs/2504.05295>`_, 2025
    """
    _check("momentum_decay", momentum_decay)
    _check("rank_fraction", rank_fraction)
    _check("rank_multiple_of", rank_multiple_of)
    _check("eps", eps)
    if orthonormalize not in orthonormal.METHODS:
        allowed = ", ".join(orthonormal.METHODS)
        raise ValueError(f"orthonormalize is {orthonormalize!r}, and must be one of {allowed}")
    if momentum_dtype is not None:
        _check_dtype("momentum_dtype", momentum_dtype, FLOATS)
    if basis_dtype is not None:
        # Of a gradient below 1e-15 float16 would keep a basis of zeros, for good.
        _check_dtype("basis_dtype", basis_dtype, (jnp.bfloat16, jnp.float32, jnp.float64))
    key_impl = impl_of(key)

    def matrices(tree: Any) -> List[Tuple[str, Matrix]]:
        found: List[Parameter] = jax.tree.leaves(parameters_of(weight_dimension_numbers, tree))
        for parameter in found:
            if parameter.matrix is None:
                raise ValueError(
                    f"the parameter {parameter.name} is no matrix: declare its axes in "
                    f"weight_dimension_numbers, leave it out with optax.masked, or use dion"
                )
        return [(parameter.name, parameter.matrix) for parameter in found if parameter.matrix]

    def init_fn(params: optax.Params) -> ScaleByDionState:
        leaves, tree = jax.tree.flatten(params)
        fraction = _static("rank_fraction", rank_fraction)
        multiple_of = _static("rank_multiple_of", rank_multiple_of)
        root = typed_key(key)
        momenta, bases = [], []
        for (name, matrix), param in zip(matrices(params), leaves):
            _check_dtype(f"the dtype of the parameter {name}", param.dtype, FLOATS)
            dtype = param.dtype if momentum_dtype is None else momentum_dtype
            momenta.append(jnp.zeros_like(param, dtype=dtype))
            dtype = _wide(param.dtype) if basis_dtype is None else basis_dtype
            axes = matrix.batch + matrix.shorter
            shape = (*matrix.sizes(axes), _thin_rank(fraction, int(multiple_of), matrix))
            basis = _gaussian(stream(root, 0, name), shape, jnp.dtype(dtype))
            bases.append(like_axes(basis, param, (*axes, None)))
        state = ScaleByDionState(
            count=jnp.zeros([], jnp.int32),
            momentum=jax.tree.unflatten(tree, momenta),
            basis=jax.tree.unflatten(tree, bases),
            # A copy, as a donated state is deleted.
            key=jnp.array(jax.random.key_data(root), copy=True),
        )
        return beside(state, params)

    def update_fn(
        updates: optax.Updates, state: ScaleByDionState, params: Optional[optax.Params] = None
    ) -> Tuple[optax.Updates, ScaleByDionState]:
        del params
        tree: Any = jax.tree.structure(updates)
        count = optax.safe_increment(state.count)
        root = jax.random.wrap_key_data(state.key, impl=key_impl)
        leaves = zip(
            matrices(updates),
            jax.tree.leaves(updates),
            tree.flatten_up_to(state.momentum),
            tree.flatten_up_to(state.basis),
        )
        done = []
        for (name, matrix), *arrays in leaves:
            sketch_key = stream(root, count, name)
            done.append(_step(matrix, orthonormalize, sketch_key, *arrays, 1 - momentum_decay, eps))
        updates, momentum, basis = (tree.unflatten([one[i] for one in done]) for i in range(3))
        return updates, ScaleByDionState(count, momentum, basis, state.key)

    return optax.GradientTransformation(init_fn, update_fn)


# Compiled by itself where an update is not: matrices of one shape share it.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    matrix: Matrix,
    method: orthonormal.Method,
    key: jax.Array,
    grad: jax.Array,
    momentum: jax.Array,
    basis: jax.Array,
    subtracted: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> Tuple[jax.Array, jax.Array, jax.Array]:
    """Of one parameter: the update, the new momentum and the new basis."""
    dtype = jnp.promote_types(_wide(grad.dtype), momentum.dtype)
    subtracted, eps = jnp.asarray(subtracted, dtype), jnp.asarray(eps, dtype)
    # Letters of the axes of the parameter, of P and of R and V.
    whole = matrix.labels()
    left = matrix.labels(matrix.batch + matrix.longer) + "R"
    right = matrix.labels(matrix.batch + matrix.shorter) + "R"

    b = momentum.astype(dtype) + grad.astype(dtype)
    v = basis.astype(dtype)
    p = _orthonormal(contract(f"{whole},{right}->{left}", b, v), matrix, method, key)
    r = contract(f"{whole},{left}->{right}", b, p)
    kept = b - subtracted * contract(f"{left},{right}->{whole}", p, r)
    v = _next_basis(r, v, eps, len(matrix.batch))
    scale = math.sqrt(matrix.n_out / matrix.n_in)
    update = scale * contract(f"{left},{right}->{whole}", p, v)
    return update.astype(grad.dtype), kept.astype(momentum.dtype), v.astype(basis.dtype)


def _orthonormal(
    x: jax.Array, matrix: Matrix, method: orthonormal.Method, key: jax.Array
) -> jax.Array:
    """``P``, in the shape of ``x``: axes of the stack, those of the longer side, ``r``."""
    sharding = explicit_sharding(x)
    n_batch = len(matrix.batch)
    if sharding is not None and any(sharding.spec[n_batch + 1 : -1]):
        # These axes become one: its rows on a device would be no range of rows.
        whole = [*sharding.spec[:n_batch], *(None for _ in matrix.longer), None]
        x = reshard(x, sharding, whole)
    rows = math.prod(matrix.sizes(matrix.longer))
    flat = x.reshape(*matrix.sizes(matrix.batch), rows, x.shape[-1])
    p = orthonormal.orthonormalize(flat, method, key).reshape(x.shape)
    return p if sharding is None else reshard(p, sharding, sharding.spec)


def _next_basis(
    r: jax.Array, basis: jax.Array, eps: jax.typing.ArrayLike, n_batch: int
) -> jax.Array:
    """``R`` with columns of about unit length."""
    rows = tuple(range(n_batch, r.ndim - 1))
    top = jnp.max(jnp.abs(r), axis=rows, keepdims=True)
    # No square overflows or is lost.
    safe = jnp.where(top > 0, top, 1)
    lengths = top * jnp.sqrt(jnp.sum(jnp.square(r / safe), axis=rows, keepdims=True))
    longest = jnp.max(lengths, axis=-1, keepdims=True)
    # Of a direction that M does not have R is rounding, which must not grow to unit length.
    there = lengths > ROUNDING * jnp.finfo(r.dtype).eps * longest
    normed = jnp.where(there, r / (lengths + eps), 0)
    # Where M is zero, P and R are, and the basis stays.
    return jnp.where(longest > 0, normed, basis)


def dion(
    learning_rate: optax.ScalarOrSchedule,
    momentum_decay: jax.typing.ArrayLike = 0.95,
    rank_fraction: float = 0.25,
    rank_multiple_of: int = 1,
    eps: jax.typing.ArrayLike = 1e-8,
    orthonormalize: orthonormal.Method = "rcqr",
    key: Key = 0,
    momentum_dtype: Optional[jax.typing.DTypeLike] = None,
    basis_dtype: Optional[jax.typing.DTypeLike] = None,
    weight_decay: jax.typing.ArrayLike = 0.01,
    weight_decay_mask: Optional[Union[Any, Callable[[optax.Params], Any]]] = None,
    scalar_optimizer: Optional[optax.GradientTransformation] = None,
    *,
    weight_dimension_numbers: Optional[WeightDimNumOrFn] = None,
) -> optax.GradientTransformation:
    r"""Dion for matrices, and another optimizer for vectors, scalars, embeddings and the head.

    For the algorithm and the arguments that are not here see :func:`scale_by_dion`.

    :func:`optax.inject_hyperparams` takes functions for schedules: name
    ``weight_dimension_numbers``, ``weight_decay_mask``, ``momentum_dtype`` and ``basis_dtype`` in
    its ``static_args`` where you give them. For ``init`` under ``jit`` name ``rank_fraction`` and
    ``rank_multiple_of``, too.

    Args:
      learning_rate: A number or a schedule. One that suits AdamW, or a few times that.
      weight_decay: Decoupled, times the learning rate.
      weight_decay_mask: Tree of booleans, or a prefix of one, or a function from parameters to such
        a tree, of what is to decay.
      scalar_optimizer: For the parameters that are no matrices, with a learning rate of its own.
        ``None`` stands for ``optax.adamw(learning_rate, b2=0.95)`` with the same weight decay and
        mask.
      weight_dimension_numbers: Which axes of which parameters make a matrix, and ``None`` for what
        is left to ``scalar_optimizer``: a tree of ``optax.contrib.MuonDimensionNumbers``, or a
        prefix of one, or a function from parameters to such a tree. ``None`` stands for
        :func:`matrix_dimension_numbers`.

    Returns:
      The corresponding :class:`optax.GradientTransformation`.

    Raises:
      ValueError: If a value is out of its range, or axes do not fit a parameter.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from olmo_optim_ext.jax import dion
      >>> target = jnp.outer(jnp.linspace(0.0, 1.0, 8), jnp.ones(6))
      >>> loss = lambda params: jnp.mean((params["kernel"] + params["bias"] - target) ** 2)
      >>> params = {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}
      >>> optimizer = dion(optax.linear_schedule(0.1, 0.0, 100), rank_fraction=0.5)
      >>> state = optimizer.init(params)
      >>> for _ in range(100):
      ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-3)
      True

    References:
      Ahn et al., `Dion: Distributed Orthonormalized Updates
      <https://arxiv.org/abs/2504.05295>`_, 2025
    """
    if weight_dimension_numbers is None:
        weight_dimension_numbers = matrix_dimension_numbers

    def labels(params: optax.Params) -> Any:
        found = parameters_of(weight_dimension_numbers, params)
        return jax.tree.map(lambda x: "dion" if x.matrix else "scalar", found)

    if scalar_optimizer is None:
        scalar_optimizer = optax.adamw(
            learning_rate, b2=0.95, weight_decay=weight_decay, mask=weight_decay_mask
        )
    matrix_optimizer = optax.chain(
        scale_by_dion(
            momentum_decay=momentum_decay,
            rank_fraction=rank_fraction,
            rank_multiple_of=rank_multiple_of,
            eps=eps,
            orthonormalize=orthonormalize,
            key=key,
            momentum_dtype=momentum_dtype,
            basis_dtype=basis_dtype,
            weight_dimension_numbers=weight_dimension_numbers,
        ),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    both = optax.partition({"dion": matrix_optimizer, "scalar": scalar_optimizer}, labels)
    return optax.GradientTransformationExtraArgs(
        lambda params: beside(both.init(params), params), both.update
    )


def _thin_rank(fraction: float, multiple_of: int, matrix: Matrix) -> int:
    """``r``: a fraction of the smaller side, rounded up to a multiple, at most that side."""
    smaller = min(matrix.n_out, matrix.n_in)
    return min(smaller, multiple_of * math.ceil(fraction * smaller / multiple_of))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gaussian(key: jax.Array, shape: Tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jax.random.normal(key, shape, _wide(dtype)).astype(dtype)


def _wide(dtype: jax.typing.DTypeLike) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _check(name: str, value: Any) -> None:
    """What is an array is traced, or may be on a device that has yet to compute it."""
    fits, allowed = RANGES[name]
    if callable(value):
        raise ValueError(f"{name} is a function, and must be a number {allowed}")
    if isinstance(value, (int, float, np.number)) and not fits(value):
        raise ValueError(f"{name} is {value}, and must be {allowed}")


def _check_dtype(name: str, dtype: Any, allowed: Sequence[Any]) -> None:
    if not any(jnp.dtype(dtype) == each for each in allowed):
        names = ", ".join(jnp.dtype(each).name for each in allowed)
        raise ValueError(f"{name} is {jnp.dtype(dtype)}, and must be one of {names}")


def _static(name: str, value: Any) -> float:
    """A number that decides shapes."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} decides shapes, and is traced: name it in static_args of inject_hyperparams"
        )
    number = _from_array(value) if isinstance(value, jax.Array) else float(value)
    _check(name, number)
    return number


def _from_array(value: jax.Array) -> float:
    # As inject_hyperparams makes it, of fewer digits: the simplest fraction that rounds to it.
    rounding = float(jnp.finfo(value.dtype).eps) if jnp.issubdtype(value.dtype, jnp.floating) else 0
    x = float(value)
    for below in range(1, 1000):
        if abs(round(x * below) / below - x) <= rounding / 2 * abs(x):
            return round(x * below) / below
    return x
