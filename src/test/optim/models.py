"""
Models for the mesh tests beside the one of all contracts.
"""

import torch
import torch.nn as nn
from olmo_core.nn.moe.mlp import DroplessMoEMLP, MoEMLP


class ExpertShapes(nn.Module):
    """
    Stacks of six experts, stored ``(out, in)`` and ``(in, out)``; four shards cut experts in two.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.dropless = DroplessMoEMLP(d_model=4, hidden_size=5, num_experts=6)
        self.with_capacity = MoEMLP(d_model=4, hidden_size=5, num_experts=6)
        self.norm = nn.LayerNorm(8)
        _fill(self, seed)


class SketchShapes(nn.Module):
    """Matrices with a side longer than the sketch of randomised Cholesky QR has rows."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.square = nn.Linear(8, 8, bias=False)
        self.tall = nn.Linear(8, 151, bias=False)
        self.wide = nn.Linear(160, 6, bias=False)
        self.norm = nn.LayerNorm(8)
        _fill(self, seed)


class LargeShapes(nn.Module):
    """Matrices of the proportions of a small transformer, for counts of bytes."""

    def __init__(self, seed: int = 0, width: int = 32, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(width, width, bias=False),
                    "k": nn.Linear(width, width, bias=False),
                    "v": nn.Linear(width, width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "gate": nn.Linear(width, 4 * width, bias=False),
                    "up": nn.Linear(width, 4 * width, bias=False),
                    "down": nn.Linear(4 * width, width, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        _fill(self, seed)


class StackShapes(nn.Module):
    """A square, a stack of three matrices, a vector and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.2)

        self.square = parameter(9, 9)
        self.stack = nn.Conv1d(12, 21, 1, groups=3, bias=False)  # a group is a matrix
        self.stack.weight = parameter(21, 4, 1)
        self.gain = parameter(7)
        self.merged = nn.Conv1d(3, 6, 16, bias=False)
        self.merged.weight = parameter(6, 3, 16)


def _fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
