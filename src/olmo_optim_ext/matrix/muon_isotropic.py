"""
The control of ``muon_orthonoise``: Gaussian noise of the same Frobenius norm, and nothing else
(J. N. Dvorak, project-muon-nolah; no paper).
"""

from dataclasses import dataclass
from typing import Any, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from .noise import NoiseOptions, NoisyMuon, NoisyMuonConfig

__all__ = ["MuonIsotropic", "MuonIsotropicConfig"]


class MuonIsotropic(NoisyMuon):
    """
    ``polar(u + alpha_t |g|_F sqrt(min(out, in)) Z / |Z|_F)`` with a Gaussian matrix ``Z``: the norm
    is that of orthonormal noise. For the arguments see :class:`MuonIsotropicConfig`.

    :param params: Groups with ``algorithm`` set to ``"muon_isotropic"`` or ``"adamw"``;
        ``MuonIsotropicConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group has matrices.
    """

    algorithm = "muon_isotropic"

    def __init__(self, params: Any, **options: Unpack[NoiseOptions]):
        super().__init__(params, {}, **options)

    def directions(self, gaussian: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.matrix_norm(gaussian, keepdim=True)
        return gaussian * (min(gaussian.shape[-2:]) ** 0.5 / norm)


@OptimConfig.register("muon_isotropic")
@dataclass
class MuonIsotropicConfig(NoisyMuonConfig[MuonIsotropic]):
    """
    Config of :class:`MuonIsotropic`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    @classmethod
    def optimizer(cls) -> Type[MuonIsotropic]:
        return MuonIsotropic
