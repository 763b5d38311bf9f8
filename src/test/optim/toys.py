"""
Rules that are in no catalogue: one that uses what no optimizer here uses yet, and broken ones, on
which the contracts must fail.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Type

import torch
from typing_extensions import Unpack

from olmo_optim_ext import AdamW, CautiousAdamW, CautiousAdamWConfig, Muon, MuonConfig
from olmo_optim_ext.config import MatrixOptimConfig
from olmo_optim_ext.elementwise.moments import MOMENTS, adam_moments, adam_scalars
from olmo_optim_ext.engine.base import GroupWork
from olmo_optim_ext.engine.elementwise import ElementwiseRule
from olmo_optim_ext.engine.matrix import MatrixOptions, Owned
from olmo_optim_ext.matrix.base import MatrixAndAdamW


class Whitening(MatrixAndAdamW):
    """
    Full-matrix whitening from the left by an EMA of Gram matrices, and a diagonal from the right:
    ``L <- (L + x x^T) / 2``, ``r <- (r + column sums of x^2) / 2``,
    ``update = (L + 0.01 I)^-1/2 x / sqrt(r + 0.01)``.
    """

    algorithm = "whitening"
    matrix_buffers = ("momentum",)

    def __init__(self, params: Any, lr: float = 0.01, **options: Unpack[MatrixOptions]):
        defaults = dict(lr=lr, weight_decay=0.0)
        super().__init__(params, defaults, **options)

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        momentum = buffers[0] * 0.9 + grad * 0.1
        return momentum, momentum

    def factor_shapes(
        self, group: Mapping[str, Any], n_out: int, n_in: int
    ) -> Dict[str, Tuple[int, ...]]:
        return {"gram": (n_out, n_out), "columns": (n_in,)}

    def fill_factor(
        self,
        group: Mapping[str, Any],
        name: str,
        factor: torch.Tensor,
        matrix: str,
        shape: Tuple[int, int],
    ) -> None:
        if name == "gram":
            factor.diagonal().fill_(0.001)

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        x = owned.x
        gram = (owned.factors["gram"] + x @ x.mT) / 2
        columns = (owned.factors["columns"] + x.square().sum(1)) / 2
        values, vectors = torch.linalg.eigh(gram.double())
        whiten = (vectors * (values + 0.01).rsqrt().unsqueeze(-2)) @ vectors.mT
        update = whiten.to(x.dtype) @ x / (columns + 0.01).sqrt().unsqueeze(1)
        return update, {"gram": gram, "columns": columns}

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return 1.0

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return float(n_out) ** 3


@dataclass
class WhiteningConfig(MatrixOptimConfig[Whitening]):
    lr: float = 0.01

    @classmethod
    def optimizer(cls) -> Type[Whitening]:
        return Whitening


class ShardLocalMuon(Muon):
    """Each rank takes its rows for the matrix."""

    def _update_by_rows(self, jobs: Any, process_group: Any) -> None:
        for job in jobs:
            x = job.view(self._on_shards(job))
            if x.numel() == 0:
                continue
            update = self.polar(x.unsqueeze(0))[0]
            self.apply_update(job, job.weights(), update, self._scale(job, 0))


def _masked_by_shard(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    step_size, rsqrt_correction2, eps, *betas = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    mask = exp_avg * grad > 0
    step = torch.where(mask, exp_avg / (exp_avg_sq.sqrt() * rsqrt_correction2 + eps), 0.0)
    return step_size / mask.float().mean().clamp(min=1e-3) * step, exp_avg, exp_avg_sq


class PerShardMask(CautiousAdamW):
    """The mean of the mask is that of each rank's part."""

    rule = ElementwiseRule(MOMENTS, adam_scalars, _masked_by_shard)


@dataclass
class ShardLocalMuonConfig(MuonConfig):
    @classmethod
    def optimizer(cls) -> Type[Muon]:
        return ShardLocalMuon


@dataclass
class PerShardMaskConfig(CautiousAdamWConfig):
    @classmethod
    def optimizer(cls) -> Type[CautiousAdamW]:
        return PerShardMask


class ListState(AdamW):
    """State in a list, which DCP cannot save."""

    def state_dict(self) -> Dict[str, Any]:
        packed = super().state_dict()
        for state in packed["state"].values():
            state["moments"] = [state.pop("exp_avg"), state.pop("exp_avg_sq")]
        return packed


class TimesZero(AdamW):
    """A skipped step is one of size zero."""

    def update(self, work: Sequence[GroupWork]) -> None:
        for each in work:
            for member in each.members:
                assert each.proceed is not None
                member.param.sub_(member.grad * each.group["lr"] * each.proceed)
