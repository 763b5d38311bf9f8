"""
References in float64 for the contract table: the rule of one parameter at one step, written out.
"""

from typing import Any, Callable, Dict

import torch

from .case import MixedShapes, Oracle, grads_at

__all__ = ["Memory", "written_out"]


class Memory:
    """What a rule keeps of one parameter. What was never set is zero."""

    def __init__(self, name: str):
        self.name = name
        self.t = 0
        """The number of the update, from 1."""

    def __getattr__(self, key: str) -> Any:
        return 0.0

    def __setattr__(self, key: str, value: Any) -> None:
        self.__dict__[key] = value


def written_out(rule: Callable[..., torch.Tensor], lr: float, **fields: Any) -> Oracle:
    """
    An oracle from ``rule(memory, p, g, lr, **fields)``, which returns the next ``p``.

    :param lr: Before the schedule of :func:`~test.optim.case.set_lr`.
    """

    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        params = {name: param.double() for name, param in start.items()}
        memories = {name: Memory(name) for name in start}
        model = MixedShapes()
        for step in range(steps):
            for name, grad in grads_at(step, model).items():
                memory = memories[name]
                memory.t += 1
                params[name] = rule(
                    memory, params[name], grad.double(), lr * (1.0 - 0.01 * step), **fields
                )
        return params

    return run
