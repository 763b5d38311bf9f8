"""
What a run needs beside the optimizer.
"""

from .bad_batches import LOSS_NOT_FINITE_METRIC, BadBatchCallback
from .hessian import CLIPPED_METRIC, HESSIAN_SHARE_METRIC, SophiaCallback
from .matrix_metrics import MatrixMetricsCallback, matrix_metric

__all__ = [
    "CLIPPED_METRIC",
    "HESSIAN_SHARE_METRIC",
    "LOSS_NOT_FINITE_METRIC",
    "BadBatchCallback",
    "MatrixMetricsCallback",
    "SophiaCallback",
    "matrix_metric",
]
