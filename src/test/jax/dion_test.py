"""
What ``scale_by_dion`` promises.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from olmo_optim_ext.jax import ScaleByDionState, scale_by_dion

SHAPES = [(12, 12), (20, 8), (8, 20), (300, 24)]
"""``(in, out)``; the last is long enough for a sketch."""


def gradient(shape, values, seed: int = 0) -> jax.Array:
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in shape)
    return jnp.asarray((u * np.asarray(values)) @ v.T, jnp.float32)


def gaussian(shape, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def scale(shape) -> float:
    return math.sqrt(shape[1] / shape[0])


def run(optimizer: Any, grads: Any, state: Any = None) -> Any:
    """The last update and the state; the gradients are those of one parameter."""
    update = jax.jit(optimizer.update)
    for grad in grads:
        state = optimizer.init(jnp.zeros_like(grad)) if state is None else state
        out, state = update(grad, state)
    return out, state


@pytest.mark.parametrize("method", ["rcqr", "qr"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_momentum_keeps_what_was_not_applied(shape, method):
    """``M = B - (1 - mu) P R^T`` with ``R = B^T P``, to float32 precision."""
    optimizer = scale_by_dion(0.8, rank_fraction=0.5, orthonormalize=method)
    state = optimizer.init(jnp.zeros(shape))
    for step in range(5):
        grad = gaussian(shape, step)
        b = np.asarray(state.momentum, np.float64) + np.asarray(grad, np.float64)
        a = b if shape[0] > shape[1] else b.T
        p = np.linalg.qr(a @ np.asarray(state.basis, np.float64))[0]
        expected = a - (1 - 0.8) * p @ (p.T @ a)
        _, state = run(optimizer, [grad], state)
        kept = np.asarray(state.momentum)
        kept = kept if shape[0] > shape[1] else kept.T
        assert np.linalg.norm(kept - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_the_update_becomes_the_polar_factor(shape):
    k = min(shape)
    grad = gradient(shape, 1.6 ** -np.arange(8.0) if k == 8 else 1.3 ** -np.arange(float(k)))
    update, _ = run(scale_by_dion(0.8, rank_fraction=1.0), [grad] * 100)
    u, _, vt = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
    np.testing.assert_allclose(update / scale(shape), u @ vt, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_low_rank_the_error_becomes_that_of_the_svd(shape):
    """
    ``B - P R^T``, the approximation error of the paper, against that of the best matrix of the same
    rank; and the update against the leading singular vectors.
    """
    grad = gradient(shape, 2.0 ** -np.arange(8.0))
    mu = 0.8
    optimizer = scale_by_dion(mu, rank_fraction=0.25)
    state = optimizer.init(jnp.zeros(shape))
    rank = state.basis.shape[-1]
    assert rank == math.ceil(min(shape) / 4)
    errors = []
    for _ in range(20):
        # Or what is not applied piles up until it leads.
        state = state._replace(momentum=jnp.zeros(shape))
        update, state = run(optimizer, [grad], state)
        applied = (grad - state.momentum) / (1 - mu)
        errors.append(float(jnp.linalg.norm(grad - applied)))
    u, values, vt = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
    best = np.linalg.norm(values[rank:])
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-5)
    np.testing.assert_allclose(update / scale(shape), u[:, :rank] @ vt[:rank], atol=1e-4)


def test_what_is_not_applied_is_applied_later():
    """A rank of 1 with eight directions: error feedback brings each of them to its turn."""
    shape = (20, 8)
    grad = gradient(shape, np.linspace(2.0, 1.0, 8))
    optimizer = scale_by_dion(0.5, rank_fraction=1 / 8)
    state, total = None, jnp.zeros(shape)
    for _ in range(200):
        update, state = run(optimizer, [grad], state)
        total += update
    assert (np.linalg.svd(total)[1] > 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_momentum_keeps_the_basis(shape):
    optimizer = scale_by_dion()
    state = optimizer.init(jnp.zeros(shape))
    update, after = run(optimizer, [jnp.zeros(shape)], state)
    assert (update == 0).all() and (after.momentum == 0).all()
    np.testing.assert_array_equal(after.basis, state.basis)


@pytest.mark.parametrize("shape", [(40, 30), (300, 24)])
def test_directions_that_the_momentum_does_not_have_are_not_taken(shape):
    """At full rank, with momentum of rank 3: the rest of ``R`` is rounding."""
    grad = gradient(shape, np.ones(3))
    optimizer = scale_by_dion(rank_fraction=1.0)
    # In the first step three random columns may be too alike to tell the fourth from rounding.
    _, state = run(optimizer, [grad])
    for _ in range(3):
        update, state = run(optimizer, [grad], state)
        values = np.linalg.svd(update / scale(shape))[1]
        assert (values[3:] < 1e-5).all() and values[0] > 0.5
    other = gradient(shape, np.ones(3), seed=1)
    update, _ = run(optimizer, [other] * 30, state)
    assert (np.linalg.svd(update / scale(shape))[1][:6] > 0.1).all()


def test_gradients_of_any_size_leave_all_finite():
    """Squares of float32 overflow at 1e19, and vanish at 1e-23."""
    shapes = [(20, 8), (8, 20), (300, 24), (1, 8), (8, 1), (1, 1), (2, 2)]
    grads = [[gaussian(shape, i) for shape in shapes] for i in range(3)]
    optimizer = scale_by_dion(rank_fraction=0.5)
    usual, _ = run(optimizer, grads[:1], optimizer.init(grads[0]))
    for size in (1e-30, 1e-20, 1e15, 1e19, 1e30):
        first = [grad * size for grad in grads[0]]
        updates, state = run(optimizer, [first], optimizer.init(grads[0]))
        for update, before in zip(updates, usual):
            assert jnp.linalg.norm(update) < 1.01 * jnp.linalg.norm(before)
        updates, state = run(optimizer, grads[1:], state)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("fraction,multiple_of,rank", [(0.25, 1, 2), (0.25, 4, 4), (1.0, 3, 8)])
def test_the_rank_is_rounded_up_and_never_above_the_smaller_side(fraction, multiple_of, rank):
    state = scale_by_dion(rank_fraction=fraction, rank_multiple_of=multiple_of).init(
        jnp.zeros((20, 8))
    )
    assert state.basis.shape == (8, rank)


@pytest.mark.parametrize(
    "shape,dims",
    [
        ((3, 20, 8), MuonDimensionNumbers(1, 2)),
        ((3, 300, 24), MuonDimensionNumbers(-2, -1)),
        ((20, 3, 8), MuonDimensionNumbers(0, 2)),
        ((2, 3, 8, 20), MuonDimensionNumbers(2, 3)),
        ((8, 3, 20), MuonDimensionNumbers(2, 0)),
    ],
)
def test_a_stack_moves_as_its_matrices_would(shape, dims):
    inputs, outputs = dims.reduction_axis % len(shape), dims.output_axis % len(shape)
    batch = [axis for axis in range(len(shape)) if axis not in (inputs, outputs)]
    order = (*batch, inputs, outputs)
    grads = [gaussian(shape, step) for step in range(3)]
    stack = scale_by_dion(weight_dimension_numbers=dims)
    state = stack.init(jnp.zeros(shape))
    update, after = run(stack, grads, state)

    update, momentum, *grads = (x.transpose(order) for x in (update, after.momentum, *grads))
    alone = scale_by_dion()
    for place in np.ndindex(*update.shape[:-2]):
        begin = alone.init(jnp.zeros(update.shape[-2:]))._replace(basis=state.basis[place])
        one, end = run(alone, [grad[place] for grad in grads], begin)
        np.testing.assert_allclose(update[place], one, atol=1e-5)
        np.testing.assert_allclose(momentum[place], end.momentum, atol=1e-5)
        np.testing.assert_allclose(after.basis[place], end.basis, atol=1e-4)


@pytest.mark.parametrize("inputs,outputs", [(0, (1, 2)), ((0, 1), 2), ((0, 1), (2, 3))])
def test_sides_of_several_axes_are_one_side(inputs, outputs):
    """As an attention's ``(in, heads, head_dim)``."""
    dims = MuonDimensionNumbers(inputs, outputs)
    shape = (6, 4, 10) if outputs != (2, 3) else (3, 4, 2, 5)
    n_in = math.prod(shape[axis] for axis in np.atleast_1d(inputs))
    flat = (n_in, math.prod(shape) // n_in)
    grads = [gaussian(shape, step) for step in range(3)]
    optimizer = scale_by_dion(weight_dimension_numbers=dims)
    state = optimizer.init(jnp.zeros(shape))
    update, _ = run(optimizer, grads, state)
    begin = scale_by_dion().init(jnp.zeros(flat))
    begin = begin._replace(basis=state.basis.reshape(begin.basis.shape))
    expected, _ = run(scale_by_dion(), [grad.reshape(flat) for grad in grads], begin)
    np.testing.assert_allclose(update.reshape(flat), expected, atol=1e-5)


def test_basis_and_sketch_depend_on_key_and_path_only():
    def init(params: Any, **options: Any) -> ScaleByDionState:
        return scale_by_dion(**options).init(params)

    a, b = jnp.zeros((300, 24)), jnp.ones((300, 24))
    both = init({"a": a, "b": b}).basis
    np.testing.assert_array_equal(init({"b": b}).basis["b"], both["b"])
    assert not jnp.allclose(both["a"], both["b"])
    assert not jnp.allclose(init({"a": a}, key=1).basis["a"], both["a"])
    for key in (jax.random.key(0), jax.random.PRNGKey(0), np.int32(0), jnp.int32(0)):
        np.testing.assert_array_equal(init({"a": a}, key=key).basis["a"], both["a"])
    other = init({"a": a}, key=jax.random.key(0, impl="rbg"))
    assert other.key.shape == (4,)
    run(scale_by_dion(key=jax.random.key(0, impl="rbg")), [gaussian((300, 24), 0)])


@pytest.mark.parametrize(
    "dtypes,momentum,basis",
    [
        ({}, "bfloat16", "float32"),
        ({"momentum_dtype": jnp.float32}, "float32", "float32"),
        ({"basis_dtype": jnp.bfloat16}, "bfloat16", "bfloat16"),
    ],
)
def test_products_of_bfloat16_parameters_are_float32(dtypes, momentum, basis):
    """What is rounded is only what is kept and given out."""
    shape = (300, 24)
    optimizer = scale_by_dion(0.9, rank_fraction=0.5, **dtypes)
    state = optimizer.init(jnp.zeros(shape, jnp.bfloat16))
    assert (state.momentum.dtype, state.basis.dtype) == (momentum, basis)
    grad = gaussian(shape, 0).astype(jnp.bfloat16)
    update, after = run(optimizer, [grad], state)
    wide = state._replace(
        momentum=state.momentum.astype(jnp.float32), basis=state.basis.astype(jnp.float32)
    )
    expected, kept = run(scale_by_dion(0.9, rank_fraction=0.5), [grad.astype(jnp.float32)], wide)
    assert update.dtype == jnp.bfloat16
    # Of one ulp of bfloat16 at most: no two roundings.
    for mine, theirs in [
        (update, expected),
        (after.momentum, kept.momentum),
        (after.basis, kept.basis),
    ]:
        mine, theirs = mine.astype(jnp.float32), theirs.astype(mine.dtype).astype(jnp.float32)
        wrong = jnp.mean(jnp.abs(mine - theirs) > 1e-6 * jnp.abs(theirs).max())
        assert wrong < 0.01
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=1e-5)


def test_accelerators_are_asked_for_the_highest_precision():
    """In the program before it is compiled: there is no accelerator here to see it on."""
    optimizer = scale_by_dion()
    state = optimizer.init(jnp.zeros((300, 24)))
    text = jax.jit(optimizer.update).lower(jnp.zeros((300, 24)), state).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 9
    assert all(line.count("HIGHEST") == 2 for line in products)


def test_a_state_that_is_donated_takes_nothing_of_the_users_with_it():
    key = jax.random.key(3)
    optimizer = scale_by_dion(key=key)
    params = jnp.zeros((300, 24))
    step = jax.jit(optimizer.update, donate_argnums=1)
    expected, _ = run(optimizer, [gaussian((300, 24), i) for i in range(3)])
    for _ in range(2):
        state = optimizer.init(params)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        for i in range(3):
            before = state
            update, state = step(gaussian((300, 24), i), state)
            assert before.momentum.is_deleted() and not key.is_deleted()
        np.testing.assert_array_equal(update, expected)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"momentum_decay": 1.0}, r"momentum_decay is 1.0, and must be in \[0, 1\)"),
        ({"momentum_decay": -0.1}, "momentum_decay is -0.1"),
        ({"momentum_decay": math.nan}, "momentum_decay is nan"),
        ({"rank_fraction": 0}, r"rank_fraction is 0, and must be in \(0, 1\]"),
        ({"rank_fraction": 1.5}, "rank_fraction is 1.5"),
        ({"rank_multiple_of": 0}, "rank_multiple_of is 0, and must be an integer >= 1"),
        ({"rank_multiple_of": 1.5}, "rank_multiple_of is 1.5"),
        ({"eps": 0.0}, "eps is 0.0, and must be > 0"),
        ({"orthonormalize": "svd"}, "orthonormalize is 'svd', and must be one of rcqr, cqr, qr"),
        ({"key": np.zeros(3)}, "key is .* and must be a PRNG key or an integer"),
        ({"key": 0.5}, "key is 0.5"),
        ({"key": None}, "key is None"),
        ({"key": np.zeros((2, 2), np.uint32)}, "key is "),
        ({"momentum_dtype": jnp.int32}, "momentum_dtype is int32, and must be one of bfloat16"),
        (
            {"basis_dtype": "float16"},
            "basis_dtype is float16, and must be one of bfloat16, float32",
        ),
        ({"rank_fraction": np.float32(1.5)}, "rank_fraction is 1.5"),
        ({"rank_multiple_of": np.int64(0)}, "rank_multiple_of is 0"),
        ({"rank_fraction": lambda count: 0.5}, "rank_fraction is a function"),
        ({"momentum_decay": optax.constant_schedule(0.9)}, "momentum_decay is a function"),
    ],
)
def test_a_value_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_dion(**options)


@pytest.mark.parametrize(
    "params,spec,message",
    [
        ({"w": (4, 3), "b": (3,)}, None, r"the parameter \['b'\] is no matrix"),
        ({"w": (2, 4, 3)}, None, r"the parameter \['w'\] is no matrix"),
        ({"w": (4, 3)}, {"w": None}, r"the parameter \['w'\] is no matrix"),
        ({"w": (4, 3)}, MuonDimensionNumbers(0, 2), r"does not fit the parameter \['w'\]"),
        ({"w": (4, 3)}, MuonDimensionNumbers(1, -1), r"does not fit the parameter \['w'\]"),
        ({"w": (4, 3)}, MuonDimensionNumbers((), 1), r"does not fit the parameter \['w'\]"),
        ({"w": (4, 3)}, {"x": None}, "weight_dimension_numbers is no prefix of the tree"),
        ({"w": (4, 3)}, {"w": "dion"}, r"has 'dion' for the parameter \['w'\]"),
        ({"w": (0, 3)}, None, r"the parameter \['w'\] of shape \(0, 3\)"),
    ],
)
def test_a_parameter_that_is_no_matrix_is_refused(params, spec, message):
    params = {name: jnp.zeros(shape) for name, shape in params.items()}
    with pytest.raises(ValueError, match=message):
        scale_by_dion(weight_dimension_numbers=spec).init(params)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"the parameter \['w'\] is int32, and must be one of"):
        scale_by_dion().init({"w": jnp.zeros((4, 3), jnp.int32)})


def test_parameters_may_be_arrays_of_numpy_or_shapes_only():
    params = {"w": np.zeros((20, 8), np.float32)}
    optimizer = scale_by_dion()
    state = optimizer.init(params)
    shapes = jax.eval_shape(optimizer.init, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    updates, _ = optimizer.update({"w": np.ones((20, 8), np.float32)}, state)
    assert updates["w"].shape == (20, 8)


def test_columns_of_the_basis_are_shorter_by_eps():
    shape, eps = (20, 8), 3.0
    optimizer = scale_by_dion(rank_fraction=0.5, eps=eps)
    state = optimizer.init(jnp.zeros(shape))
    grad = gaussian(shape, 0)
    _, after = run(optimizer, [grad], state)
    p = np.linalg.qr(np.asarray(grad @ state.basis, np.float64))[0]
    lengths = np.linalg.norm(np.asarray(grad).T @ p, axis=0)
    np.testing.assert_allclose(
        np.linalg.norm(after.basis, axis=0), lengths / (lengths + eps), rtol=1e-5
    )


def test_steps_are_counted_and_each_has_its_sketch():
    shape = (300, 24)
    grads = [gaussian(shape, i) for i in range(3)]
    _, state = run(scale_by_dion(), grads)
    assert state.count == 3
    methods: Any = (("rcqr", False), ("qr", True))
    for method, same in methods:
        optimizer = scale_by_dion(orthonormalize=method)
        first, _ = run(optimizer, grads[:1], state)
        later, _ = run(optimizer, grads[:1], state._replace(count=state.count + 1))
        np.testing.assert_allclose(first, later, atol=1e-5)
        assert (first == later).all() == same  # to the last bit, which the sketch rounds


def test_float64_is_kept_where_it_is_asked_for():
    shape = (300, 24)
    rng = np.random.default_rng(0)
    jax.config.update("jax_enable_x64", True)
    try:
        grad, basis = rng.standard_normal(shape), rng.standard_normal((24, 12))
        optimizer = scale_by_dion(np.float64(0.9), rank_fraction=0.5)
        state = optimizer.init(jnp.zeros(shape))._replace(basis=jnp.asarray(basis))
        update, after = run(optimizer, [jnp.asarray(grad)], state)
        mixed = scale_by_dion(momentum_dtype=jnp.float64)
        narrow = gaussian(shape, 0)
        _, wide = run(mixed, [narrow, narrow], None)
        kept = wide.momentum.dtype, wide.basis.dtype
    finally:
        jax.config.update("jax_enable_x64", False)
    p = np.linalg.qr(grad @ basis)[0]
    r = grad.T @ p
    expected = math.sqrt(24 / 300) * p @ (r / (np.linalg.norm(r, axis=0) + 1e-8)).T
    np.testing.assert_allclose(update, expected, atol=1e-13)
    np.testing.assert_allclose(after.momentum, grad - 0.1 * p @ r.T, atol=1e-13)
    assert update.dtype == after.momentum.dtype == after.basis.dtype == jnp.float64
    assert kept == (jnp.float64, jnp.float32)
    momentum = np.asarray(wide.momentum)
    assert (momentum.astype(np.float32) != momentum).any()  # no float32 that was widened


def test_init_may_be_anywhere_in_a_program():
    for params in (jnp.ones((20, 8)), jax.device_put(jnp.ones((20, 8)), jax.devices()[1])):
        init = scale_by_dion().init
        expected = init(params)
        for state in (
            jax.jit(functools.partial(init, params))(),
            jax.jit(init)(params),
        ):
            jax.tree.map(np.testing.assert_array_equal, state, expected)
        jax.eval_shape(functools.partial(init, params))


def test_axes_may_be_integers_of_numpy():
    axes = MuonDimensionNumbers(np.int64(0), (np.int64(-1),))
    state = scale_by_dion(weight_dimension_numbers=axes).init(jnp.zeros((20, 8)))
    assert state.basis.shape == (8, 2)


def test_masked_leaves_others_alone():
    params = {"w": jnp.zeros((20, 8)), "b": jnp.zeros(8)}
    optimizer = optax.masked(scale_by_dion(), {"w": True, "b": False})
    grads = {"w": gaussian((20, 8), 0), "b": gaussian((8,), 1)}
    updates, _ = optimizer.update(grads, optimizer.init(params))
    alone, _ = scale_by_dion().update({"w": grads["w"]}, scale_by_dion().init({"w": params["w"]}))
    np.testing.assert_array_equal(updates["w"], alone["w"])
    np.testing.assert_array_equal(updates["b"], grads["b"])
