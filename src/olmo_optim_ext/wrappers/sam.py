"""
Sharpness-aware minimisation (Foret et al., arXiv:2010.01412, algorithm 1) and its adaptive form
(ASAM, Kwon et al., arXiv:2102.11600), around any optimizer.
"""

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig

from ..engine.base import CALLS, Member
from ..engine.hyperparameters import NON_NEGATIVE, to_flag
from ..engine.placement import sum_over_shards
from .base import Wrapper, WrapperConfig, integer, some_at_a_time

__all__ = ["SAM", "SAMConfig"]

NORM_EPS = 1e-12
"""Added to the norm, as in davda54's code."""


class SAM(Wrapper):
    """
    The step of the optimizer inside, with the gradient at ``p + e``::

        e = rho g / ||g||                      g: the gradient at p, its norm over all parameters
        e = rho p^2 g / || |p| g ||            adaptive

    The trainer gives it the second pass: :class:`~olmo_optim_ext.training.SAMCallback` for
    OLMo-core's. In a loop of your own, each step that :meth:`wants_second_pass` ::

        loss(model).backward(); optim.perturb(); optim.zero_grad()
        loss(model).backward(); optim.step()

    ``step()`` makes the weights bitwise what they were before :meth:`perturb`, which costs a copy
    of them. There is no host-device sync.
    """

    own_allowed = {"rho": NON_NEGATIVE, "interval": integer(1)}

    def __init__(
        self,
        params: Any,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        **options: Any,
    ):
        self.check_options(rho=rho, interval=interval)
        self._rho = rho
        self._adaptive = to_flag(adaptive, "adaptive", type(self).__name__)
        self._interval = interval
        self._perturbed = False
        self._held: List[Tuple[torch.Tensor, torch.Tensor]] = []
        self._norm: Optional[torch.Tensor] = None
        super().__init__(params, **options)

    def wants_second_pass(self) -> bool:
        """Whether the next step is one of every ``interval``, which need :meth:`perturb`."""
        return self.param_groups[0][CALLS] % self._interval == 0

    @torch.no_grad()
    def perturb(self) -> None:
        """
        Add ``e`` to the parameters, for the gradients that they have. A collective call where
        parameters are sharded. Gradients that are not finite add nothing, and :meth:`step` skips.

        :raises OLMoConfigurationError: If they are perturbed.
        """
        if self._perturbed:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: perturb() after perturb(), allowed is step() between them"
            )
        self._perturbed = True
        members = [member for group in self.param_groups for member in self._members(group)]
        if not members:
            return
        squares = torch.stack([self._square(member) for member in members])
        whole = sum_over_shards([member.param for member in members], squares.unsqueeze(1))
        self._norm = whole.sum().sqrt()
        scale = self._rho / (self._norm + NORM_EPS)
        for member in members:
            self._add(member, scale, self._norm.isfinite())

    def _square(self, member: Member) -> torch.Tensor:
        """Over the local part, in float64."""
        parts = []
        for p, g in some_at_a_time(get_local_tensor(member.param), member.grad):
            g = g.to(torch.float64)
            parts.append((p.abs() * g if self._adaptive else g).square().sum())
        return torch.stack(parts).sum()

    def _add(self, member: Member, scale: torch.Tensor, finite: torch.Tensor) -> None:
        param = get_local_tensor(member.param)
        self._held.append((param, param.clone()))
        dtype = torch.promote_types(param.dtype, torch.float32)
        for p, g in some_at_a_time(param, member.grad):
            e = g.to(dtype) * scale.to(dtype)
            if self._adaptive:
                e = p.square() * e
            torch.where(finite, (p + e).to(p.dtype), p, out=p)

    @torch.no_grad()
    def unperturb(self) -> None:
        """Make the parameters bitwise what they were; :meth:`step` does it too."""
        while self._held:
            param, before = self._held.pop()
            param.copy_(before)

    def prepare_step(self) -> None:
        if self.wants_second_pass() and not self._perturbed:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: step() without the second pass that makes it sharpness-"
                'aware; allowed is trainer_config.add_callback("sam", SAMCallback()) from '
                "olmo_optim_ext.training for OLMo-core's TransformerTrainModule, or perturb() and "
                "another backward pass before step() in a loop of your own"
            )
        self.unperturb()
        self._perturbed = False
        super().prepare_step()

    def _open_gate(self, members: Sequence[Member]) -> Optional[torch.Tensor]:
        norm, self._norm = self._norm, None
        if norm is None:
            return super()._open_gate(members)
        # The second gradient of a bad batch may be finite, as nothing was added for it.
        finite = norm.isfinite()
        if self.latest_grad_norm is not None:
            self.latest_grad_norm = torch.where(finite, self.latest_grad_norm, torch.nan)
        proceed = super()._open_gate(members)
        if proceed is not None:
            self._proceed = proceed = proceed & finite
        return proceed


@OptimConfig.register("sam")
@dataclass
class SAMConfig(WrapperConfig):
    """
    Config of :class:`SAM`.
    """

    rho: float = 0.05
    """
    Length of the perturbation, >= 0; 0 is the optimizer inside. As in the paper. The adaptive form
    wants about ten times as much.
    """

    adaptive: bool = False
    """Relative to the size of each weight (ASAM)."""

    interval: int = 1
    """Steps from one that is sharpness-aware to the next, >= 1; those between are plain."""

    wrapper = SAM
