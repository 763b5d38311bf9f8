"""
What a run needs beside the optimizer.
"""

from .averaging import AveragingCallback, averaged, check_never_decays, export_averaged
from .bad_batches import LOSS_NOT_FINITE_METRIC, BadBatchCallback
from .matrix_metrics import MatrixMetricsCallback, matrix_metric
from .sharpness import SAMCallback

__all__ = [
    "LOSS_NOT_FINITE_METRIC",
    "AveragingCallback",
    "BadBatchCallback",
    "MatrixMetricsCallback",
    "SAMCallback",
    "averaged",
    "check_never_decays",
    "export_averaged",
    "matrix_metric",
]
