"""
The parts of a spec: stages, mixtures, parallelism, and when something is done.
"""

from dataclasses import dataclass
from typing import Any, Dict, NamedTuple, Optional, Union

from olmo_core.config import StrEnum

__all__ = [
    "CheckpointSpec",
    "DataParallelism",
    "EvaluationSpec",
    "OptimizerMetricsSpec",
    "ParallelismSpec",
    "Precision",
    "ShareSpec",
    "StageSizes",
    "StageSpec",
    "WarmStartSpec",
]


class Precision(StrEnum):
    """In what the forward and the backward pass compute. Parameters are float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    """Autocast."""


class DataParallelism(StrEnum):
    """How ranks share the data, and the model's state."""

    none = "none"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


@dataclass
class ParallelismSpec:
    """How ranks share the work. With one rank nothing of it applies."""

    data: DataParallelism = DataParallelism.fsdp
    replicas: int = 1
    """Copies of the sharded model, with ``hsdp``."""
    tensor: int = 1
    """Ranks that share each layer."""


@dataclass
class ShareSpec:
    """
    How much of a stage is from a source: exactly one of :attr:`weight`, :attr:`tokens` and
    :attr:`repetitions`.
    """

    weight: Optional[float] = None
    """Relative to other weights, of what :attr:`tokens` and :attr:`repetitions` leave."""
    tokens: Optional[int] = None
    """So many tokens."""
    repetitions: Optional[float] = None
    """So often all of the source's training tokens."""
    max_repetitions: Optional[float] = None
    """
    No token more often than this. What a weight would ask for beyond it goes to the other weights.
    """


@dataclass
class StageSpec:
    """A part of the run with a mixture of its own. What is ``null`` is the run's."""

    name: str
    tokens: int
    """Rounded up to whole batches."""
    mixture: Dict[str, Union[float, ShareSpec]]
    """For each source its weight, or a :class:`ShareSpec`."""
    lr_scale: float = 1.0
    """The schedule's learning rate is multiplied by this."""
    warmup: Optional[int] = None
    """
    Steps in which the learning rate rises linearly to the schedule's, at the start of the stage. By
    default none; where the optimizer is another than in the stage before, a twentieth of the
    stage's, at least 1 and at most 100.
    """
    scheduler: Optional[Dict[str, Any]] = None
    """``type``, and any field of that scheduler. It runs over this stage alone."""
    optimizer: Optional[Dict[str, Any]] = None
    """``name``, and any field of that optimizer's config."""
    sequence_length: Optional[int] = None
    global_batch_size: Optional[int] = None
    """In tokens."""
    rank_microbatch_size: Optional[int] = None
    """In tokens."""


class StageSizes(NamedTuple):
    """Sizes of a stage, in tokens."""

    sequence_length: int
    global_batch_size: int
    rank_microbatch_size: int


@dataclass
class WarmStartSpec:
    """What the first stage begins with, in place of random weights."""

    path: str
    """
    The folder of a checkpoint of OLMo-core's, of a model of the same shape: a ``stepN``, or only
    its ``model_and_optim``.
    """
    optimizer_state: bool = False
    """Begin with the state of its optimizer, too. The weights alone if not."""
    optimizer: Optional[Dict[str, Any]] = None
    """
    The optimizer that has left the state: ``name`` and fields, as for a run; ``null`` is the first
    stage's. Of another one goes over what means the same in both.
    """


@dataclass
class EvaluationSpec:
    every: int = 100
    """In steps; the end of a stage is always evaluated."""
    tokens: int = 65_536
    """Held-out tokens of an evaluation, shared evenly by the sources."""


@dataclass
class CheckpointSpec:
    every: int = 100
    """In steps; the end of a stage is always saved."""
    keep: int = 2
    """Checkpoints kept of each stage."""


@dataclass
class OptimizerMetricsSpec:
    """What an optimizer for matrices reports of them: see ``MatrixMetricsCallback``."""

    every: int = 50
    """In steps."""
    per_layer: bool = True
    """Also each parameter on its own, beside the means over roles."""
