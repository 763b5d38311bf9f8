"""
OrthoNoise: Muon with orthogonal noise on a momentum of low rank (J. N. Dvorak, project-muon-nolah;
no paper).
"""

from dataclasses import dataclass
from typing import Any, Mapping, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..linalg.polar import cubic_steps
from .noise import NoiseOptions, NoisyMuon, NoisyMuonConfig

__all__ = ["MuonOrthoNoise", "MuonOrthoNoiseConfig", "orthonormal_factor"]


def orthonormal_factor(z: torch.Tensor) -> torch.Tensor:
    """
    ``Q`` of ``z = Q R``, or of ``z^T`` if wide, with a positive diagonal of ``R``: then ``Q`` does
    not depend on the library, and is uniform for Gaussian ``z`` (Mezzadri, math-ph/0609050).

    :param z: Shape ``(k, m, n)``, float32 or float64: LAPACK has no QR for half precision.

    :returns: Shape ``(k, m, n)``, of orthonormal columns, or rows if wide.
    """
    wide = z.shape[-2] < z.shape[-1]
    q, r = torch.linalg.qr(z.mT if wide else z)
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    return q.mT if wide else q


class MuonOrthoNoise(NoisyMuon):
    """
    ``polar(cubic(u + alpha_t |g|_F Q))`` with the orthonormal factor ``Q`` of a Gaussian matrix,
    and ``cubic`` some cubic Newton-Schulz steps from Frobenius norm 1. For the arguments see
    :class:`MuonOrthoNoiseConfig`.

    :param params: Groups with ``algorithm`` set to ``"muon_orthonoise"`` or ``"adamw"``;
        ``MuonOrthoNoiseConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group has matrices.
    """

    algorithm = "muon_orthonoise"

    def __init__(
        self, params: Any, ns_reorthogonalize_steps: int = 3, **options: Unpack[NoiseOptions]
    ):
        own = {"ns_reorthogonalize_steps": ns_reorthogonalize_steps}
        super().__init__(params, own, **options)

    def directions(self, gaussian: torch.Tensor) -> torch.Tensor:
        return orthonormal_factor(gaussian)

    def smooth(self, group: Mapping[str, Any], noisy: torch.Tensor) -> torch.Tensor:
        steps = group["ns_reorthogonalize_steps"]
        return cubic_steps(noisy, steps) if steps else noisy


@OptimConfig.register("muon_orthonoise")
@dataclass
class MuonOrthoNoiseConfig(NoisyMuonConfig[MuonOrthoNoise]):
    """
    Config of :class:`MuonOrthoNoise`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    ns_reorthogonalize_steps: int = 3
    """
    Cubic Newton-Schulz steps on the noisy momentum, divided by its Frobenius norm, >= 0. The number
    is that of the author's code, which does not divide.
    """

    @classmethod
    def optimizer(cls) -> Type[MuonOrthoNoise]:
        return MuonOrthoNoise
