"""
What a run needs beside the optimizer.
"""

from .bad_batches import LOSS_NOT_FINITE_METRIC, BadBatchCallback
from .matrix_metrics import MatrixMetricsCallback, matrix_metric

__all__ = [
    "LOSS_NOT_FINITE_METRIC",
    "BadBatchCallback",
    "MatrixMetricsCallback",
    "matrix_metric",
]
