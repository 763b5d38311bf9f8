"""
The same numbers as our Dion for torch, which is tested against the published rule in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn as nn

from olmo_optim_ext import DionConfig
from olmo_optim_ext.jax import ScaleByDionState, dion

SHAPES = [(48, 48), (96, 40), (40, 96), (300, 64), (64, 300)]
"""``(out, in)``; the last two are long enough for a sketch."""


def with_basis(state: Any, basis: np.ndarray) -> Any:
    """The state with this as the only basis, whatever it is inside of."""

    def put(x: Any) -> Any:
        if not isinstance(x, ScaleByDionState):
            return x
        return x._replace(basis=jax.tree.map(lambda old: jnp.array(basis), x.basis))

    return jax.tree.map(put, state, is_leaf=lambda x: isinstance(x, ScaleByDionState))


def dion_state(state: Any) -> ScaleByDionState:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByDionState))
    return next(x for x in leaves if isinstance(x, ScaleByDionState))


def relative(x: Any, y: Any) -> float:
    return float(np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y))


@pytest.mark.parametrize(
    "shape,fraction,method",
    [
        *((shape, fraction, "rcqr") for shape in SHAPES for fraction in (1, 1 / 2, 1 / 4, 1 / 16)),
        *(((300, 64), 1 / 4, method) for method in ("cqr", "qr")),
    ],
)
def test_dion_is_that_of_torch(shape, fraction, method):
    """
    Thirty steps from the same basis, with weight decay and a schedule, at a rate that moves small
    weights far beyond their rounding and their decay.
    """
    n_out, n_in = shape
    rng = np.random.default_rng(0)
    start = 0.02 * rng.standard_normal(shape).astype(np.float32)
    grads = rng.standard_normal((30, *shape)).astype(np.float32)
    rates = np.linspace(1.0, 0.5, 30)
    weight_decay, mu = 0.1, 0.9

    linear = nn.Linear(n_in, n_out, bias=False)
    linear.weight.data.copy_(torch.from_numpy(start))
    fields: Any = dict(rank_fraction=fraction, weight_decay=weight_decay, skip_step=False)
    theirs = DionConfig(lr=1.0, momentum=mu, **fields).build(linear)
    theirs_state = theirs.state[linear.weight]

    params = {"kernel": jnp.asarray(start.T)}
    ours = dion(
        lambda count: jnp.asarray(rates, jnp.float32)[count],
        momentum_decay=mu,
        rank_fraction=fraction,
        orthonormalize=method,
        weight_decay=weight_decay,
    )
    state = ours.init(params)
    rank = dion_state(state).basis["kernel"].shape
    assert theirs_state["basis"].numel() == np.prod(rank)
    # A copy: torch writes to its own, which JAX may read later.
    state = with_basis(state, theirs_state["basis"].numpy().reshape(rank).copy())

    update = jax.jit(ours.update)
    for grad, rate in zip(grads, rates):
        theirs.param_groups[0]["lr"] = rate
        linear.weight.grad = torch.from_numpy(grad.copy())
        theirs.step()
        updates, state = update({"kernel": jnp.asarray(grad.T)}, state, params)
        params = optax.apply_updates(params, updates)

    there = linear.weight.detach().numpy().T
    error = np.linalg.norm(params["kernel"] - there) / np.linalg.norm(there - start.T)
    assert error < 1e-5
    mine = dion_state(state)
    momentum = theirs_state["momentum"].numpy().reshape(shape).T
    assert relative(mine.momentum["kernel"], momentum) < 1e-5
