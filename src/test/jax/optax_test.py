"""
``dion`` among Optax's transformations, and the properties that Optax's own optimizers are tested
for.
"""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any, Set

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import olmo_optim_ext.jax as folder
from olmo_optim_ext.jax import dion, matrix_dimension_numbers, scale_by_dion

from .compilations import compilations


def params_of(dtype: Any = jnp.float32) -> Any:
    """A small model: embedding, two layers and a head."""
    rng = np.random.default_rng(0)
    shapes = {
        "embedder": {"embedding": (12, 8)},
        "layers": {"dense": {"kernel": (8, 20), "bias": (20,)}, "norm": {"scale": (20,)}},
        "lm_head": {"kernel": (20, 12)},
        "temperature": (),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(params: Any, step: int) -> Any:
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def train(optimizer: Any, steps: int, params: Any = None, state: Any = None) -> Any:
    params = params_of() if params is None else params
    state = optimizer.init(params) if state is None else state
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(x: Any, y: Any, **tolerances: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), x, y)


# Who gets which rule


def test_matrices_follow_dion_and_all_else_adamw():
    params, _ = train(dion(0.1, weight_decay=0.01), 5)
    adamw, _ = train(optax.adamw(0.1, b2=0.95, weight_decay=0.01), 5)
    kernel = params["layers"]["dense"].pop("kernel")
    other = adamw["layers"]["dense"].pop("kernel")
    assert_same(params, adamw)
    assert not jnp.allclose(kernel, other)

    chain = optax.chain(
        scale_by_dion(), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(0.1)
    )
    whole = params_of()
    tree = {"layers": {"dense": {"kernel": whole["layers"]["dense"]["kernel"]}}}
    state = chain.init(tree)
    for step in range(5):
        grad = {
            "layers": {"dense": {"kernel": gradients(whole, step)["layers"]["dense"]["kernel"]}}
        }
        updates, state = chain.update(grad, state, tree)
        tree = optax.apply_updates(tree, updates)
    np.testing.assert_allclose(kernel, tree["layers"]["dense"]["kernel"], atol=1e-6)


@pytest.mark.parametrize(
    "name,shape,is_matrix",
    [
        ("kernel", (4, 3), True),
        ("w", (2, 2), True),
        ("kernel", (1, 3), False),
        ("kernel", (3, 1), False),
        ("bias", (3,), False),
        ("scale", (), False),
        ("kernel", (2, 4, 3), False),
        ("embedding", (4, 3), False),
        ("pos_embed", (4, 3), False),
        ("Embed_0", (4, 3), False),
        ("wte", (4, 3), False),
        ("lm_head", (4, 3), False),
        ("head_0", (4, 3), False),
        ("output_head", (4, 3), False),
        ("logits", (4, 3), False),
        ("classifier", (4, 3), False),
        ("MultiHeadDotProductAttention_0", (4, 3), True),
        ("heads", (4, 3), True),
        ("transformer/~/head", (4, 3), False),
        ("lm_head.weight", (4, 3), False),
        ("word_head", (4, 3), False),
        ("header", (4, 3), True),
        ("bias", (4, 3), False),
        ("scale", (4, 3), False),
        ("tok_emb", (4, 3), False),
        ("to_logits", (4, 3), False),
        ("wt", (4, 3), True),
    ],
)
def test_embeddings_and_heads_are_known_by_name(name, shape, is_matrix):
    for params in ({name: jnp.zeros(shape)}, {"a": {name: {"kernel": jnp.zeros(shape)}}}):
        dims = jax.tree.leaves(
            matrix_dimension_numbers(params),
            is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
        )
        assert dims == [MuonDimensionNumbers() if is_matrix else None]
        dion(0.1).init(params)


@pytest.mark.parametrize("form", ["tree", "prefix", "function"])
def test_axes_may_be_a_tree_a_prefix_or_a_function(form):
    params = {"a": {"x": jnp.ones((3, 8, 6)), "y": jnp.ones((3, 6, 8))}, "b": jnp.ones((8, 6))}
    dims = MuonDimensionNumbers(1, 2)
    tree = {"a": dims if form == "prefix" else {"x": dims, "y": dims}, "b": None}
    spec = (lambda params: tree) if form == "function" else tree
    optimizer = dion(0.1, weight_dimension_numbers=spec)
    state = optimizer.init(params)
    shapes = {x.shape for x in jax.tree.leaves(state.inner_states["dion"])}
    assert shapes == {(), (2,), (3, 8, 6), (3, 6, 8), (3, 6, 2)}
    moved, _ = train(optimizer, 2, params)
    assert all((x != 1).any() for x in jax.tree.leaves(moved))


def test_the_scalar_optimizer_can_be_another():
    optimizer = dion(0.1, scalar_optimizer=optax.sgd(0.5))
    start = params_of()
    params, _ = train(optimizer, 1)
    expected = start["temperature"] - 0.5 * gradients(start, 0)["temperature"]
    np.testing.assert_allclose(params["temperature"], expected, rtol=1e-6)


@pytest.mark.parametrize("mask", [lambda params: jax.tree.map(lambda p: p.ndim > 1, params), None])
def test_weights_decay_where_the_mask_says(mask):
    """With gradients of zero nothing but decay moves them."""
    optimizer = dion(0.1, weight_decay=0.5, weight_decay_mask=mask)
    start = params_of()
    zeros = jax.tree.map(jnp.zeros_like, start)
    updates, _ = optimizer.update(zeros, optimizer.init(start), start)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(start)):
        decays = mask is None or param.ndim > 1
        np.testing.assert_allclose(update, -0.05 * param * decays, rtol=1e-6)
    as_tree = mask and mask(start)
    again = dion(0.1, weight_decay=0.5, weight_decay_mask=as_tree)
    assert_same(again.update(zeros, again.init(start), start)[0], updates)


# Among other transformations


def test_a_schedule_is_followed():
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    params, _ = train(dion(schedule), 5)
    after, _ = train(dion(schedule), 6)
    assert_same(params, after, rtol=1e-5, atol=1e-8)
    assert not jnp.allclose(
        params["lm_head"]["kernel"], train(dion(schedule), 4)[0]["lm_head"]["kernel"]
    )


def test_it_may_be_one_of_a_chain():
    """Gradients of the second step are shorter than the limit, of the others longer."""
    start, clip = params_of(), optax.clip_by_global_norm(1.0)
    optimizer = dion(0.1)
    chain, expected = optax.chain(clip, optimizer), start
    params, chained, state = start, chain.init(start), optimizer.init(start)
    for step, size in enumerate((1.0, 1e-3, 1.0)):
        grads = jax.tree.map(lambda g, size=size: size * g, gradients(start, step))
        updates, chained = chain.update(grads, chained, params)
        params = optax.apply_updates(params, updates)
        updates, state = optimizer.update(clip.update(grads, clip.init(start))[0], state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_same(params, expected, rtol=1e-6, atol=1e-7)
    assert not jnp.allclose(params["temperature"], train(optimizer, 3)[0]["temperature"])


@pytest.mark.parametrize("static", [(), ("rank_fraction", "rank_multiple_of")])
def test_hyperparameters_can_be_injected(static):
    injected = optax.inject_hyperparams(dion, static_args=static)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 5), rank_fraction=1 / 3, momentum_decay=0.9
    )
    plain = dion(optax.linear_schedule(0.1, 0.0, 5), rank_fraction=1 / 3, momentum_decay=0.9)
    params, state = train(injected, 4)
    assert_same(params, train(plain, 4)[0], rtol=1e-5, atol=1e-6)
    # The momentum follows another share from here on, and nothing is compiled anew.
    update = jax.jit(injected.update)
    update(params, state, params)
    state.hyperparams["momentum_decay"] = jnp.float32(0.5)
    before = compilations()
    after = update(params, state, params)[1]
    assert compilations() == before
    state.hyperparams["momentum_decay"] = jnp.float32(0.9)
    usual = update(params, state, params)[1]
    momenta = (jax.tree.leaves(each.inner_state.inner_states["dion"])[1] for each in (after, usual))
    assert not jnp.allclose(*momenta)


@pytest.mark.parametrize("fraction", [1, 2 / 3, 1 / 3, 1 / 6, 1 / 12, 0.07, 0.3, 0.1])
def test_the_rank_is_the_same_where_it_was_injected(fraction):
    """As a float32, which is a little more than a third."""
    params = jnp.zeros((96, 100))
    injected = optax.inject_hyperparams(scale_by_dion)(rank_fraction=fraction)
    expected = scale_by_dion(rank_fraction=fraction).init(params).basis.shape
    assert injected.init(params).inner_state.basis.shape == expected


@pytest.mark.parametrize(
    "name,value", [("rank_fraction", 2.0), ("rank_fraction", 0.0), ("rank_multiple_of", 1.5)]
)
def test_ranks_that_were_injected_are_checked(name, value):
    injected = optax.inject_hyperparams(dion)(learning_rate=0.1, **{name: jnp.float32(value)})
    with pytest.raises(ValueError, match=f"{name} is {value}, and must be"):
        injected.init(params_of())


def test_a_traced_rank_is_refused_in_words():
    injected = optax.inject_hyperparams(dion)(learning_rate=0.1)
    with pytest.raises(ValueError, match="rank_fraction decides shapes.* static_args"):
        jax.jit(injected.init)(params_of())
    static = ("rank_fraction", "rank_multiple_of")
    injected = optax.inject_hyperparams(dion, static_args=static)(learning_rate=0.1)
    assert_same(jax.jit(injected.init)(params_of()), injected.init(params_of()))


def test_gradients_may_be_accumulated():
    every = optax.MultiSteps(dion(0.1), every_k_schedule=2)
    start = params_of()
    params, _ = train(every, 4)
    optimizer, expected = dion(0.1), start
    state = optimizer.init(start)
    for step in (0, 2):
        grads = [gradients(start, step), gradients(start, step + 1)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        updates, state = optimizer.update(mean, state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_same(params, expected, atol=1e-5)


def test_a_gradient_that_is_not_finite_can_be_skipped():
    optimizer = optax.apply_if_finite(dion(0.1), max_consecutive_errors=5)
    params, state = train(optimizer, 2)
    bad = gradients(params, 2)
    bad["layers"]["dense"]["kernel"] = bad["layers"]["dense"]["kernel"].at[0, 0].set(jnp.nan)
    updates, after = jax.jit(optimizer.update)(bad, state, params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))
    assert_same(after.inner_state, state.inner_state)


def test_parameters_may_be_absent():
    """``None`` in place of a parameter, as for one that is frozen."""
    params = {"a": jnp.ones((8, 6)), "b": None}
    optimizer = dion(0.1)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["b"] is None and (updates["a"] != 0).all()
    empty = scale_by_dion()
    assert empty.update({}, empty.init({}))[0] == {}


# What Optax tests of its own optimizers

OPTIMIZERS = [
    dict(learning_rate=3e-2, weight_decay=0.0),
    dict(learning_rate=3e-2, weight_decay=0.0, rank_fraction=1.0, orthonormalize="qr"),
    dict(learning_rate=3e-2, weight_decay=0.0, momentum_decay=0.8, orthonormalize="cqr"),
]


def parabola() -> Any:
    """Start, end and loss, of a vector and a matrix."""
    target = {"v": np.array([1.0, -1.0, 1.0]), "m": np.outer([1.0, -1.0, 2.0], [1.0, 0.5])}
    start = {"v": np.array([-1.0, 10.0, 1.0]), "m": np.ones((3, 2))}

    def loss(params: Any) -> jax.Array:
        terms = [jnp.sum(jnp.square(params[k] - target[k])) for k in target]
        return sum(terms[1:], terms[0])

    return start, target, loss


def rosenbrock() -> Any:
    """Of the two entries of a vector, and of each two of a matrix."""
    start = {"v": np.zeros(2), "m": np.zeros((2, 3))}
    target = {"v": np.ones(2), "m": np.ones((2, 3))}

    def loss(params: Any) -> jax.Array:
        terms = [
            jnp.sum(100 * jnp.square(x[1] - jnp.square(x[0])) + jnp.square(1 - x[0]))
            for x in params.values()
        ]
        return sum(terms[1:], terms[0])

    return start, target, loss


@pytest.mark.parametrize("problem", [parabola, rosenbrock])
@pytest.mark.parametrize("options", OPTIMIZERS)
def test_it_optimises(options, problem):
    start, target, loss = problem()
    steps = 3000
    rate = optax.cosine_decay_schedule(options["learning_rate"], steps)
    optimizer = dion(**{**options, "learning_rate": rate})

    @jax.jit
    def run(params: Any) -> Any:
        def one(_: int, both: Any) -> Any:
            params, state = both
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, one, (params, optimizer.init(params)))[0]

    params = run(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start))
    assert_same(params, target, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_shapes_and_dtypes_stay(dtype):
    params = params_of(dtype)
    optimizer = dion(0.1)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(gradients(params, 0), state, params)
    for x, y in ((params, updates), (state, after)):
        # Of the same structure, too, or map complains.
        assert jax.tree.map(jax.typeof, x) == jax.tree.map(jax.typeof, y)
    assert jnp.isfinite(updates["layers"]["dense"]["kernel"]).all()


def test_a_learning_rate_of_zero_does_nothing():
    start = params_of()
    assert_same(train(dion(0.0), 3)[0], start)


def test_the_second_step_compiles_nothing():
    optimizer = dion(optax.linear_schedule(0.1, 0.0, 5))
    params = params_of()
    step = jax.jit(optimizer.update, donate_argnums=1)
    grads = [gradients(params, i) for i in range(3)]
    updates, state = step(grads[0], optimizer.init(params), params)
    before = compilations()
    for grad in grads[1:]:
        updates, state = step(grad, state, params)
    assert compilations() == before
    before = compilations()
    jax.jit(lambda x: x + 1)(jnp.ones(7))
    assert compilations() > before


def test_the_second_step_outside_of_jit_compiles_nothing_either():
    params = {"a": jnp.full((300, 24), 1.0), "b": jnp.full((300, 24), 1.0)}  # weakly typed, too
    optimizer = scale_by_dion()
    _, state = optimizer.update(params, optimizer.init(params))
    before = compilations()
    optimizer.update(params, state)
    assert compilations() == before


def test_parameters_may_be_a_state_of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(12, 8, rngs=rngs)
            self.dense = nnx.Linear(8, 6, rngs=rngs)
            self.lm_head = nnx.Linear(6, 12, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    optimizer = dion(0.1)
    state = optimizer.init(params)
    bases = jax.tree.leaves(state.inner_states["dion"].inner_state[0].basis)
    assert [x.shape for x in bases] == [(6, 2)]
    updates, _ = optimizer.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)  # type: ignore[operator]


def test_extra_arguments_are_accepted():
    optimizer = optax.with_extra_args_support(dion(0.1))
    params = params_of()
    optimizer.update(gradients(params, 0), optimizer.init(params), params, value=1.0)


# Checkpoints


@pytest.mark.parametrize("how", ["orbax", "numpy"])
def test_a_checkpoint_continues_exactly(how, tmp_path):
    """In a long matrix, too, so that sketches go on as they would."""
    start = {**params_of(), "long": jnp.ones((300, 24))}
    optimizer = dion(0.1, momentum_dtype=jnp.bfloat16)
    params, state = train(optimizer, 2, start)
    expected, _ = train(optimizer, 3, params, state)
    both = {"params": params, "state": state}
    if how == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "step", both)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, both)
            restored = checkpointer.restore(tmp_path / "step", abstract)
    else:
        leaves, tree = jax.tree.flatten(both)
        restored = jax.tree.unflatten(tree, [jnp.asarray(np.asarray(x)) for x in leaves])
    assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, both)
    jax.tree.map(np.testing.assert_array_equal, restored, both)
    again, _ = train(optimizer, 3, restored["params"], restored["state"])
    jax.tree.map(np.testing.assert_array_equal, again, expected)


# The package


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_no_jax_and_the_folder_says_what_it_needs():
    code = """
import sys
import olmo_optim_ext
assert not {"jax", "optax", "flax"} & set(sys.modules)
for missing in ("jax", "optax"):
    sys.modules[missing] = None
    try:
        import olmo_optim_ext.jax
    except ImportError as error:
        print(error)
    del sys.modules[missing]
import olmo_optim_ext.jax
assert not {"flax", "orbax"} & set(sys.modules)
"""
    assert run_python(code).splitlines()[-2:] == [
        f"olmo_optim_ext.jax needs {name}: pip install 'olmo-optim-ext[jax]'"
        for name in ("jax", "optax")
    ]


def test_the_folder_depends_on_jax_optax_and_numpy_only():
    """So that it can be given to others as it is."""
    found: Set[str] = set()
    for path in Path(str(folder.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                if node.module and node.level == 0:
                    found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"jax", "optax", "numpy"}


def test_the_example_in_the_docstring_runs():
    module = importlib.import_module("olmo_optim_ext.jax._dion")
    result = doctest.testmod(module)
    assert result.attempted > 5 and result.failed == 0
