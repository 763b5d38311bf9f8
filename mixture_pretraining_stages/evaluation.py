"""
Validation loss of each source, by OLMo-core's evaluator.
"""

import math
from typing import Any, Dict, List, Optional

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.data import DataCollator
from olmo_core.data.composable import InstanceSource
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.eval import LMEvaluator
from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["EVALUATOR", "SourceEvaluator", "build_evaluator"]

EVALUATOR = "validation"
"""Metrics are ``eval/validation/SOURCE/...``."""


class SourceEvaluator(LMEvaluator):
    """
    Loss in nats per token and perplexity of each source, and bits per byte, which compares across
    tokenizers.

    :param bytes_per_token: Of each source; ``None`` if its text is not known.
    """

    def __init__(self, *, bytes_per_token: Dict[str, Optional[float]], **kwargs: Any):
        super().__init__(labels=list(bytes_per_token), **kwargs)
        self.bytes_per_token = bytes_per_token

    def compute_metrics(self) -> Dict[str, torch.Tensor]:
        out = super().compute_metrics()
        for label, ratio in self.bytes_per_token.items():
            if ratio is not None:
                out[f"{label}/BPB"] = out[f"{label}/CE loss"] / (ratio * math.log(2))
        return out


def build_evaluator(
    sources: Dict[str, InstanceSource],
    bytes_per_token: Dict[str, Optional[float]],
    *,
    tokens: int,
    rank_batch_size: int,
    collator: DataCollator,
    device: torch.device,
    dp_process_group: Optional[dist.ProcessGroup],
) -> SourceEvaluator:
    """
    An evaluator over held-out instances, the same at every evaluation and spread over each source.

    :param sources: Held-out instances ``(sequence_length,)`` of each source.
    :param tokens: How many to evaluate of each source, rounded down to whole instances.
    :param rank_batch_size: Tokens that a rank evaluates at a time.

    :raises OLMoConfigurationError: If a source has fewer held-out instances than there are ranks.
    """
    size, rank = get_world_size(dp_process_group), get_rank(dp_process_group)
    batches: List[Dict[str, Any]] = []
    for name, source in sources.items():
        wanted = min(tokens // source.sequence_length, len(source))
        count = wanted - wanted % size  # metrics are reduced over ranks: each has as many batches
        if count == 0:
            raise OLMoConfigurationError(
                f"evaluation.tokens: {tokens} for source '{name}' are {wanted} held-out instances, "
                f"allowed is at least one of {source.sequence_length} tokens for each "
                f"of {size} data parallel ranks"
            )
        indices = np.linspace(0, len(source) - 1, count).astype(int)[rank::size]
        step = max(1, rank_batch_size // source.sequence_length)
        for start in range(0, len(indices), step):
            items = [_item(source, int(i), name) for i in indices[start : start + step]]
            batches.append(collator(items))
    return SourceEvaluator(
        name=EVALUATOR, batches=batches, bytes_per_token=bytes_per_token, device=device
    )


def _item(source: InstanceSource, index: int, label: str) -> Dict[str, Any]:
    ids = np.asarray(source[index]["input_ids"]).astype(np.int64)
    return {"input_ids": torch.from_numpy(ids), "metadata": {"label": label}}
