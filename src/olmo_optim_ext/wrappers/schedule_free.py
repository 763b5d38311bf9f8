"""
Schedule-Free learning (Defazio et al., "The Road Less Scheduled", arXiv:2405.15682, algorithm 1),
around any optimizer; around AdamW without a first moment it is the authors' ``AdamWScheduleFree``.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Sequence, Tuple

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig

from ..engine.base import STEP, GroupWork
from ..engine.hyperparameters import INSIDE, NATURAL, NON_NEGATIVE
from ..engine.write import write
from .base import PREFIX, Wrapper, WrapperConfig, some_at_a_time

__all__ = ["ScheduleFree", "ScheduleFreeConfig"]

AVERAGING = "averaging"
"""
State key of each parameter, ``(2,)``: the sum of the averaging weights in units of the last one,
and the largest learning rate so far.
"""


class ScheduleFree(Wrapper):
    """
    Three sequences instead of a decaying learning rate: the gradient is taken at ``y``, ``z`` takes
    the steps ``u`` of the optimizer inside (its learning rate, its weight decay at ``y``), and the
    average of ``z`` is ``x``, which is what to evaluate and to keep::

        z <- z - u
        x <- (1 - c) x + c z,   c = w / (sum of w),   w = t^r (largest lr so far)^weight_lr_power
        y <- momentum x + (1 - momentum) z

    Parameters are ``y`` between steps, and ``z`` is state; ``x`` follows from both. During the
    first ``warmup_steps`` steps lr and ``u`` are multiplied by ``t / warmup_steps``. ``t`` counts
    the updates of a parameter.

    ``u`` is the difference that the optimizer inside makes to ``y``, so in bfloat16 parameters it
    is rounded as theirs are. A step holds a copy of the parameters for a moment.
    """

    own_buffers = ("z",)
    exact_buffers = frozenset(own_buffers)
    own_allowed = {
        "momentum": INSIDE,
        "warmup_steps": NATURAL,
        "weight_lr_power": NON_NEGATIVE,
        "r": NON_NEGATIVE,
    }

    def __init__(
        self,
        params: Any,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        weight_lr_power: float = 2.0,
        r: float = 0.0,
        **options: Any,
    ):
        own = {
            "momentum": momentum,
            "warmup_steps": warmup_steps,
            "weight_lr_power": weight_lr_power,
            "r": r,
        }
        self._wrapper_training: Dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, own, **options)

    def _create_state(self, group: Dict[str, Any]) -> torch.Tensor:
        clock = super()._create_state(group)
        for param in group["params"]:
            if param in self.state:
                self.state[param][AVERAGING] = clock.new_zeros(2)
        return clock

    @property
    def is_averaged(self) -> bool:
        """Whether parameters are the average ``x``."""
        return bool(self._wrapper_training)

    def prepare_step(self) -> None:
        self._refuse_average("step()")
        super().prepare_step()

    def state_dict(self) -> Dict[str, Any]:
        """
        As that of the optimizer inside.

        :raises OLMoConfigurationError: While parameters are the average: it would be saved in place
            of ``y``, and a run that continues from it would not be the same.
        """
        self._refuse_average("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        As that of the optimizer inside.

        :raises OLMoConfigurationError: Also while parameters are the average, or if it was saved
            with another ``momentum``: the weights that were saved with it are its ``y``, whose
            average would be another.
        """
        self._refuse_average("load_state_dict()")
        momentum = self._wrapper["momentum"]
        for group in state_dict["param_groups"]:
            if (saved := group.get(PREFIX + "momentum", momentum)) != momentum:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: 'momentum' is {momentum} and the state to load was "
                    f"saved with {saved}, allowed is {saved}, as the weights beside it are its y"
                )
        super().load_state_dict(state_dict)

    def _refuse_average(self, what: str) -> None:
        if self._wrapper_training:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: {what} while the parameters are the average, allowed is "
                "swap_back() before it"
            )

    def update(self, work: Sequence[GroupWork]) -> None:
        momentum = self._wrapper["momentum"]
        before = [[get_local_tensor(m.param).clone() for m in each.members] for each in work]
        super().update(work)
        for each, olds in zip(work, before):
            numbers = zip(*(column.unbind() for column in self._shares(each)))
            for member, old, (first, warmup, c) in zip(each.members, olds, numbers):
                param = get_local_tensor(member.param)
                for y, moved, z in some_at_a_time(old, param, member.local("z")):
                    y = y.to(z.dtype)
                    z_old = torch.where(first, y, z)
                    step = (y - moved.to(z.dtype)) * warmup
                    y_new = y + c * (z_old - y) - (1 - momentum * (1 - c)) * step
                    write(moved, y_new.to(moved.dtype), each.proceed)
                    write(z, z_old - step, each.proceed)

    def _shares(self, work: GroupWork) -> Tuple[torch.Tensor, ...]:
        """
        For each parameter whether this is its first update, the factor of the warm-up, and ``c``;
        ``(n,)`` each.
        """
        states = [member.state[AVERAGING] for member in work.members]
        table = torch.stack(states)
        total, largest = table.unbind(1)
        clock = work.clock.unbind()
        t = torch.stack([clock[member.slot] for member in work.members])
        warmup = (t / max(self._wrapper["warmup_steps"], 1)).clamp(max=1.0)
        peak = torch.maximum(largest, work.group["lr"] * warmup)
        # In units of the last weight: with a constant one the sum is a count, which is exact.
        power, r = self._wrapper["weight_lr_power"], self._wrapper["r"]
        ratio = (largest / peak) ** power * ((t - 1) / t) ** r
        total = torch.where(peak > 0, total * ratio + 1, 0.0)
        c = torch.where(peak > 0, 1 / total, 0.0)
        write(table, torch.stack([total, peak], dim=1).to(table.dtype), work.proceed)
        torch._foreach_copy_(states, table.unbind())
        return t == 1, warmup, c

    @torch.no_grad()
    def swap_to_average(self) -> None:
        """
        Make the parameters ``x``, until :meth:`swap_back`. A model that FSDP has sharded must not
        keep whole parameters from a forward pass: :func:`~olmo_optim_ext.training.averaged` sees
        to it.

        :raises OLMoConfigurationError: If they are.
        """
        self._refuse_average("swap_to_average()")
        momentum = self._wrapper["momentum"]
        for param in self.state:
            local, state = get_local_tensor(param), self.state[param]
            self._wrapper_training[param] = local.clone()
            for y, z in some_at_a_time(local, get_local_tensor(state["z"])):
                x = y + (1 - 1 / momentum) * (z - y)
                torch.where(state[STEP] > 0, x.to(y.dtype), y, out=y)

    @torch.no_grad()
    def swap_back(self) -> None:
        """Make the parameters ``y`` again, bitwise; does nothing if they are."""
        while self._wrapper_training:
            param, y = self._wrapper_training.popitem()
            get_local_tensor(param).copy_(y)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Parameters are ``x`` inside, and ``y`` again after it, whatever happens."""
        self._refuse_average("averaged()")
        try:
            self.swap_to_average()
            yield
        finally:
            self.swap_back()


@OptimConfig.register("schedule_free")
@dataclass
class ScheduleFreeConfig(WrapperConfig):
    """
    Config of :class:`ScheduleFree`. Around ``ext_adamw``, whose defaults are here lr 0.0025, betas
    (0, 0.999) and no weight decay, it is the authors' ``AdamWScheduleFree`` with its defaults. A
    learning rate that decays is refused by the experiment system and by ``AveragingCallback``.
    """

    momentum: float = 0.9
    """Share of the average in the weights at which gradients are taken, in (0, 1). ``betas[0]`` of
    the authors' code."""

    warmup_steps: int = 0
    """Steps of linear warm-up, >= 0. As in the authors' code, which recommends one."""

    weight_lr_power: float = 2.0
    """Weights of the average grow with the largest lr to this power, >= 0. As in their code."""

    r: float = 0.0
    """Weights of the average grow with the step to this power, >= 0. As in their code."""

    wrapper = ScheduleFree

    tuned = {
        "ext_adamw": {"lr": 0.0025, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    }
    """As in the authors' code."""
