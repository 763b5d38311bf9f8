"""
Products in full float32, whatever the process has chosen for others.
"""

from contextlib import ContextDecorator
from typing import Any, List

import torch

__all__ = ["full_precision"]


class full_precision(ContextDecorator):
    """
    Within it float32 products are float32: no TF32 or bfloat16, in which a Gram matrix loses what
    Cholesky and Lanczos need. A setting of the host; that it has this effect on CUDA was only
    reasoned.
    """

    def __init__(self) -> None:
        self._before: List[str] = []

    def __enter__(self) -> None:
        self._before.append(torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *error: Any) -> None:
        torch.set_float32_matmul_precision(self._before.pop())
