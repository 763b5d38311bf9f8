"""
Muon: momentum, orthogonalised (Keller Jordan, kellerjordan.github.io/posts/muon, 2024; decoupled
weight decay and the scale that matches AdamW: Moonlight, arXiv:2502.16982).
"""

from dataclasses import dataclass
from typing import Any, Type

from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from .muon_family import MuonFamily, MuonFamilyConfig, MuonOptions

__all__ = ["Muon", "MuonConfig"]


class Muon(MuonFamily):
    """
    ``W <- (1 - lr wd) W - lr s polar(mu M + (1 - mu) g)``. For the arguments see
    :class:`MuonConfig`.

    :param params: Groups with ``algorithm`` set to ``"muon"`` or ``"adamw"``;
        ``MuonConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group follows Muon.
    """

    algorithm = "muon"

    def __init__(self, params: Any, **options: Unpack[MuonOptions]):
        super().__init__(params, {}, **options)


@OptimConfig.register("ext_muon")
@dataclass
class MuonConfig(MuonFamilyConfig[Muon]):
    """
    Config of :class:`Muon`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    @classmethod
    def optimizer(cls) -> Type[Muon]:
        return Muon
