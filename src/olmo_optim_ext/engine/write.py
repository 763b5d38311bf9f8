"""
Writing new weights and new state: decay, the gate, and rounding.
"""

from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from .base import Member
from .placement import element_index
from .random import random_bits, round_stochastically, stream

__all__ = ["Rounding", "chunks", "rounding_of", "some_of", "write", "write_state", "write_weights"]

CHUNK = 2**17
"""
Elements that an eager rule takes at a time on CPU: its temporaries stay in the cache, which makes
it several times faster than whole parameters.
"""

CHUNK_ELSEWHERE = 2**26
"""
On other devices: few kernels, and temporaries of 256 MiB, where those of a stack of experts would
be gigabytes. This was only reasoned.
"""


def chunk_size(device: torch.device) -> int:
    """How many elements an eager rule takes at a time."""
    return CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE


def chunks(x: torch.Tensor) -> List[Tuple[int, int]]:
    """Begin and end of what an eager rule takes at a time of a flat tensor."""
    n = x.numel()
    size = chunk_size(x.device)
    return [(begin, min(begin + size, n)) for begin in range(0, max(n, 1), size)]


class Rounding(NamedTuple):
    """What stochastic rounding of bfloat16 state needs."""

    keys: torch.Tensor
    """Of the random numbers of each buffer, ``(len(buffers),)``."""

    places: torch.Tensor
    """The places of the elements: see :func:`~olmo_optim_ext.engine.placement.element_index`."""


def rounding_of(
    member: Member,
    buffers: Sequence[torch.Tensor],
    names: Mapping[torch.Tensor, str],
    call: int,
    seed: int,
) -> Optional[Rounding]:
    """``None`` if no state is bfloat16."""
    if all(buffer.dtype != torch.bfloat16 for buffer in buffers):
        return None
    name = names[member.param]
    # Filled on the device: a copy from the host would be a sync.
    keys = [
        torch.full((), stream(seed, call, name, f"round {i}"), device=member.grad.device)
        for i in range(len(buffers))
    ]
    return Rounding(torch.stack(keys), element_index(member.param))


def some_of(rounding: Optional[Rounding], begin: int, end: int) -> Optional[Rounding]:
    """The same for some of the elements."""
    if rounding is None:
        return None
    keys, places = rounding
    return Rounding(keys, places + begin if places.ndim == 0 else places[begin:end])


def write_state(
    buffers: Sequence[torch.Tensor],
    new_buffers: Sequence[torch.Tensor],
    proceed: Optional[torch.Tensor],
    rounding: Optional[Rounding],
) -> None:
    """
    Keep new state, unless the step is skipped.

    :param proceed: Whether the step is taken, 0-d; ``None`` without a gate.
    """
    for i, (buffer, new) in enumerate(zip(buffers, new_buffers)):
        if rounding is not None and buffer.dtype == torch.bfloat16:
            places = rounding.places
            if places.ndim == 0:  # of the first of consecutive elements
                places = torch.arange(buffer.numel(), device=buffer.device) + places
            new = round_stochastically(new, random_bits(places, rounding.keys[i]))
        write(buffer, new, proceed)


def write_weights(
    param: torch.Tensor,
    old: torch.Tensor,
    step: torch.Tensor,
    decay: Union[float, torch.Tensor],
    proceed: Optional[torch.Tensor],
    cautious_decay: bool,
) -> None:
    """
    ``p <- decay * p - step``, unless the step is skipped.

    :param old: ``param`` in the dtype of the rule.
    :param decay: ``1 - lr * weight_decay``.
    :param cautious_decay: Decay only where step and parameter do not differ in sign.
    """
    decayed = old * decay
    if cautious_decay:
        decayed = torch.where(step * old >= 0, decayed, old)
    write(param, (decayed - step).to(param.dtype), proceed)


def write(target: torch.Tensor, new: torch.Tensor, proceed: Optional[torch.Tensor]) -> None:
    """
    Replace a tensor by another of its dtype, unless the step is skipped.

    :param proceed: Whether the step is taken, 0-d; ``None`` without a gate.
    """
    if proceed is None:
        target.copy_(new)
    else:
        # Not a product: zero times NaN is NaN.
        torch.where(proceed, new, target, out=target)
