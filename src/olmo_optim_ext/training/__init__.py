"""
What a run needs beside the optimizer.
"""

from .bad_batches import LOSS_NOT_FINITE_METRIC, BadBatchCallback

__all__ = ["LOSS_NOT_FINITE_METRIC", "BadBatchCallback"]
