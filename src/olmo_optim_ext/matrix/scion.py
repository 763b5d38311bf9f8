"""
Scion: steps to the minimiser of the linearised loss on a norm ball, with a norm for each role
(Pethick et al., arXiv:2502.07529; definitions and defaults as in the authors' code).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Dict, FrozenSet, Mapping, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from ..config import MatrixOptimConfig
from ..elementwise.lmo import LMO_MOMENTS, LMO_RULES, averaged
from ..elementwise.moments import MOMENTUM
from ..engine.base import GroupWork
from ..engine.hyperparameters import Allowed, check_hyperparameters, to_choice, to_flag
from ..engine.layout import MatrixLayout
from ..engine.matrix import ALGORITHM, MatrixOptimizer, MatrixOptions, Owned
from ..engine.placement import local_part
from ..engine.random import generator
from ..engine.roles import ParamRole, Role
from ..linalg.norms import NORMALISED, ScionNorm, fill_extreme, spectral_scale
from ..linalg.polar import PolarForm, PolarMethod
from .orthogonal import Orthogonalizer, PolarConfig
from .reports import orthogonal_report, update_rms

__all__ = ["Scion", "ScionConfig", "ScionNorm"]


class Scion(MatrixOptimizer):
    """
    ``d <- (1 - a) d + a g`` with ``a`` the ``momentum``, then constrained (SCG of the paper)
    ``W <- (1 - lr) W - lr radius LMO(d)``, or unconstrained (uSCG) the same without the shrink.

    :param params: Groups with ``norm``, ``radius``, ``fan_in`` and ``algorithm``;
        ``ScionConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    algorithm = "scion"
    needs_matrices = False  # signs and RMS alone are an optimizer too
    leftover_rules = LMO_RULES
    matrix_buffers = MOMENTUM
    matrix_moments = LMO_MOMENTS
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "momentum": (
            lambda a: isinstance(a, (int, float)) and not isinstance(a, bool) and 0 < a <= 1,
            "a number in (0, 1], the weight of the new gradient",
        ),
        # With only some coordinates shrunk, the step would leave the ball; without the shrink
        # there is no decay to be cautious with.
        "cautious_weight_decay": (
            lambda value: value is False,
            "false, as the shrink of the weights is a part of the step",
        ),
    }

    def __init__(
        self,
        params: Any,
        lr: float = 2**-12,
        momentum: float = 0.1,
        constrained: bool = True,
        spectral_max: bool = False,
        polar_method: PolarMethod = PolarMethod.newton_schulz,
        polar_steps: int = 5,
        polar_dtype: Optional[DType] = None,
        polar_form: PolarForm = PolarForm.auto,
        **options: Unpack[MatrixOptions],
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
            constrained=constrained,
            spectral_max=spectral_max,
            norm=str(ScionNorm.spectral),
            radius=1.0,
            fan_in=None,
        )
        super().__init__(params, defaults, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        norm = to_choice(ScionNorm, group["norm"], "norm", name)
        to_flag(group["constrained"], "constrained", name)
        to_flag(group["spectral_max"], "spectral_max", name)
        if group[ALGORITHM] != algorithm_of(norm):
            raise OLMoConfigurationError(
                f"{name}: '{ALGORITHM}' of a group with norm '{norm}' is {group[ALGORITHM]!r}, "
                f"allowed is '{algorithm_of(norm)}'"
            )
        if norm == ScionNorm.sign and group["fan_in"] is None:
            raise OLMoConfigurationError(
                f"{name}: 'fan_in' of a group with norm 'sign' is None, allowed is an integer >= 1"
            )

    def update(self, work: Sequence[GroupWork]) -> None:
        # The shrink is the engine's decay. No key of the groups: it could contradict 'constrained'.
        shrinks = [{"weight_decay": float(each.group["constrained"])} for each in work]
        super().update(
            [each._replace(group={**each.group, **own}) for each, own in zip(work, shrinks)]
        )

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        momentum = averaged(grad, buffers[0], group["momentum"], 1 - group["momentum"])
        return momentum, momentum

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        if group["norm"] == ScionNorm.spectral:
            return self.polar(owned.x), {}
        # What travels may be bfloat16, too coarse for sums of squares.
        d = owned.x.to(torch.promote_types(owned.x.dtype, torch.float32))
        return NORMALISED[group["norm"]](d, group["fan_in"] or d.shape[-1]), {}

    def report(
        self, group: Mapping[str, Any], owned: Owned, updates: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        scale = self.scale(group, *updates.shape[-2:])
        if group["norm"] == ScionNorm.spectral:
            return orthogonal_report(owned, updates, scale, self._seed)
        return {"update RMS": update_rms(updates, scale)}

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        if group["norm"] != ScionNorm.spectral:
            return group["radius"]
        n_in = group["fan_in"] or n_in
        return group["radius"] * spectral_scale(n_out, n_in, group["spectral_max"])

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        # Of the spectral norm: the others cost owners next to nothing.
        return self.polar.flops(n_out, n_in)

    def wire_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self.polar.wire_dtype(dtype, device)


def algorithm_of(norm: ScionNorm) -> str:
    """Which rule of :class:`Scion` a norm belongs to."""
    return str(norm) if norm in LMO_RULES else Scion.algorithm


@OptimConfig.register("scion")
@dataclass
class ScionConfig(PolarConfig, MatrixOptimConfig[Scion]):
    """
    Config of :class:`Scion`. The defaults are the authors' recipe for nanoGPT.

    ``group_overrides`` may set ``norm``, ``radius``, ``fan_in`` and ``constrained`` of parameters.
    ``radius`` replaces what the scales say. ``fan_in`` replaces the number of inputs in the norm;
    1 is ``normalized=False`` of the authors' code, which the paper has for one-hot inputs.
    """

    lr: float = 2**-12
    """
    Step size, >= 0; in the constrained form a Frank-Wolfe step, of which 1 would go all the way.
    As in the authors' recipe.
    """

    momentum: float = 0.1
    """
    INVERTED against Muon and SGD: the weight ``a`` of the new gradient in ``d <- (1 - a) d + a g``,
    in (0, 1]. What others call momentum 0.9 is 0.1 here, and 1 is no momentum. As in the paper and
    the authors' recipe.
    """

    constrained: bool = True
    """
    Shrink parameters by ``1 - lr`` in each step, vectors too, so that they stay in the ball of the
    norm. This takes the place of weight decay, of which the unconstrained form has none.
    """

    matrix_norm: ScionNorm = ScionNorm.spectral
    """Of matrices and experts."""

    embedding_norm: ScionNorm = ScionNorm.sign
    """
    Of embeddings, also tied ones. With ``sign``, the inputs are the columns as stored, the width;
    with ``column``, ``row`` and ``spectral``, an embedding is the map from one-hot tokens, so that
    ``column`` normalises the vector of each token.
    """

    head_norm: ScionNorm = ScionNorm.sign
    """Of the head."""

    vector_norm: ScionNorm = ScionNorm.rms
    """Of gains, biases and all else, whatever their shape: ``rms`` or ``sign``."""

    spectral_scale: float = 50.0
    """Radius of the spectral norm, > 0. As in the authors' recipe."""

    sign_scale: float = 3000.0
    """Radius of the sign norm, > 0, but of vectors. As in the authors' recipe."""

    bias_rms_scale: float = 1.0
    """
    Radius of the RMS norm, > 0, and of vectors also with ``sign``. Ours: the authors' recipe for
    nanoGPT has no vectors, and with the radius of its matrices the gains of norms, which begin at
    1, would change their signs within a few hundred steps.
    """

    column_scale: float = 50.0
    """Radius of the column norm, > 0. No published recipe; that of the hidden layers."""

    row_scale: float = 50.0
    """Radius of the row norm, > 0. No published recipe; that of the hidden layers."""

    spectral_max: bool = False
    """Scale by ``max(1, sqrt(out / in))``. In the authors' code an option, for input layers."""

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = (
        MatrixOptimConfig.CONFIG_ONLY
        | {"matrix_norm", "embedding_norm", "head_norm", "vector_norm"}
        | {"spectral_scale", "sign_scale", "bias_rms_scale", "column_scale", "row_scale"}
    )

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        name = type(self).__name__
        check_hyperparameters(vars(self), name, Scion.allowed)
        if self.vector_norm not in LMO_RULES:
            raise OLMoConfigurationError(
                f"{name}: 'vector_norm' is '{self.vector_norm}', allowed are sign and rms"
            )

    @classmethod
    def optimizer(cls) -> Type[Scion]:
        return Scion

    def norm_of(self, row: ParamRole, opts: Mapping[str, Any]) -> ScionNorm:
        """The norm of a parameter."""
        if (norm := opts.get("norm")) is not None:
            where = f"group_overrides of {row.name}: norm"
            return to_choice(ScionNorm, norm, where, type(self).__name__)
        return {
            Role.embedding: self.embedding_norm,
            Role.head: self.head_norm,
            Role.vector: self.vector_norm,
        }.get(row.role, self.matrix_norm)

    def algorithm_of(self, row: ParamRole, opts: Mapping[str, Any]) -> str:
        norm = self.norm_of(row, opts)
        if norm not in LMO_RULES and row.layout is None:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the norm of parameter '{row.name}' of shape {row.shape} "
                f"with the role '{row.role}' is '{norm}', allowed for what stores no matrix are "
                "sign and rms"
            )
        return algorithm_of(norm)

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        norm = self.norm_of(row, opts)
        radius = {
            ScionNorm.spectral: self.spectral_scale,
            ScionNorm.sign: self.sign_scale,
            ScionNorm.rms: self.bias_rms_scale,
            ScionNorm.column: self.column_scale,
            ScionNorm.row: self.row_scale,
        }[norm]
        if row.role == Role.vector and norm == ScionNorm.sign:
            radius = self.bias_rms_scale  # the other is for signs divided by a width
        fan_in = None
        if norm == ScionNorm.sign:
            fan_in = _inputs(row)
        elif row.role == Role.embedding and norm in (ScionNorm.column, ScionNorm.row):
            fan_in = 1
        own = {"norm": str(norm), "radius": radius, "fan_in": fan_in}
        return {**super().group_fields(row, opts), **own}

    def layouts(self, model: nn.Module, strict: bool = True) -> Dict[str, MatrixLayout]:
        roles = self.roles(model, strict)
        return {
            # Inputs of an embedding are its rows.
            name: replace(layout, in_out=True) if roles[name].role == Role.embedding else layout
            for name, layout in super().layouts(model, strict).items()
        }

    @torch.no_grad()
    def initialize_weights(self, model: nn.Module, strict: bool = True) -> None:
        """
        Draw matrices, embeddings and the head anew from the border of their balls, as the paper
        proposes: never for a model with weights that matter. Nothing calls this.

        Vectors stay as they are (the authors set biases to zero, but have no gains), and so does
        what follows ``rms``. The same for any mesh, by :data:`seed` and the parameter's name.

        :param model: On its device, parallelised or not.
        :param strict: Raise if a pattern in ``group_overrides`` matches no parameter.
        """
        roles, layouts = self.roles(model, strict), self.layouts(model, strict)
        for group in self.build_groups(model, strict):
            fields = {"spectral_max": self.spectral_max, **group}
            for name, param in group["params"]:
                if roles[name].role == Role.vector or fields["norm"] == ScionNorm.rms:
                    continue
                random = generator(self.seed, 0, name, "init", param.device)
                whole = torch.empty(param.shape, dtype=torch.float64, device=param.device)
                layout = layouts.get(name, MatrixLayout.whole(param.shape))
                view = whole.view(layout.rows, layout.cols)
                for first_row, n_rows, first_col, n_cols in layout.blocks():
                    x = view[first_row : first_row + n_rows, first_col : first_col + n_cols]
                    fill_extreme(
                        x.mT if layout.in_out else x,
                        *(fields["norm"], fields["fan_in"], fields["spectral_max"], random),
                    )
                whole *= fields["radius"]
                part = local_part(whole, param) if isinstance(param, DTensor) else whole
                get_local_tensor(param).copy_(part)


def _inputs(row: ParamRole) -> int:
    """The inputs of a parameter for the sign norm: its columns, if it is not stored transposed."""
    if row.role == Role.vector:
        return 1
    if row.layout is None:
        return row.shape[-1]
    return row.layout.row_sizes[0] if row.layout.in_out else row.layout.col_sizes[0]
