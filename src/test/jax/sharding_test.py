"""
Dion on parameters that are divided over devices: the same result as on one, with nothing compiled
in later steps, and without a matrix in one place.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from olmo_optim_ext.jax import (
    ScaleByDionState,
    dion,
    matrix_dimension_numbers,
    orthonormalize,
    scale_by_dion,
)
from olmo_optim_ext.jax.matrices import Matrix, parameters_of
from olmo_optim_ext.jax.orthonormal import sketch_rows

from .collectives import Collective, collectives
from .compilations import compilations

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="what is asked of JAX here is there from 0.7.1 on"
)

STEPS = 10
RANK_FRACTION = 1 / 8


@dataclass(frozen=True)
class Problem:
    shape: Tuple[int, ...]
    dims: MuonDimensionNumbers = field(default_factory=MuonDimensionNumbers)
    method: str = "rcqr"

    @property
    def matrix(self) -> Matrix:
        return parameters_of(self.dims, jnp.zeros(self.shape)).matrix

    def optimizer(self) -> optax.GradientTransformation:
        return scale_by_dion(
            rank_fraction=RANK_FRACTION,
            orthonormalize=self.method,  # type: ignore[arg-type]
            weight_dimension_numbers=self.dims,
        )


@dataclass(frozen=True)
class Layout:
    problem: Problem
    mesh: Tuple[int, ...]
    spec: P

    def devices(self, axes: Tuple[int, ...]) -> int:
        """Over which these axes of the parameter are divided."""
        sizes = dict(zip("xy", self.mesh))
        named = [self.spec[axis] or () for axis in axes if axis < len(self.spec)]
        return math.prod(sizes[name] for names in named for name in names)


TALL, WIDE, SMALL = Problem((256, 64)), Problem((64, 256)), Problem((64, 32))
HEADS = Problem((32, 8, 32), MuonDimensionNumbers(0, (1, 2)))
EXPERTS = MuonDimensionNumbers(1, 2)

# The sketch has 128 rows: what is shorter is done by Householder QR.
LAYOUTS = {
    "tall, rows": Layout(TALL, (8,), P("x", None)),
    "tall, columns": Layout(TALL, (8,), P(None, "x")),
    "tall, rows, two replicas": Layout(TALL, (2, 4), P("y", None)),
    "wide, both": Layout(WIDE, (2, 4), P("x", "y")),
    "square, both": Layout(Problem((192, 192)), (2, 4), P("y", "x")),
    "small, both": Layout(SMALL, (2, 4), P("x", "y")),
    "small, rows over both axes of the mesh": Layout(SMALL, (2, 4), P(("x", "y"), None)),
    "cqr, both": Layout(Problem((256, 64), method="cqr"), (2, 4), P("x", "y")),
    "qr, both": Layout(Problem((256, 64), method="qr"), (2, 4), P("y", "x")),
    "experts": Layout(Problem((8, 16, 32), EXPERTS), (8,), P("x", None, None)),
    "experts and outputs": Layout(Problem((4, 32, 256), EXPERTS), (2, 4), P("x", None, "y")),
    "small experts, sides": Layout(Problem((3, 64, 16), EXPERTS), (2, 4), P(None, "y", "x")),
    "inputs and heads": Layout(HEADS, (2, 4), P("x", "y", None)),
    "within heads": Layout(HEADS, (8,), P(None, None, "x")),
    "heads of the shorter side": Layout(
        Problem((64, 8, 4), MuonDimensionNumbers(0, (1, 2))), (2, 4), P("x", "y", None)
    ),
    "heads and within them": Layout(
        Problem((8, 32, 16), MuonDimensionNumbers((0, 1), 2)), (2, 4), P("y", "x", None)
    ),
}

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
axis_types = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda x: x.name
)


def mesh_of(sizes: Tuple[int, ...], axis_type: AxisType) -> Mesh:
    return jax.make_mesh(sizes, tuple("xy"[: len(sizes)]), axis_types=(axis_type,) * len(sizes))


def assert_shardings(tree: Any, expected: Any) -> None:
    def check(x: jax.Array, sharding: jax.sharding.Sharding) -> None:
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)

    jax.tree.map(check, tree, expected)


def assert_close(x: Any, y: Any) -> None:
    def check(x: np.ndarray, y: np.ndarray) -> None:
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)

    jax.tree.map(check, x, y)


class Run(NamedTuple):
    result: Any
    """On the host: updates summed over steps, momentum and basis."""

    first: Any
    """The state that init makes."""

    last: Any
    compilations: List[int]
    """In each step."""

    collectives: List[Collective]


@functools.lru_cache(maxsize=None)
def run(problem: Problem, sharding: Optional[jax.sharding.Sharding]) -> Run:
    optimizer, rng = problem.optimizer(), np.random.default_rng(0)

    def gradient() -> jax.Array:
        x = rng.standard_normal(problem.shape, dtype=np.float32)
        return jnp.asarray(x) if sharding is None else jax.device_put(x, sharding)

    first = state = optimizer.init(gradient())
    update = jax.jit(optimizer.update)
    total, compiled = np.zeros(problem.shape), [compilations()]
    found = collectives(update.lower(gradient(), state).compile())
    for _ in range(STEPS):
        updates, state = update(gradient(), state)
        compiled.append(compilations())
        total += np.asarray(updates)
    result = total, np.asarray(state.momentum), np.asarray(state.basis)
    return Run(result, first, state, list(np.diff(compiled)), found)


def sharded(layout: Layout, axis_type: AxisType) -> Run:
    return run(layout.problem, NamedSharding(mesh_of(layout.mesh, axis_type), layout.spec))


def state_shardings(layout: Layout, mesh: Mesh) -> ScaleByDionState:
    matrix, replicated = layout.problem.matrix, NamedSharding(mesh, P())
    basis = [layout.spec[axis] for axis in matrix.batch + matrix.shorter]
    return ScaleByDionState(
        count=replicated,  # type: ignore[arg-type]
        momentum=NamedSharding(mesh, layout.spec),
        basis=NamedSharding(mesh, P(*basis, None)),
        key=replicated,  # type: ignore[arg-type]
    )


@axis_types
@layouts
def test_the_result_is_that_of_one_device(layout, axis_type):
    assert_close(sharded(layout, axis_type).result, run(layout.problem, None).result)


@axis_types
@pytest.mark.parametrize("spec", [P("x", "y", None), P(None, ("x", "y"), None)], ids=str)
def test_the_fallback_gives_the_result_of_one_device(spec, axis_type):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 256, 8), dtype=np.float32)
    x[1, :, 1:] = x[1, :, :1] + 1e-4 * x[1, :, 1:]  # too near to dependent for Cholesky QR
    function = functools.partial(orthonormalize, method="cqr")
    jitted = jax.jit(function)
    divided = jitted(jax.device_put(x, NamedSharding(mesh_of((2, 4), axis_type), spec)))
    assert_close(np.asarray(divided), np.asarray(orthonormalize(jnp.asarray(x), method="qr")))


@axis_types
@layouts
def test_state_is_divided_as_the_parameter_is_and_stays_so(layout, axis_type):
    expected = state_shardings(layout, mesh_of(layout.mesh, axis_type))
    for state in (sharded(layout, axis_type).first, sharded(layout, axis_type).last):
        assert_shardings(state, expected)


@pytest.mark.parametrize("name", ["wide, both", "experts and outputs", "inputs and heads"])
def test_with_explicit_axes_init_under_jit_divides_state_too(name):
    layout = LAYOUTS[name]
    mesh, optimizer = mesh_of(layout.mesh, AxisType.Explicit), layout.problem.optimizer()
    params = jnp.zeros(layout.problem.shape)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, layout.spec))
        state = jax.jit(optimizer.init)(params)
    assert_shardings(state, state_shardings(layout, mesh))
    assert_close(jax.device_get(state), jax.device_get(optimizer.init(params)))


@axis_types
@layouts
def test_nothing_is_compiled_after_the_first_step(layout, axis_type):
    assert sharded(layout, axis_type).compilations == [1] + [0] * (STEPS - 1)


@pytest.mark.parametrize("committed", [False, True])
def test_on_one_device_nothing_is_compiled_after_the_first_step(committed):
    device = SingleDeviceSharding(jax.devices()[1]) if committed else None
    assert run(TALL, device).compilations == [1] + [0] * (STEPS - 1)


class Transformer(NamedTuple):
    params: Any
    compilations: List[int]
    """In each step."""


SPECS = {
    "embedding": P("x", "y"),
    "layers": {
        "scale": P(None, "y"),
        "query": P(None, "x", "y", None),
        "up": P(None, "x", "y"),
        "down": P(None, "y", "x"),
    },
    "gate": {"kernel": P("x", "y"), "bias": P("y")},
    "lm_head": P("x", "y"),
}
SHAPES = {
    "embedding": (64, 16),
    "layers": {"scale": (2, 16), "query": (2, 16, 4, 4), "up": (2, 16, 136), "down": (2, 136, 16)},
    "gate": {"kernel": (16, 32), "bias": (32,)},
    "lm_head": (16, 64),
}


def axes_of(params: Any) -> Any:
    axes = matrix_dimension_numbers(params)
    stacked = MuonDimensionNumbers(1, 2)
    axes["layers"] = {
        "scale": None,
        "query": MuonDimensionNumbers(1, (2, 3)),
        "up": stacked,
        "down": stacked,
    }
    return axes


@functools.lru_cache(maxsize=None)
def train(axis_type: Optional[AxisType]) -> Transformer:
    """With ``dion``, on one device if there is no type of axes."""
    optimizer = dion(0.1, rank_fraction=RANK_FRACTION, weight_dimension_numbers=axes_of)
    rng = np.random.default_rng(0)
    mesh = None if axis_type is None else mesh_of((2, 4), axis_type)

    def random() -> Any:
        def of(shape: Tuple[int, ...], spec: P) -> jax.Array:
            x = rng.standard_normal(shape, dtype=np.float32)
            return jnp.asarray(x) if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

        return jax.tree.map(of, SHAPES, SPECS, is_leaf=lambda x: isinstance(x, tuple))

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    params = random()
    state = optimizer.init(params)
    compiled = [compilations()]
    for _ in range(STEPS):
        params, state = jitted(params, state, random())
        compiled.append(compilations())
    return Transformer(params, list(np.diff(compiled)))


@axis_types
def test_a_transformer_trains_as_on_one_device(axis_type):
    many, one = train(axis_type), train(None)
    assert_close(jax.device_get(many.params), jax.device_get(one.params))
    assert many.compilations == one.compilations == [1] + [0] * (STEPS - 1)
    mesh = mesh_of((2, 4), axis_type)
    assert_shardings(many.params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS))


def moved(found: List[Collective]) -> Dict[Tuple[str, int], int]:
    """Numbers in results on a device, by kind and devices, in a step that takes no branch."""
    total: Counter = Counter()
    for each in found:
        if not each.conditional:
            total[each.kind, each.devices] += each.numbers * each.times
    return total


def numbers_of_a_step(layout: Layout) -> Dict[Tuple[str, int], int]:
    """
    What ``moved`` must give, of matrices ``(a, b)`` in stacks, ``a`` the longer side, and rank
    ``r``. A device has ``a / over_a`` of its rows, and so on.
    """
    matrix, method = layout.problem.matrix, layout.problem.method
    a, b, stack = (
        math.prod(matrix.sizes(each)) for each in (matrix.longer, matrix.shorter, matrix.batch)
    )
    over_a, over_b, over_stack = (
        layout.devices(each) for each in (matrix.longer, matrix.shorter, matrix.batch)
    )
    r = round(RANK_FRACTION * b)
    sketch = sketch_rows(r)
    total: Counter = Counter()

    def add(kind: str, devices: int, numbers: int) -> None:
        if devices > 1:
            total[kind, devices] += numbers * stack // over_stack

    add("all-reduce", over_b, a // over_a * r)  # P
    add("all-reduce", over_b, 2 * r)  # the longest and the sum of squares in columns of R
    add("all-reduce", over_a, b // over_b * r)  # R
    if layout.devices(matrix.longer[1:]) > 1:  # a device has no range of rows
        add("all-gather", over_a, a * r)
        return total
    add("all-reduce", over_a, r)  # the longest in columns of P
    if method == "qr" or (method == "rcqr" and sketch >= a):
        add("all-gather", over_a, a * r)
        return total
    add("all-reduce", over_a, sketch * r + r * r if method == "rcqr" else 2 * r * r)
    add("all-reduce", over_a, r)  # whether P is orthonormal
    if over_stack > 1:
        # Whether all P are, and whether a quotient has to be refined.
        total["all-reduce", over_stack] += 2
    return total


# Rows can be brought together from both axes of a mesh in several ways, and the compiler takes one.
@axis_types
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "heads and within them"])
def test_what_a_step_moves_follows_from_the_rank(name, axis_type):
    layout = LAYOUTS[name]
    assert moved(sharded(layout, axis_type).collectives) == numbers_of_a_step(layout)


def has_a_whole_matrix(found: List[Collective], numbers: int) -> bool:
    """Whether devices send parts of an array of at least so many numbers, in any branch."""
    return any(each.array >= numbers for each in found)


@axis_types
@layouts
def test_nothing_as_large_as_the_matrix_moves(layout, axis_type):
    found = sharded(layout, axis_type).collectives
    assert not has_a_whole_matrix(found, math.prod(layout.problem.shape))
    if layout == LAYOUTS["tall, rows"]:
        assert any(each.conditional for each in found)  # the fallback was read too


def muon(x: jax.Array) -> jax.Array:
    optimizer = optax.contrib.scale_by_muon()
    return optimizer.update(x, optimizer.init(x))[0]


@pytest.mark.parametrize(
    "function, spec",
    [
        (muon, P("x", "y")),
        (lambda x: x @ x.T, P("x", None)),
        (lambda x: jax.lax.with_sharding_constraint(x, P(None, "y")), P("y", None)),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x.T @ x, lambda x: x, x), P("x", "y")),
    ],
    ids=["muon", "square", "reshard", "branch"],
)
def test_a_program_that_moves_a_matrix_is_found(function, spec):
    mesh = mesh_of((2, 4), AxisType.Auto)
    x = jax.device_put(jnp.zeros((64, 32)), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        found = collectives(jax.jit(function).lower(x).compile())
    assert has_a_whole_matrix(found, x.size)


def test_collectives_are_read_with_their_sizes_and_how_often_they_run():
    mesh = mesh_of((2, 4), AxisType.Auto)

    def body(x: jax.Array) -> jax.Array:
        x = jax.lax.psum(x, "y")
        x = jax.lax.fori_loop(0, 50, lambda _, x: jax.lax.all_gather(x, "x").max(0), x)
        x = jax.lax.cond(x[0] > 0, lambda x: jax.lax.psum(x, ("x", "y")), lambda x: x, x)
        x = jax.lax.psum_scatter(x, "y", tiled=True)
        x = jax.lax.all_to_all(x, "y", 0, 0, tiled=True)
        return jax.lax.ppermute(x, "x", [(0, 1), (1, 0)])

    program = jax.shard_map(
        body, mesh=mesh, in_specs=P(("x", "y")), out_specs=P(("x", "y")), check_vma=False
    )
    found = collectives(jax.jit(program).lower(jnp.zeros(8 * 96)).compile())
    assert [
        (each.kind, each.numbers, each.devices, each.times, each.conditional) for each in found
    ] == [
        ("all-reduce", 96, 4, 1, False),
        ("all-gather", 192, 2, 50, False),
        ("all-reduce", 96, 8, 1, True),
        ("reduce-scatter", 24, 4, 1, False),
        ("all-to-all", 24, 4, 1, False),
        ("collective-permute", 24, 8, 1, False),
    ]
    assert [each.sent / 4 for each in found] == [144, 96, 168, 72, 18, 24]
