"""
Products of arrays that may be sharded, and state on the devices of the parameters.

With mesh axes of type ``Auto`` the compiler places results. With axes of type ``Explicit`` the
program has to place each product that sums over a sharded axis: here always where its own axes are
in the operands.
"""

from typing import Any, Iterable, Optional, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

try:
    from jax.sharding import reshard as place
except ImportError:  # before JAX 0.7, and so on Python 3.10
    from jax.experimental.shard import reshard as place  # type: ignore[no-redef]

__all__ = ["beside", "contract", "explicit_sharding", "like_axes", "reshard"]


def contract(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """
    ``jnp.einsum``, of two arrays of one dtype, without ``"..."``.

    The highest precision is asked for: by default accelerators round float32 operands of products,
    TPUs to bfloat16 and recent GPUs to TF32, of which three to four digits are left.
    """
    operands, output = subscripts.split("->")
    placed: dict[str, Any] = {}
    mesh = None
    for labels, operand in zip(operands.split(","), (x, y)):
        sharding = explicit_sharding(operand)
        if sharding is None:
            continue
        mesh = sharding.mesh
        for label, axis in zip(labels, sharding.spec):
            if axis is not None:
                placed.setdefault(label, axis)
    if mesh is None:
        return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST)
    # A whole operand is cut as the other one is, which moves nothing; left alone, the compiler may
    # bring the other one together.
    specs = [
        NamedSharding(mesh, PartitionSpec(*map(placed.get, labels)))
        for labels in (*operands.split(","), output)
    ]
    x, y = place((x, y), (specs[0], specs[1]))
    return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST, out_sharding=specs[2])


def explicit_sharding(x: jax.Array) -> Optional[NamedSharding]:
    """The sharding that is part of the type of ``x``, if its mesh has explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def reshard(x: jax.Array, like: NamedSharding, spec: Iterable[Any]) -> jax.Array:
    """``x`` with its axes over these of a mesh with explicit ones."""
    return place(x, NamedSharding(like.mesh, PartitionSpec(*spec)))


def like_axes(x: jax.Array, like: jax.Array, axes: Sequence[Optional[int]]) -> jax.Array:
    """
    ``x``, on the devices of ``like``, its axes divided as these of ``like``, and whole where the
    axis is ``None``. What is traced with axes of type ``Auto`` stays where the compiler puts it.
    """

    def spec(sharding: NamedSharding) -> PartitionSpec:
        divided = dict(enumerate(sharding.spec))
        return PartitionSpec(*(None if axis is None else divided.get(axis) for axis in axes))

    fixed = _fixed(like)
    if fixed is None:
        sharding = explicit_sharding(like) if isinstance(like, jax.core.Tracer) else None
        return x if sharding is None else reshard(x, sharding, spec(sharding))
    if isinstance(fixed, NamedSharding):
        fixed = NamedSharding(fixed.mesh, spec(fixed))
    return jax.device_put(x, fixed)


def beside(state: Any, params: Any) -> Any:
    """
    ``state`` with whole copies of what is on no device yet, such as counters, on all devices of the
    parameters, where a step will leave them: the second step would compile anew otherwise.
    """
    all_fixed = (_fixed(param) for param in jax.tree.leaves(params))
    fixed = next((each for each in all_fixed if each is not None), None)
    if isinstance(fixed, NamedSharding):
        fixed = NamedSharding(fixed.mesh, PartitionSpec())

    def put(x: Any) -> Any:
        waits = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.committed
        return jax.device_put(x, fixed) if waits else x

    return state if fixed is None else jax.tree.map(put, state)


def _fixed(x: Any) -> Optional[Sharding]:
    """Where ``x`` has to stay: ``None`` if it is traced, or JAX may move it as it likes."""
    stays = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    return x.sharding if stays else None
