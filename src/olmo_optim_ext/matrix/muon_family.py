"""
What Muon and its variants share: momentum, a polar factor, and a scale.
"""

import math
from dataclasses import dataclass
from typing import (
    Any,
    ClassVar,
    Dict,
    FrozenSet,
    Generic,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import torch
from olmo_core.config import DType, StrEnum
from typing_extensions import Unpack

from ..engine.hyperparameters import to_choice, to_flag
from ..engine.matrix import Owned
from ..engine.moments import Beta, Moment
from ..linalg.polar import PolarForm, PolarMethod
from .base import AdamWOptions, MatrixAndAdamW, MatrixAndAdamWConfig
from .orthogonal import Orthogonalizer, PolarConfig
from .reports import orthogonal_report

__all__ = ["LRScaling", "MuonFamily", "MuonFamilyConfig", "MuonOptions", "lr_scale"]


class LRScaling(StrEnum):
    """By what the orthogonal update of a ``(rows = out, cols = in)`` matrix is multiplied."""

    match_adamw_rms = "match_adamw_rms"
    """``0.2 sqrt(max(rows, cols))``: the RMS of an AdamW update (arXiv:2502.16982, section 2.2)."""

    spectral = "spectral"
    """``sqrt(rows / cols)``: unit RMS-to-RMS operator norm (arXiv:2310.17813)."""

    original = "original"
    """``sqrt(max(1, rows / cols))``: Keller Jordan's code."""


def lr_scale(scaling: str, rows: int, cols: int) -> float:
    """The factor of :class:`LRScaling`."""
    if scaling == LRScaling.match_adamw_rms:
        return 0.2 * math.sqrt(max(rows, cols))
    if scaling == LRScaling.spectral:
        return math.sqrt(rows / cols)
    return math.sqrt(max(1.0, rows / cols))


class MuonOptions(AdamWOptions, total=False):
    """Keywords of :class:`MuonFamily`; for their meaning see :class:`MuonFamilyConfig`."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    lr_scaling: LRScaling
    polar_method: PolarMethod
    polar_steps: int
    polar_dtype: Optional[DType]
    polar_form: PolarForm


class MuonFamily(MatrixAndAdamW):
    """
    ``W <- (1 - lr wd) W - lr s polar(u)``, with the scale ``s`` of :class:`LRScaling`. A variant
    says with :meth:`on_shards` what ``u`` is, and changes with :meth:`on_owner` what follows.

    :param params: Groups with ``algorithm`` set to the variant's or ``"adamw"``; ``build(model)``
        of the config makes them.
    :param own: Hyperparameters of groups that only the variant has.

    :raises OLMoConfigurationError: If a value is out of its range or no group has matrices.
    """

    matrix_buffers = ("momentum",)
    matrix_moments: ClassVar[Tuple[Moment, ...]] = (
        Moment("momentum", 1, Beta("momentum"), corrected=False),
    )

    def __init__(
        self,
        params: Any,
        own: Mapping[str, Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        lr_scaling: LRScaling = LRScaling.match_adamw_rms,
        polar_method: PolarMethod = PolarMethod.newton_schulz,
        polar_steps: int = 5,
        polar_dtype: Optional[DType] = None,
        polar_form: PolarForm = PolarForm.auto,
        **options: Unpack[AdamWOptions],
    ):
        self.polar = Orthogonalizer(
            type(self).__name__,
            polar_method=polar_method,
            polar_steps=polar_steps,
            polar_dtype=polar_dtype,
            polar_form=polar_form,
        )
        defaults = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            lr_scaling=str(lr_scaling),
            **own,
        )
        super().__init__(params, defaults, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        to_choice(LRScaling, group["lr_scaling"], "lr_scaling", name)
        to_flag(group["nesterov"], "nesterov", name)

    def wire_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self.polar.wire_dtype(dtype, device)

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        """
        ``M <- mu M + (1 - mu) g``; to be orthogonalised is ``mu M + (1 - mu) g`` with the new ``M``
        (Nesterov) or ``M``.
        """
        mu = group["momentum"]
        momentum = buffers[0] * mu + grad * (1 - mu)
        return momentum * mu + grad * (1 - mu) if group["nesterov"] else momentum, momentum

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        return self.polar(owned.x), {}

    def report(
        self, group: Mapping[str, Any], owned: Owned, updates: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        scale = self.scale(group, *updates.shape[-2:])
        return orthogonal_report(owned, updates, scale, self._seed)

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return lr_scale(group["lr_scaling"], n_out, n_in)

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return self.polar.flops(n_out, n_in)


Opt = TypeVar("Opt", bound=MuonFamily)


@dataclass
class MuonFamilyConfig(PolarConfig, MatrixAndAdamWConfig[Opt], Generic[Opt]):
    """
    Fields of the configs of Muon and its variants. Embeddings, head and vectors follow AdamW
    (``adamw_*``).
    """

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = MatrixAndAdamWConfig.CONFIG_ONLY | {"muon_on_lm_head"}

    lr: float = 0.01
    """
    Learning rate of matrices, >= 0; with ``match_adamw_rms`` one that suits AdamW. As in
    OLMo-core's ``MuonConfig``.
    """

    momentum: float = 0.95
    """Decay ``mu`` of the momentum, in [0, 1). As in Keller Jordan's code."""

    nesterov: bool = True
    """Look one step ahead. As in Keller Jordan's code and ``torch.optim.Muon``."""

    weight_decay: float = 0.1
    """
    Decoupled: a step multiplies matrices by ``1 - lr * weight_decay``, whatever ``lr_scaling``.
    >= 0. As in ``torch.optim.Muon`` and arXiv:2502.16982.
    """

    lr_scaling: LRScaling = LRScaling.match_adamw_rms
    """How the update's size follows the matrix's shape."""

    muon_on_lm_head: bool = False
    """Orthogonalise the head too, unless it is tied to the embedding."""

    def takes_head(self) -> bool:
        return self.muon_on_lm_head
