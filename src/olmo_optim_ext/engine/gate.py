"""
The gate: whether a step is taken, decided on the device, without a host-device sync.

A step is skipped if a gradient, the loss or the gradient norm is not finite, or if the loss or the
gradient norm lies more than ``sigma_factor`` standard deviations above its mean over the last
``window`` steps, as in OLMo-core's :class:`~olmo_core.optim.SkipStepOptimizer`. Values that are not
finite never enter the history, as they would block the next steps; finite spikes do, or a new
regime would be skipped for ever.
"""

from typing import Dict, List, Optional, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["CAPACITY", "all_finite", "gate_state", "decide"]

CAPACITY = 1024
"""
How many steps the history holds, whatever the window: so a run may continue with another window.
"""


def gate_state(device: torch.device) -> Dict[str, torch.Tensor]:
    """An empty history of losses (row 0) and gradient norms (row 1), the latest at the right."""
    return {
        "gate_count": torch.zeros(2, dtype=torch.int64, device=device),
        "gate_history": torch.zeros(2, CAPACITY, dtype=torch.float32, device=device),
    }


def all_finite(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Whether all gradients are finite, on all ranks that share the parameters.

    :param params: The parameters.
    :param grads: The local parts of their gradients.

    :returns: A 0-d bool tensor.
    """
    # A sum is finite only if all of its terms are: it reads each gradient once, and an overflow
    # needs gradients of 1e30.
    sums = [grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    finite = torch.stack([s.to(torch.float32) for s in sums]).isfinite().all()
    meshes: List[DeviceMesh] = []
    for param in params:
        if isinstance(param, DTensor) and param.device_mesh not in meshes:
            meshes.append(param.device_mesh)
    for mesh in meshes:
        flag = finite.to(torch.int32)
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        finite = flag.bool()
    return finite


def decide(
    state: Dict[str, torch.Tensor],
    loss: Optional[torch.Tensor],
    grad_norm: Optional[torch.Tensor],
    window: int,
    sigma_factor: float,
) -> torch.Tensor:
    """
    Whether loss and gradient norm allow the step; records them in the history.

    :param state: What :func:`gate_state` made; changed in place.
    :param loss: Of this batch, 0-d, the same on all ranks; likewise ``grad_norm``.
    :param window: Over how many steps mean and standard deviation are taken.

    :returns: A 0-d bool tensor.
    """
    rows = slice(0 if loss is not None else 1, 2 if grad_norm is not None else 1)
    history, count = state["gate_history"][rows], state["gate_count"][rows]
    latest = torch.stack(
        [x.detach().to(history).reshape(()) for x in (loss, grad_norm) if x is not None]
    )
    n = count.clamp(max=window)
    known = torch.arange(window, 0, -1, device=history.device) <= n.unsqueeze(1)
    # Distances from one value of the history: of a constant one they are exactly zero. Not from the
    # latest value, because then a huge spike would make the standard deviation overflow.
    origin = history[:, -1:]
    distance = torch.where(known, history[:, -window:] - origin, 0.0)
    mean = distance.sum(1) / n.clamp(min=1)
    deviation = torch.where(known, distance - mean.unsqueeze(1), 0.0)
    std = (deviation.square().sum(1) / (n - 1).clamp(min=1)).sqrt()
    above = latest - origin.squeeze(1) - mean
    spike = (above > sigma_factor * std) & (n >= max(2, window // 2 - 1))
    finite = latest.isfinite()

    shifted = torch.cat([history[:, 1:], latest.unsqueeze(1)], dim=1)
    history.copy_(torch.where(finite.unsqueeze(1), shifted, history))
    count.add_(finite)
    return (finite & ~spike).all()
