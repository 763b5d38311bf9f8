"""
NOLAH: Muon with gated gradients, damped momentum and a projection, a baseline for ablations
(J. N. Dvorak, project-muon-nolah; no paper).
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Type

import torch
from olmo_core.config import StrEnum
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..engine.hyperparameters import to_choice, to_flag
from ..engine.matrix import Owned
from ..engine.quantile import quantile_of_magnitudes
from .muon_family import MuonFamily, MuonFamilyConfig, MuonOptions

__all__ = ["GradientGate", "MuonNolah", "MuonNolahConfig", "gated"]

QUANTILE = 0.95
"""Of the magnitudes of the gradient of a matrix: momentum is damped where they are above it."""


class GradientGate(StrEnum):
    """What goes into the momentum in place of the gradient."""

    tanh = "tanh"
    """``tanh(g) |g|``: small gradients are squared, large ones stay."""

    sigmoid = "sigmoid"
    """``sigmoid(g) g``."""

    relu = "relu"
    """``max(g, 0)``."""

    none = "none"
    """``g``."""


def gated(grad: torch.Tensor, gate: str) -> torch.Tensor:
    """The gradient after :class:`GradientGate`."""
    if gate == GradientGate.tanh:
        return grad.tanh() * grad.abs()
    if gate == GradientGate.sigmoid:
        return grad.sigmoid() * grad
    return grad.clamp(min=0) if gate == GradientGate.relu else grad


class MuonNolah(MuonFamily):
    """
    ``M <- c (mu M + gate(g))`` with ``c`` the ``scale`` where ``|g|`` is above its 95th percentile
    in the matrix and 1 elsewhere, ``u = gate(g) + mu M`` (Nesterov) or ``M``, and
    ``polar(u sigmoid(u))``. For the arguments see :class:`MuonNolahConfig`.

    :param params: Groups with ``algorithm`` set to ``"muon_nolah"`` or ``"adamw"``;
        ``MuonNolahConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group has matrices.
    """

    algorithm = "muon_nolah"
    matrix_moments = ()  # of gated gradients, damped
    measures = True

    def __init__(
        self,
        params: Any,
        gate: GradientGate = GradientGate.tanh,
        scale: float = 0.95,
        projection: bool = True,
        **options: Unpack[MuonOptions],
    ):
        own = {"gate": str(gate), "scale": scale, "projection": projection}
        super().__init__(params, own, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        name = type(self).__name__
        to_choice(GradientGate, group["gate"], "gate", name)
        to_flag(group["projection"], "projection", name)

    def measure(
        self,
        group: Mapping[str, Any],
        grads: Sequence[torch.Tensor],
        add: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The 95th percentile of ``|g|``, ``(n, 1)``; nothing, ``(n, 0)``, if none is needed."""
        if group["scale"] == 1:
            return grads[0].new_empty(len(grads), 0, dtype=torch.float32)
        return quantile_of_magnitudes(grads, QUANTILE, add).unsqueeze(-1)

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        mu, step = group["momentum"], gated(grad, group["gate"])
        momentum = buffers[0] * mu + step
        if group["scale"] != 1:
            assert numbers is not None
            # In float32, as the percentile is, whatever the dtype of the rule.
            large = grad.abs().float() > numbers[0]
            momentum = torch.where(large, momentum * group["scale"], momentum)
        x = step + momentum * mu if group["nesterov"] else momentum
        return x * x.sigmoid() if group["projection"] else x, momentum

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        # The gate squares small gradients, which then fall below the floor of the iteration's norm;
        # the author's SVD has none.
        top = owned.x.abs().amax((-2, -1), keepdim=True)
        return self.polar(owned.x / top.clamp(min=torch.finfo(top.dtype).tiny)), {}


@OptimConfig.register("muon_nolah")
@dataclass
class MuonNolahConfig(MuonFamilyConfig[MuonNolah]):
    """
    Config of :class:`MuonNolah`. Embeddings, head and vectors follow AdamW (``adamw_*``).
    """

    gate: GradientGate = GradientGate.tanh
    """What goes into the momentum; ``none`` switches the gate off. As in the author's code."""

    scale: float = 0.95
    """
    By what momentum is multiplied in a step where the magnitude of the gradient is above its 95th
    percentile in the matrix, in [0, 1]; 1 switches it off. As in the author's code, the study of
    which also has 0.9.
    """

    projection: bool = True
    """Orthogonalise ``u sigmoid(u)`` and not ``u``. As in the author's code."""

    @classmethod
    def optimizer(cls) -> Type[MuonNolah]:
        return MuonNolah
