"""
Quantiles of whole matrices of which each rank has a part, exact, without gathering them and without
a host-device sync.
"""

from typing import Callable, Sequence

import torch

from .write import chunks

__all__ = ["quantile_of_magnitudes"]

BITS = 8
"""
Of a digit: a histogram of one has 2 KiB. With 11 bits three passes do, in two thirds of the time,
and send six times as much.
"""

BINS = 2**BITS


def quantile_of_magnitudes(
    parts: Sequence[torch.Tensor], q: float, add: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """
    What ``torch.quantile(x.abs().double(), q)`` is, with its linear interpolation between the two
    magnitudes next to place ``q (N - 1)``, of each of ``n`` matrices.

    It is radix selection: float32 magnitudes have the order of their bits as integers. Four passes
    find a digit each of both, from the highest, by counting those that share the digits before.
    Counts are integers, so it does not matter how the ranks share a matrix.

    :param parts: For each matrix the elements that this rank has, in any order, perhaps none.
        Magnitudes are taken as float32.
    :param add: Adds tensors ``(n, ...)`` over the ranks that share the matrices.

    :returns: Shape ``(n,)``, float32; of a matrix without elements without meaning.
    """
    device = parts[0].device
    prefix = torch.zeros(len(parts), 2, dtype=torch.int32, device=device)
    place = torch.zeros(len(parts), 2, dtype=torch.int64, device=device)
    fraction = torch.zeros(len(parts), dtype=torch.float64, device=device)
    for shift in (3 * BITS, 2 * BITS, BITS, 0):
        local = torch.stack([_histograms(x, its, shift) for x, its in zip(parts, prefix)])
        counts = add(local)
        if shift == 3 * BITS:
            last = (counts[:, 0].sum(-1) - 1).clamp(min=0)
            exact = last.double() * q
            place = torch.stack([exact.floor(), exact.ceil()], -1).long()
            fraction = exact - exact.floor()
        before = counts.cumsum(-1) <= place.unsqueeze(-1)
        digit = before.sum(-1).clamp(max=BINS - 1)
        place = place - torch.where(before, counts, 0).sum(-1)
        prefix = (prefix << BITS) | digit.int()
    low, high = prefix.view(torch.float32).double().unbind(-1)
    return torch.lerp(low, high, fraction).float()


def _histograms(x: torch.Tensor, prefix: torch.Tensor, shift: int) -> torch.Tensor:
    """
    How often each digit follows each of the two prefixes.

    :param prefix: Shape ``(2,)``, int32.

    :returns: Shape ``(2, BINS)``, int64.
    """
    low, high = prefix.unbind()
    # The last bin is for what has neither prefix. Bincount would be a sync on CUDA.
    counts = torch.zeros(2 * BINS + 1, dtype=torch.int64, device=x.device)
    flat, one = x.reshape(-1), counts.new_ones(())
    for begin, end in chunks(flat):
        digits = flat[begin:end].float().abs().view(torch.int32) >> shift
        before, digit = digits >> BITS, digits & (BINS - 1)
        there = torch.where(before == low, digit, digit + BINS)
        there = torch.where((before == low) | (before == high), there, 2 * BINS)
        counts.index_add_(0, there, one.expand(there.shape))
    of_low, of_high = counts[:-1].view(2, BINS)
    return torch.stack([of_low, torch.where(low == high, of_low, of_high)])
