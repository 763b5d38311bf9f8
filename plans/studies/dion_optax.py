"""
Dion for Optax against optax.contrib.muon and optax.adamw, on a transformer's matrices.

    python plans/studies/dion_optax.py communication [--width N]
    python plans/studies/dion_optax.py memory [--width N]
    python plans/studies/dion_optax.py steps [--width N] [--cycles N]

``communication`` compiles steps for eight devices and runs none: bytes that a device sends in a
ring, of float32 gradients and parameters, without the gradients' own reduction, and the largest
array, as a share of the matrix. ``memory`` counts the state, and asks the compiler what a step
needs besides its arguments. ``steps`` times steps of all in turn, on one device.
"""

import argparse
import os
import statistics
import time
from typing import Any, Dict, List, Tuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src.core import ShardingTypeError  # JAX has no public name for it
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orthonoise import header, row

from olmo_optim_ext.jax import dion
from olmo_optim_ext.jax.orthonormal import METHODS
from src.test.jax.collectives import Collective, collectives

Optimizers = Dict[str, optax.GradientTransformation]


def dions(method: Any = "rcqr") -> Optimizers:
    return {
        f"dion, rank 1/{part}": dion(1e-3, rank_fraction=1 / part, orthonormalize=method)
        for part in (4, 16)
    }


def optimizers() -> Optimizers:
    return {**dions(), "muon": optax.contrib.muon(1e-3), "adamw": optax.adamw(1e-3)}


def block(width: int) -> Dict[str, Tuple[Tuple[int, int], int]]:
    """Matrices of a block, as often as it has them: attention's, and the two of an MLP."""
    return {
        "square": ((width, width), 4),
        "1:4": ((width, 4 * width), 1),
        "4:1": ((4 * width, width), 1),
    }


def params_of(width: int, dtype: Any = jnp.float32) -> Dict[str, jax.ShapeDtypeStruct]:
    return {
        f"{name} {i}": jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, count) in block(width).items()
        for i in range(count)
    }


def step_of(optimizer: optax.GradientTransformation) -> Any:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


LAYOUTS = {
    "FSDP 8, inputs": ((8,), PartitionSpec("x", None)),
    "FSDP 8, outputs": ((8,), PartitionSpec(None, "x")),
    "2 x 4, both": ((2, 4), PartitionSpec("x", "y")),
}


def moved_by(
    optimizer: optax.GradientTransformation,
    shape: Tuple[int, int],
    layout: str,
    axis_type: AxisType = AxisType.Auto,
) -> List[Collective]:
    sizes, spec = LAYOUTS[layout]
    mesh = jax.make_mesh(sizes, tuple("xy"[: len(sizes)]), axis_types=(axis_type,) * len(sizes))
    params = {"kernel": jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, spec))}
    lowered = step_of(optimizer).lower(params, optimizer.init(params), params)
    return collectives(lowered.compile())


def communication(width: int) -> None:
    """
    Branches that are not taken send nothing. As the compiler gathers for each product of Muon's,
    there are two bounds that a program could reach: every device gathers every matrix once, or each
    matrix goes to one device, which sends the update back.
    """
    matrices = block(width)
    gathers = 7 / 8 * nbytes(params_of(width)) / 1e6
    owners = 2 / 8 * gathers
    ratios = ("to muon", "to gathers", "to owners")
    header("MB a step and device", "layout", *matrices, "a block", *ratios, "largest")
    for layout in LAYOUTS:
        lines = {}
        for name, optimizer in optimizers().items():
            sent, largest = {}, 0.0
            for matrix, (shape, _) in matrices.items():
                found = moved_by(optimizer, shape, layout)
                sent[matrix] = sum(x.sent * x.times for x in found if not x.conditional) / 1e6
                shares = [each.numbers / (shape[0] * shape[1]) for each in found]
                largest = max([largest, *shares])
            lines[name] = sent, largest
        totals = {
            name: sum(sent[matrix] * count for matrix, (_, count) in matrices.items())
            for name, (sent, _) in lines.items()
        }
        for name, (sent, largest) in lines.items():
            cells = [f"{sent[matrix]:.2f}" for matrix in matrices]
            cells.append(f"{totals[name]:.2f}")
            cells += [f"{totals[name] / to:.3f}" for to in (totals["muon"], gathers, owners)]
            row(name, layout, *cells, f"{largest:.2f}")
    print()
    for name, optimizer in optimizers().items():
        try:
            moved_by(optimizer, (width, width), "2 x 4, both", AxisType.Explicit)
            print(f"{name}, Explicit axes: compiles")
        except ShardingTypeError as error:
            print(f"{name}, Explicit axes: {error}")


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(width: int) -> None:
    """All matrices of a block in one step, which donates parameters and state."""
    header("bytes a parameter", "state", "state, bfloat16 parameters", "temporary in a step")
    for name, optimizer in optimizers().items():
        cells = []
        for dtype in (jnp.float32, jnp.bfloat16):
            params = params_of(width, dtype)
            numbers = sum(each.size for each in params.values())
            cells.append(nbytes(jax.eval_shape(optimizer.init, params)) / numbers)
        params = params_of(width)
        state = jax.eval_shape(optimizer.init, params)
        compiled = step_of(optimizer).lower(params, state, params).compile()
        analysis: Any = compiled.memory_analysis()
        cells.append(analysis.temp_size_in_bytes / numbers)
        row(name, *(f"{each:.2f}" for each in cells))


def steps(width: int, cycles: int) -> None:
    """In each cycle one step of each; the first, which compiles, is not counted."""
    contestants: Optimizers = {"adamw": optax.adamw(1e-3), "muon": optax.contrib.muon(1e-3)}
    for method in METHODS:
        contestants |= {f"{name}, {method}": each for name, each in dions(method).items()}
    rng = np.random.default_rng(0)

    def random() -> Dict[str, jax.Array]:
        return {
            name: 0.02 * jnp.asarray(rng.standard_normal(each.shape, dtype=np.float32))
            for name, each in params_of(width).items()
        }

    grads = random()
    running: Dict[str, Any] = {}
    for name, optimizer in contestants.items():
        params = random()
        running[name] = step_of(optimizer), (params, optimizer.init(params))
    seconds: Dict[str, List[float]] = {name: [] for name in running}
    for cycle in range(cycles + 1):
        for name, (step, (params, state)) in running.items():
            start = time.perf_counter()
            after = jax.block_until_ready(step(params, state, grads))
            if cycle:
                seconds[name].append(time.perf_counter() - start)
            running[name] = step, after

    def ratios(name: str, to: str) -> str:
        of_cycles = [a / b for a, b in zip(seconds[name], seconds[to])]
        low, middle, high = statistics.quantiles(of_cycles, n=4, method="inclusive")
        return f"{middle:.3g} ({low:.3g}-{high:.3g})"

    header("optimizer", "ms a step", "to adamw, quartiles", "to muon, quartiles")
    for name in running:
        middle = 1e3 * statistics.median(seconds[name])
        row(name, f"{middle:.0f}", ratios(name, "adamw"), ratios(name, "muon"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=["communication", "memory", "steps"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--cycles", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.question == "communication":
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        communication(arguments.width)
    elif arguments.question == "memory":
        memory(arguments.width)
    else:
        steps(arguments.width, arguments.cycles)
