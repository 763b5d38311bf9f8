"""
Products in full float32, whatever the process has chosen for others.
"""

from contextlib import ContextDecorator
from typing import Any, List

import torch

__all__ = ["full_precision"]

_mkldnn: Any = torch.backends.mkldnn  # mypy does not see what it has
BACKENDS: List[Any] = [torch.backends.cuda.matmul, _mkldnn.matmul]


class full_precision(ContextDecorator):
    """
    Within it float32 products are float32: no TF32 or bfloat16, in which a Gram matrix loses what
    Cholesky and Lanczos need. A setting of the host; that it has this effect on CUDA was only
    reasoned.
    """

    def __init__(self) -> None:
        self._before: List[List[str]] = []

    def __enter__(self) -> None:
        self._before.append([backend.fp32_precision for backend in BACKENDS])
        for backend in BACKENDS:
            backend.fp32_precision = "ieee"

    def __exit__(self, *error: Any) -> None:
        for backend, precision in zip(BACKENDS, self._before.pop()):
            backend.fp32_precision = precision
