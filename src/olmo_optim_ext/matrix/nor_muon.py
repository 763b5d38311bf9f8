"""
NorMuon: Muon whose update has rows of like size (Li et al., arXiv:2510.05491, algorithm 1).
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..engine.matrix import Owned
from .muon_family import LRScaling, MuonFamily, MuonFamilyConfig, MuonOptions

__all__ = ["NorMuon", "NorMuonConfig"]

SECOND_MOMENT = "row_exp_avg_sq"


def normalise_rows(
    o: torch.Tensor, second_moment: torch.Tensor, beta2: float, eps: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    ``v <- b2 v + (1 - b2) mean_cols(O^2)``; the update is ``O / (sqrt(v) + eps)``, scaled to the
    Frobenius norm of ``O``.

    :param o: Orthogonal factors, ``(k, out, in)``.
    :param second_moment: ``v``, one number a neuron, ``(k, out)``.
    """
    squares = o.to(second_moment.dtype).square()
    second_moment = second_moment * beta2 + squares.mean(-1) * (1 - beta2)
    update = o.to(second_moment.dtype) / (second_moment.sqrt() + eps).unsqueeze(-1)
    norm = squares.sum((-2, -1), keepdim=True).sqrt()
    new_norm = update.square().sum((-2, -1), keepdim=True).sqrt()
    # A zero matrix has no norm to divide by, and stays zero.
    return update * (norm / torch.where(new_norm > 0, new_norm, 1.0)), second_moment


class NorMuon(MuonFamily):
    """
    Muon, then :func:`normalise_rows`. For the arguments see :class:`NorMuonConfig`.

    :param params: Groups with ``algorithm`` set to ``"nor_muon"`` or ``"adamw"``;
        ``NorMuonConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group follows NorMuon.
    """

    algorithm = "nor_muon"

    def __init__(
        self,
        params: Any,
        beta2: float = 0.95,
        row_eps: float = 1e-10,
        **options: Unpack[MuonOptions],
    ):
        muon: MuonOptions = {
            "lr": 0.02,
            "weight_decay": 0.0,
            "lr_scaling": LRScaling.original,
            "adamw_lr": 0.003,
            **options,
        }
        super().__init__(params, {"beta2": beta2, "row_eps": row_eps}, **muon)

    def factor_shapes(
        self, group: Mapping[str, Any], n_out: int, n_in: int
    ) -> Dict[str, Tuple[int, ...]]:
        return {SECOND_MOMENT: (n_out,)}

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        second_moment = owned.factors[SECOND_MOMENT]
        update, second_moment = normalise_rows(
            self.polar(owned.x), second_moment, group["beta2"], group["row_eps"]
        )
        return update, {SECOND_MOMENT: second_moment}


@OptimConfig.register("ext_nor_muon")
@dataclass
class NorMuonConfig(MuonFamilyConfig[NorMuon]):
    """
    Config of :class:`NorMuon`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    lr: float = 0.02
    """Learning rate of matrices, >= 0. As in the authors' code."""

    weight_decay: float = 0.0
    """
    Decoupled: a step multiplies matrices by ``1 - lr * weight_decay``, whatever ``lr_scaling``.
    >= 0. As in the authors' code.
    """

    lr_scaling: LRScaling = LRScaling.original
    """How the update's size follows the matrix's shape. As in the authors' code."""

    beta2: float = 0.95
    """Decay of the second moment of each row (neuron), in [0, 1). As in the authors' code."""

    row_eps: float = 1e-10
    """Added to the root of the second moment of a row, > 0. As in the authors' code."""

    adamw_lr: Optional[float] = 0.003
    """
    Learning rate of the parameters that follow AdamW, >= 0. ``None`` takes ``lr``, which suits
    matrices only. Not of the authors, whose optimizer has no such part.
    """

    @classmethod
    def optimizer(cls) -> Type[NorMuon]:
        return NorMuon
