"""
Muon: momentum, orthogonalised (Keller Jordan, kellerjordan.github.io/posts/muon, 2024; decoupled
weight decay and the scale that matches AdamW: Moonlight, arXiv:2502.16982).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, FrozenSet, Mapping, Optional, Sequence, Tuple, Type

import torch
from olmo_core.config import DType, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import MatrixOptimConfig
from ..engine.hyperparameters import check_hyperparameters, to_choice, to_flag
from ..engine.matrix import MatrixOptions, Owned
from ..linalg.polar import PolarMethod, newton_schulz_flops, polar
from .base import MatrixAndAdamW

__all__ = ["LRScaling", "Muon", "MuonConfig"]


class LRScaling(StrEnum):
    """By what the orthogonal update of a ``(rows = out, cols = in)`` matrix is multiplied."""

    match_adamw_rms = "match_adamw_rms"
    """``0.2 sqrt(max(rows, cols))``: the RMS of an AdamW update (arXiv:2502.16982, section 2.2)."""

    spectral = "spectral"
    """``sqrt(rows / cols)``: unit RMS-to-RMS operator norm (arXiv:2310.17813)."""

    original = "original"
    """``sqrt(max(1, rows / cols))``: Keller Jordan's code."""


def momentum_shards(
    grad: torch.Tensor, momentum: torch.Tensor, mu: float, nesterov: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    ``M <- mu M + (1 - mu) g``; to be orthogonalised is ``mu M + (1 - mu) g`` with the new ``M``
    (Nesterov) or ``M``.
    """
    momentum = momentum * mu + grad * (1 - mu)
    return momentum * mu + grad * (1 - mu) if nesterov else momentum, momentum


def lr_scale(scaling: str, rows: int, cols: int) -> float:
    """The factor of :class:`LRScaling`."""
    if scaling == LRScaling.match_adamw_rms:
        return 0.2 * math.sqrt(max(rows, cols))
    if scaling == LRScaling.spectral:
        return math.sqrt(rows / cols)
    return math.sqrt(max(1.0, rows / cols))


def _polar_dtype(dtype: Any, owner: str) -> torch.dtype:
    if dtype not in (DType.float32, DType.bfloat16):
        raise OLMoConfigurationError(
            f"{owner}: 'polar_dtype' is {dtype!r}, allowed are float32 and bfloat16"
        )
    return DType(dtype).as_pt()


class Muon(MatrixAndAdamW):
    """
    ``W <- (1 - lr wd) W - lr s polar(mu M + (1 - mu) g)``, with the scale ``s`` of
    :class:`LRScaling`. For the arguments see :class:`MuonConfig`.

    :param params: Groups with ``algorithm`` set to ``"muon"`` or ``"adamw"``;
        ``MuonConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group follows Muon.
    """

    algorithm = "muon"
    matrix_buffers = ("momentum",)

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        lr_scaling: LRScaling = LRScaling.match_adamw_rms,
        polar_method: PolarMethod = PolarMethod.newton_schulz,
        polar_steps: int = 5,
        polar_dtype: Optional[DType] = None,
        adamw_lr: Optional[float] = None,
        adamw_betas: Tuple[float, ...] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: Optional[float] = None,
        **options: Unpack[MatrixOptions],
    ):
        name = type(self).__name__
        self._polar_method = to_choice(PolarMethod, polar_method, "polar_method", name)
        self._polar_steps = polar_steps
        check_hyperparameters({"polar_steps": polar_steps}, name)
        self._polar_dtype = None if polar_dtype is None else _polar_dtype(polar_dtype, name)
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                lr_scaling=str(lr_scaling),
            ),
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            **options,
        )

    def check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        to_choice(LRScaling, group["lr_scaling"], "lr_scaling", name)
        to_flag(group["nesterov"], "nesterov", name)

    def wire_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        if self._polar_dtype is not None:
            return self._polar_dtype
        iterates = self._polar_method == PolarMethod.newton_schulz
        if iterates and device.type == "cuda" and dtype == torch.float32:
            return torch.bfloat16
        return dtype

    def on_shards(
        self, group: Mapping[str, Any], grad: torch.Tensor, buffers: Sequence[torch.Tensor]
    ) -> Tuple[torch.Tensor, ...]:
        return momentum_shards(grad, buffers[0], group["momentum"], group["nesterov"])

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        return polar(owned.x, self._polar_method, self._polar_steps), {}

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return lr_scale(group["lr_scaling"], n_out, n_in)

    def cost(self, n_out: int, n_in: int) -> float:
        return newton_schulz_flops(n_out, n_in, self._polar_steps)


@OptimConfig.register("ext_muon")
@dataclass
class MuonConfig(MatrixOptimConfig[Muon]):
    """
    Config of :class:`Muon`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = MatrixOptimConfig.CONFIG_ONLY | {"muon_on_lm_head"}

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

    polar_method: PolarMethod = PolarMethod.newton_schulz
    """How momentum is orthogonalised."""

    polar_steps: int = 5
    """Newton-Schulz iterations, >= 1; ``svd`` has none. As in Keller Jordan's code."""

    polar_dtype: Optional[DType] = None
    """
    Dtype in which matrices travel between ranks and are orthogonalised: float32 or bfloat16.
    ``None`` takes bfloat16 for Newton-Schulz on CUDA, as Keller Jordan's code does, and that of the
    state (float32) elsewhere: on CPU float32 products are the faster ones.
    """

    muon_on_lm_head: bool = False
    """Orthogonalise the head too, unless it is tied to the embedding."""

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        if self.polar_dtype is not None:
            _polar_dtype(self.polar_dtype, type(self).__name__)

    def takes_head(self) -> bool:
        return self.muon_on_lm_head

    @classmethod
    def optimizer(cls) -> Type[Muon]:
        return Muon
