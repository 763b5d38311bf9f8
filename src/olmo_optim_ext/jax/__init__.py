"""
Optimizers for JAX, as Optax transformations. They need the extra ``jax``:
``pip install 'olmo-optim-ext[jax]'``.

The modules here import JAX, Optax and NumPy only, so that they can be copied out; to import them
from here imports the package, too, and with it torch. Nothing else of the package needs them.
"""

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("jax", "jaxlib", "optax"):
        raise
    raise ImportError(
        f"olmo_optim_ext.jax needs {error.name}: pip install 'olmo-optim-ext[jax]'"
    ) from error

from ._dion import ScaleByDionState, dion, scale_by_dion
from .matrices import matrix_dimension_numbers
from .orthonormal import orthonormalize

__all__ = [
    "ScaleByDionState",
    "dion",
    "matrix_dimension_numbers",
    "orthonormalize",
    "scale_by_dion",
]
