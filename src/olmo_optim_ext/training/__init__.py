"""
What a run needs beside the optimizer.
"""

from .bad_batches import LOSS_NOT_FINITE_METRIC, BadBatchCallback
from .hessian import CLIPPED_METRIC, HESSIAN_SHARE_METRIC, SophiaCallback
from .last_weights import LastWeightsCallback
from .matrix_metrics import MatrixMetricsCallback, matrix_metric

__all__ = [
    "CLIPPED_METRIC",
    "HESSIAN_SHARE_METRIC",
    "LOSS_NOT_FINITE_METRIC",
    "BadBatchCallback",
    "LastWeightsCallback",
    "MatrixMetricsCallback",
    "SophiaCallback",
    "matrix_metric",
]
