"""
Sharpness-aware minimisation (Foret et al., arXiv:2010.01412, algorithm 1) and its adaptive form
(ASAM, Kwon et al., arXiv:2102.11600), around any optimizer.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig

from ..elementwise.mars import MarsConfig
from ..engine.base import CALLS, Member
from ..engine.hyperparameters import NON_NEGATIVE, POSITIVE_INT, to_flag
from ..engine.placement import sum_over_shards
from .base import Wrapper, WrapperConfig, some_at_a_time

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

    own_allowed = {"rho": NON_NEGATIVE, "interval": POSITIVE_INT}

    def __init__(
        self,
        params: Any,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        **options: Any,
    ):
        adaptive = to_flag(adaptive, "adaptive", type(self).__name__)
        self._wrapper_perturbed = False
        self._wrapper_held: List[Tuple[torch.Tensor, torch.Tensor]] = []
        self._wrapper_norm: Optional[torch.Tensor] = None
        own = {"rho": rho, "adaptive": adaptive, "interval": interval}
        super().__init__(params, own, **options)

    def wants_second_pass(self) -> bool:
        """Whether the next step is one of every ``interval``, which need :meth:`perturb`."""
        return self.param_groups[0][CALLS] % self._wrapper["interval"] == 0

    @torch.no_grad()
    def perturb(self) -> None:
        """
        Add ``e`` to the parameters, for the gradients that they have. A collective call where
        parameters are sharded. Gradients that are not finite add nothing, and :meth:`step` skips.

        :raises OLMoConfigurationError: If they are perturbed.
        """
        if self._wrapper_perturbed:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: perturb() after perturb(), allowed is step() between them"
            )
        self._wrapper_perturbed = True
        members = [member for group in self.param_groups for member in self._members(group)]
        if not members:
            return
        squares = torch.stack([self._square(member) for member in members])
        whole = sum_over_shards([member.param for member in members], squares.unsqueeze(1))
        self._wrapper_norm = whole.sum().sqrt()
        scale = self._wrapper["rho"] / (self._wrapper_norm + NORM_EPS)
        for member in members:
            self._add(member, scale, self._wrapper_norm.isfinite())

    def _square(self, member: Member) -> torch.Tensor:
        """Over the local part, in float64."""
        parts = []
        for p, g in some_at_a_time(get_local_tensor(member.param), member.grad):
            g = g.to(torch.float64)
            parts.append((p.abs() * g if self._wrapper["adaptive"] else g).square().sum())
        return torch.stack(parts).sum()

    def _add(self, member: Member, scale: torch.Tensor, finite: torch.Tensor) -> None:
        param = get_local_tensor(member.param)
        self._wrapper_held.append((param, param.clone()))
        dtype = torch.promote_types(param.dtype, torch.float32)
        for p, g in some_at_a_time(param, member.grad):
            e = g.to(dtype) * scale.to(dtype)
            if self._wrapper["adaptive"]:
                e = p.square() * e
            torch.where(finite, (p + e).to(p.dtype), p, out=p)

    @torch.no_grad()
    def unperturb(self) -> None:
        """Make the parameters bitwise what they were; :meth:`step` does it too."""
        while self._wrapper_held:
            param, before = self._wrapper_held.pop()
            param.copy_(before)

    def state_dict(self) -> Dict[str, Any]:
        """
        As that of the optimizer inside.

        :raises OLMoConfigurationError: While parameters are perturbed: they would be saved beside
            it in place of the weights.
        """
        self._refuse_perturbed("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        As that of the optimizer inside. A second pass made before it counts no more.

        :raises OLMoConfigurationError: Also while parameters are perturbed.
        """
        self._refuse_perturbed("load_state_dict()")
        super().load_state_dict(state_dict)
        self._wrapper_perturbed, self._wrapper_norm = False, None

    def _refuse_perturbed(self, what: str) -> None:
        if self._wrapper_held:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: {what} while the parameters are perturbed, allowed is "
                "unperturb() before it"
            )

    def prepare_step(self) -> None:
        if self.wants_second_pass() and not self._wrapper_perturbed:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: step() without the second pass that makes it sharpness-"
                'aware; allowed is trainer_config.add_callback("sam", SAMCallback()) from '
                "olmo_optim_ext.training for OLMo-core's TransformerTrainModule, or perturb() and "
                "another backward pass before step() in a loop of your own"
            )
        self.unperturb()
        self._wrapper_perturbed = False
        super().prepare_step()

    def _open_gate(self, members: Sequence[Member]) -> Optional[torch.Tensor]:
        norm, self._wrapper_norm = self._wrapper_norm, None
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

    def _check_inner(self) -> None:
        super()._check_inner()
        if issubclass(self._inner_class, MarsConfig) and self.inner.get("exact"):
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'inner.exact' is {self.inner['exact']!r}, allowed is "
                "false: mars would compare the gradient at the perturbed weights with one at the "
                "last weights as they are"
            )
