"""
Which polar factor the optimizers that orthogonalise compute, and in what dtype.
"""

from dataclasses import dataclass
from typing import Any, Optional, TypedDict

import torch
from olmo_core.config import DType
from typing_extensions import Unpack

from ..engine.hyperparameters import check_hyperparameters, to_choice
from ..linalg.polar import PolarForm, PolarMethod, newton_schulz_flops, polar

__all__ = ["Orthogonalizer", "PolarConfig", "PolarOptions"]


class PolarOptions(TypedDict, total=False):
    """Keywords of :class:`Orthogonalizer`; for their meaning see :class:`PolarConfig`."""

    polar_method: PolarMethod
    polar_steps: int
    polar_dtype: Optional[DType]
    polar_form: PolarForm


@dataclass
class PolarConfig:
    """Fields of the configs of optimizers that orthogonalise."""

    polar_method: PolarMethod = PolarMethod.newton_schulz
    """How the orthogonal polar factor is computed."""

    polar_steps: int = 5
    """Newton-Schulz iterations, >= 1; ``svd`` has none. As in Keller Jordan's code."""

    polar_dtype: Optional[DType] = None
    """
    Dtype in which matrices travel between ranks and are orthogonalised: float32 or bfloat16.
    ``None`` takes bfloat16 for iterations on CUDA, as Keller Jordan's code does, and that of the
    state (float32) elsewhere: on CPU float32 products are the faster ones.
    """

    polar_form: PolarForm = PolarForm.auto
    """Whether iterations run on the matrix, on its Gram matrix, or on what needs fewer products."""


class Orthogonalizer:
    """
    The polar factor as :class:`PolarConfig` says.

    :param owner: For messages.

    :raises OLMoConfigurationError: If a value is not allowed.
    """

    def __init__(self, owner: str, **options: Unpack[PolarOptions]):
        values = {**_DEFAULTS, **options}
        self.method = to_choice(PolarMethod, values["polar_method"], "polar_method", owner)
        self.form = to_choice(PolarForm, values["polar_form"], "polar_form", owner)
        check_hyperparameters(values, owner)
        self.steps, dtype = values["polar_steps"], values["polar_dtype"]
        self.dtype = None if dtype is None else DType(dtype).as_pt()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The polar factor of each matrix of a stack ``(k, m, n)``, in the dtype of ``x``."""
        return polar(x, self.method, self.steps, form=self.form)

    def wire_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """See :meth:`~olmo_optim_ext.engine.matrix.MatrixOptimizer.wire_dtype`."""
        if self.dtype is not None:
            return self.dtype
        iterates = self.method != PolarMethod.svd
        if iterates and device.type == "cuda" and dtype == torch.float32:
            return torch.bfloat16
        return dtype

    def flops(self, rows: int, cols: int) -> float:
        """Floating point operations for a ``(rows, cols)`` matrix; for ``svd`` only a measure."""
        return newton_schulz_flops(rows, cols, self.steps, self.method, self.form)


_DEFAULTS: Any = {
    "polar_method": PolarMethod.newton_schulz,
    "polar_steps": 5,
    "polar_dtype": None,
    "polar_form": PolarForm.auto,
}
