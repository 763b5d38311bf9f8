"""
Dion: momentum, orthonormalised in a subspace that follows it (Ahn et al., arXiv:2504.05295,
algorithm 1 and, for sharded matrices, 3).
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Tuple, Type

import torch
from olmo_core.config import StrEnum
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..engine.hyperparameters import to_choice
from ..engine.low_rank import LowRankOptimizer
from ..engine.random import generator
from ..engine.roles import ParamRole, Role
from ..linalg.orthonormal import Orthonormalization, orthonormalize
from .base import AdamWForOthers, AdamWOptions, MatrixAndAdamWConfig
from .reports import thin_report

__all__ = ["Dion", "DionConfig", "OrthonormalSide"]


ROUNDING = 64
"""Columns of ``R`` that are shorter than this many roundings of the longest are taken for zero."""


class OrthonormalSide(StrEnum):
    """Which side of the update ``P V^T`` is orthonormal: it needs the work, the other is state."""

    longer = "longer"
    """The longer one; the outputs of a square matrix. The authors' choice on one device."""

    inputs = "inputs"
    """That of the inputs: with sharded rows the least to send, and no rank has a whole basis."""

    outputs = "outputs"
    """That of the outputs."""


def thin_rank(fraction: float, multiple_of: int, n_out: int, n_in: int) -> int:
    """``r``: a fraction of the smaller side, rounded up to a multiple, at most that side."""
    smaller = min(n_out, n_in)
    return min(smaller, multiple_of * math.ceil(fraction * smaller / multiple_of))


class Dion(AdamWForOthers, LowRankOptimizer):
    """
    With ``A`` the matrix or its transpose, as :class:`OrthonormalSide` says, and momentum and
    weights taken likewise::

        M <- M + g
        P  = orthonormal(M V),  R = M^T P
        M <- M - (1 - mu) P R^T                   (error feedback)
        V <- R_j / (|R_j| + eps), column by column
        W <- (1 - lr wd) W - lr sqrt(out / in) P V^T

    For the arguments see :class:`DionConfig`.

    :param params: Groups with ``algorithm`` set to ``"dion"`` or ``"adamw"``;
        ``DionConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group follows Dion.
    """

    algorithm = "dion"
    matrix_buffers = ("momentum",)

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rank_fraction: float = 1.0,
        rank_multiple_of: int = 1,
        orthonormal_side: OrthonormalSide = OrthonormalSide.longer,
        orthonormalization: Orthonormalization = Orthonormalization.rcqr,
        basis_eps: float = 1e-8,
        **options: Unpack[AdamWOptions],
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            rank_fraction=rank_fraction,
            rank_multiple_of=rank_multiple_of,
            orthonormal_side=str(orthonormal_side),
            orthonormalization=str(orthonormalization),
            basis_eps=basis_eps,
        )
        super().__init__(params, defaults, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        to_choice(OrthonormalSide, group["orthonormal_side"], "orthonormal_side", name)
        to_choice(Orthonormalization, group["orthonormalization"], "orthonormalization", name)

    def thin_rank(self, group: Mapping[str, Any], n_out: int, n_in: int) -> int:
        return thin_rank(group["rank_fraction"], group["rank_multiple_of"], n_out, n_in)

    def transposes(self, group: Mapping[str, Any], n_out: int, n_in: int) -> bool:
        if group["orthonormal_side"] == OrthonormalSide.longer:
            return n_out < n_in
        return group["orthonormal_side"] == OrthonormalSide.inputs

    def fill_factor(
        self,
        group: Mapping[str, Any],
        name: str,
        factor: torch.Tensor,
        matrix: str,
        shape: Tuple[int, int],
    ) -> None:
        factor.normal_(generator=generator(self._seed, 0, matrix, name, factor.device))

    def on_shards(
        self, group: Mapping[str, Any], grad: torch.Tensor, momentum: torch.Tensor
    ) -> torch.Tensor:
        return momentum + grad

    def on_owner(
        self, group: Mapping[str, Any], product: torch.Tensor, call: int, name: str
    ) -> torch.Tensor:
        sketch = generator(self._seed, call, name, "sketch", product.device)
        method = Orthonormalization(group["orthonormalization"])
        return orthonormalize(product.unsqueeze(0), method, [sketch])[0]

    def next_basis(
        self, group: Mapping[str, Any], r: torch.Tensor, lengths: torch.Tensor, basis: torch.Tensor
    ) -> torch.Tensor:
        longest = lengths.max()
        # Of a direction that M does not have R is rounding, which must not grow to unit length.
        there = lengths > ROUNDING * torch.finfo(r.dtype).eps * longest
        normed = torch.where(there, r / (lengths + group["basis_eps"]), 0.0)
        # Where M is zero, P and R are, and the basis stays.
        return torch.where(longest > 0, normed, basis)

    def report(
        self, group: Mapping[str, Any], gram: torch.Tensor, n_out: int, n_in: int
    ) -> Dict[str, torch.Tensor]:
        lengths = gram.diagonal().sqrt() + group["basis_eps"]
        return thin_report(gram, lengths, n_out, n_in, self.scale(group, n_out, n_in))

    def subtracted(self, group: Mapping[str, Any]) -> float:
        return 1 - group["momentum"]

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return math.sqrt(n_out / n_in)

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        # Randomised Cholesky QR; what matters is how matrices compare, which all have one rank.
        return 6.5 * max(n_out, n_in) * min(n_out, n_in) ** 2

    def flops(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        r = self.thin_rank(group, n_out, n_in)
        a = n_in if self.transposes(group, n_out, n_in) else n_out
        by_qr = group["orthonormalization"] == Orthonormalization.qr
        # A V, A^T P, P R^T and P V^T, then what makes P orthonormal.
        return 8.0 * n_out * n_in * r + (4.0 if by_qr else 6.5) * a * r**2


@OptimConfig.register("ext_dion")
@dataclass
class DionConfig(MatrixAndAdamWConfig[Dion]):
    """
    Config of :class:`Dion`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    CONFIG_ONLY = MatrixAndAdamWConfig.CONFIG_ONLY | {"scale_head_lr"}

    lr: float = 0.01
    """Learning rate of matrices, >= 0; one that suits AdamW. As in the authors' code."""

    momentum: float = 0.95
    """
    ``mu``, in [0, 1): a step subtracts ``1 - mu`` of what it applied from the momentum, which does
    not decay otherwise. As in the authors' code.
    """

    weight_decay: float = 0.01
    """
    Decoupled: a step multiplies matrices by ``1 - lr * weight_decay``. >= 0. As in the authors'
    code.
    """

    rank_fraction: float = 1.0
    """
    Rank of the update, as a share of the smaller side of a matrix, in (0, 1]. As in the authors'
    code.
    """

    rank_multiple_of: int = 1
    """The rank is rounded up to a multiple of this, >= 1. As in the authors' code."""

    orthonormal_side: OrthonormalSide = OrthonormalSide.longer
    """Which side is orthonormalised; the other one's factor is kept as state."""

    orthonormalization: Orthonormalization = Orthonormalization.rcqr
    """How: by randomised Cholesky QR or by Householder QR. As in the authors' code."""

    basis_eps: float = 1e-8
    """Added to the length of each column of ``R``, > 0. As in the authors' code."""

    scale_head_lr: bool = False
    """
    Divide the head's learning rate by ``sqrt(d_in)``, as the paper does, and OLMo-core's Dion;
    unless ``group_overrides`` set it. The authors' code leaves it to the user.
    """

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        fields = super().group_fields(row, opts)
        if self.scale_head_lr and row.role == Role.head:
            lr = self.lr if self.adamw_lr is None else self.adamw_lr
            fields["lr"] = lr / math.sqrt(row.shape[-1])
        return fields

    @classmethod
    def optimizer(cls) -> Type[Dion]:
        return Dion
