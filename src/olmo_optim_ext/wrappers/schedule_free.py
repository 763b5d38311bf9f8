"""
Schedule-Free learning (Defazio et al., "The Road Less Scheduled", arXiv:2405.15682, algorithm 1),
around any optimizer; around AdamW without a first moment it is the authors' ``AdamWScheduleFree``.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Sequence, Tuple, Union

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig

from ..engine.base import STEP, GroupWork
from ..engine.hyperparameters import NON_NEGATIVE
from .base import Wrapper, WrapperConfig, integer, number, some_at_a_time

__all__ = ["ScheduleFree", "ScheduleFreeConfig"]

AVERAGING = "averaging"
"""
State key, ``(3,)`` on the device: steps taken, the sum of the averaging weights in units of the
last one, and the largest learning rate so far.
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
    steps that were taken. Weights ``w`` are one sequence for the model, from the largest learning
    rate of its groups, as only their ratios matter and a schedule moves all groups alike.

    ``u`` is the difference that the optimizer inside makes to ``y``, so in bfloat16 parameters it
    is rounded as theirs are. A step holds a copy of the parameters for a moment.
    """

    own_buffers = ("z",)
    exact_buffers = frozenset(own_buffers)
    own_allowed = {
        "momentum": number(lambda x: 0 < x < 1, "a number in (0, 1)"),
        "warmup_steps": integer(0),
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
        self.check_options(
            momentum=momentum, warmup_steps=warmup_steps, weight_lr_power=weight_lr_power, r=r
        )
        self._momentum = momentum
        self._warmup_steps = warmup_steps
        self._weight_lr_power = weight_lr_power
        self._r = r
        self._training: Dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, **options)

    def shared_state(self, device: torch.device) -> Dict[str, torch.Tensor]:
        return {**super().shared_state(device), AVERAGING: torch.zeros(3, device=device)}

    @property
    def is_averaged(self) -> bool:
        """Whether parameters are the average ``x``."""
        return bool(self._training)

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

        :raises OLMoConfigurationError: Also while parameters are the average.
        """
        self._refuse_average("load_state_dict()")
        super().load_state_dict(state_dict)

    def _refuse_average(self, what: str) -> None:
        if self._training:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: {what} while the parameters are the average, allowed is "
                "swap_back() before it"
            )

    def update(self, work: Sequence[GroupWork]) -> None:
        warmup, share = self._next_share(work)
        before = [[get_local_tensor(m.param).clone() for m in each.members] for each in work]
        super().update(work)
        for each, olds in zip(work, before):
            factor, c = warmup.to(each.clock.dtype), share.to(each.clock.dtype)
            first = (each.clock == 1).unbind()
            for member, old in zip(each.members, olds):
                param = get_local_tensor(member.param)
                for y, moved, z in some_at_a_time(old, param, member.local("z")):
                    y = y.to(z.dtype)
                    z_old = torch.where(first[member.slot], y, z)
                    step = (y - moved.to(z.dtype)) * factor
                    y_new = y + c * (z_old - y) - (1 - self._momentum * (1 - c)) * step
                    _write(moved, y_new, each)
                    _write(z, z_old - step, each)

    def _next_share(self, work: Sequence[GroupWork]) -> Tuple[torch.Tensor, torch.Tensor]:
        """The factor of the warm-up and ``c`` of this step, 0-d."""
        state = self.shared[AVERAGING]
        steps, total, largest = state.unbind()
        now = steps + 1
        warmup = (now / max(self._warmup_steps, 1)).clamp(max=1.0)
        lr = _largest([group["lr"] for group in self.param_groups], state) * warmup
        peak = torch.maximum(largest, lr)
        # In units of the last weight: with a constant one the sum is a count, which is exact.
        ratio = (largest / peak) ** self._weight_lr_power * (steps / now) ** self._r
        total = torch.where(peak > 0, total * ratio + 1, 0.0)
        share = torch.where(peak > 0, 1 / total, 0.0)
        _write(state, torch.stack([now, total, peak]), work[0])
        return warmup, share

    @torch.no_grad()
    def swap_to_average(self) -> None:
        """
        Make the parameters ``x``, until :meth:`swap_back`. A model that FSDP has sharded must not
        keep whole parameters from a forward pass: :func:`~olmo_optim_ext.training.averaged` sees
        to it.

        :raises OLMoConfigurationError: If they are.
        """
        self._refuse_average("swap_to_average()")
        for param in self.state:
            local, state = get_local_tensor(param), self.state[param]
            self._training[param] = local.clone()
            for y, z in some_at_a_time(local, get_local_tensor(state["z"])):
                x = y + (1 - 1 / self._momentum) * (z - y)
                torch.where(state[STEP] > 0, x.to(y.dtype), y, out=y)

    @torch.no_grad()
    def swap_back(self) -> None:
        """Make the parameters ``y`` again, bitwise; does nothing if they are."""
        while self._training:
            param, y = self._training.popitem()
            get_local_tensor(param).copy_(y)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Parameters are ``x`` inside, and ``y`` again after it, whatever happens."""
        self.swap_to_average()
        try:
            yield
        finally:
            self.swap_back()


def _largest(lrs: List[Union[float, torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    numbers = [lr for lr in lrs if not isinstance(lr, torch.Tensor)]
    out = torch.full((), max(numbers, default=0.0), device=like.device, dtype=like.dtype)
    for lr in lrs:
        if isinstance(lr, torch.Tensor):
            out = torch.maximum(out, lr.to(out))
    return out


def _write(target: torch.Tensor, new: torch.Tensor, work: GroupWork) -> None:
    new = new.to(target.dtype)
    if work.proceed is None:
        target.copy_(new)
    else:
        torch.where(work.proceed, new, target, out=target)


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
