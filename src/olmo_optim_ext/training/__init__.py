"""
What a run needs beside the optimizer.
"""

from .averaging import AveragingCallback, averaged, check_never_decays, export_averaged
from .bad_batches import LOSS_NOT_FINITE_METRIC, BadBatchCallback
from .carry_over import Decision, carry_over
from .gradient_values import ClipGradValueCallback, clip_grad_value
from .hessian import CLIPPED_METRIC, HESSIAN_SHARE_METRIC, SophiaCallback
from .hyperparameter_schedule import (
    HyperparameterSchedule,
    HyperparameterScheduleCallback,
    ScheduledField,
    check_schedule,
)
from .last_weights import LastWeightsCallback
from .lr_curve import LRSuggestion, suggest
from .lr_finder import LRFinderCallback
from .matrix_metrics import MatrixMetricsCallback, matrix_metric
from .needed import needed_callbacks
from .sharpness import SAMCallback

__all__ = [
    "CLIPPED_METRIC",
    "HESSIAN_SHARE_METRIC",
    "LOSS_NOT_FINITE_METRIC",
    "AveragingCallback",
    "BadBatchCallback",
    "ClipGradValueCallback",
    "Decision",
    "HyperparameterSchedule",
    "HyperparameterScheduleCallback",
    "LRFinderCallback",
    "LRSuggestion",
    "LastWeightsCallback",
    "MatrixMetricsCallback",
    "ScheduledField",
    "SophiaCallback",
    "SAMCallback",
    "averaged",
    "carry_over",
    "check_never_decays",
    "check_schedule",
    "clip_grad_value",
    "export_averaged",
    "matrix_metric",
    "needed_callbacks",
    "suggest",
]
