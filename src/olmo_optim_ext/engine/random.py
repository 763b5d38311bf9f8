"""
Randomness that depends on (seed, call, parameter name) and, where it is per element, on the
element's place in the whole parameter: the same on every mesh and after a resume.
"""

import hashlib
from typing import Sequence

import torch

__all__ = ["generator", "random_bits", "random_signs", "round_stochastically", "stream"]

_MASK = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B  # 2^32 times it fits into int64
_INT64 = 2**63


def stream(seed: int, call: int, name: str, purpose: str = "") -> int:
    """The number, below 2^63, of the stream of random numbers for one purpose of one step."""
    text = f"{seed}/{call}/{name}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % _INT64


def generator(
    seed: int, call: int, name: str, purpose: str, device: torch.device
) -> torch.Generator:
    """
    For what is drawn for a whole matrix, by the one rank that computes it. Devices of other kinds
    draw other numbers.
    """
    return torch.Generator(device).manual_seed(stream(seed, call, name, purpose))


def random_signs(
    shape: Sequence[int], seed: int, call: int, name: str, purpose: str, like: torch.Tensor
) -> torch.Tensor:
    """Float32, on the device of ``like``: -1 or 1 with the :func:`generator` of these."""
    source = generator(seed, call, name, purpose, like.device)
    return torch.randint(0, 2, tuple(shape), generator=source, device=like.device) * 2.0 - 1.0


def random_bits(index: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """
    32 random bits for each element: an integer hash, so that a shard draws only its own part.

    :param index: Places of the elements in the whole parameter, int64.
    :param key: The number of a :func:`stream`, int64, 0-d.

    :returns: int64 below 2^32, shaped like ``index``.
    """
    x = (index ^ key ^ (index >> 32)) & _MASK
    for shift in (31, 16, 0):
        x = (((x >> 16) ^ x) * _MULTIPLIER + ((key >> shift) & _MASK)) & _MASK
    return (x >> 16) ^ x


def round_stochastically(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """
    Float32 to bfloat16, up or down with probabilities that make the expectation ``x``. Infinities
    and NaN stay what they are.

    :param bits: Integers of which the lowest 16 bits are random.
    """
    raw = x.to(torch.float32).view(torch.int32)
    rounded = (raw + (bits & 0xFFFF).to(torch.int32)) & -65536
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)
