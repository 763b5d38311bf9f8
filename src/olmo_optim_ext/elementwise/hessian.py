"""
The moving average of a Hessian's diagonal that an optimizer keeps beside its gradients' state.
"""

from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.tensor import DTensor

from ..engine.base import CALLS, STEP, GroupWork, Member
from ..engine.elementwise import ElementwiseOptimizer
from ..engine.gate import all_finite
from ..engine.write import chunks, rounding_of, some_of, write_state

__all__ = ["HESSIAN", "HESSIAN_STEP", "HESSIAN_UPDATES", "HessianOptimizer"]

HESSIAN = "hessian"
"""State key: the average."""

HESSIAN_STEP = "hessian_step"
"""
State key, and for rules a key of the group: how many estimates have entered the average of a
parameter, a 0-d tensor on its device, of a group ``(n,)``.
"""

HESSIAN_UPDATES = "hessian_updates"
"""Param-group key: how many estimates were given, a host integer, the same in every group."""


class HessianOptimizer(ElementwiseOptimizer):
    """
    Base class of optimizers with a buffer :data:`HESSIAN`, a moving average with the second of the
    ``betas`` and without a bias correction.

    Between two calls of :meth:`step` an estimate may be given, with :meth:`update_hessian` or
    :meth:`update_hessian_from_estimates`; the first step needs one. An estimate that is not finite
    anywhere does not enter, on all ranks alike, nor does one that came before a step that is
    skipped: a bad batch leaves no trace.

    :param batch_tokens: See :meth:`update_hessian`.
    """

    counters = (CALLS, HESSIAN_UPDATES)

    how_to_estimate: ClassVar[str]
    """What gives estimates, for the error of a step without one."""

    def __init__(
        self, params: Any, defaults: Dict[str, Any], batch_tokens: Optional[int], **engine: Any
    ):
        self.batch_tokens = batch_tokens
        # Of parameters: the average and its count before the estimates since the last step.
        self._before: Dict[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__(params, defaults, **engine)

    @property
    def seed(self) -> int:
        """The seed of labels and probes."""
        return self._seed

    @property
    def hessian_updates(self) -> int:
        """How many estimates were given, those included that did not enter."""
        return self.param_groups[0][HESSIAN_UPDATES]

    def local_gradients(self) -> Dict[str, torch.Tensor]:
        """The local parts of the gradients that there are, sharded as parameters are, by name."""
        members = (member for group in self.param_groups for member in self._members(group))
        return {self.name_of(member.param): member.grad for member in members}

    def has_hessian(self) -> bool:
        """Whether an estimate has entered. Waits for the device."""
        return self.hessian_updates > 0 and bool(
            torch.stack([state[HESSIAN_STEP] for state in self.state.values()]).any()
        )

    def _create_state(self, group: Dict[str, Any]) -> torch.Tensor:
        clock = super()._create_state(group)
        for param in (p for p in group["params"] if p in self.state):
            self.state[param][HESSIAN_STEP] = torch.zeros_like(self.state[param][STEP])
        return clock

    @torch.no_grad()
    def update_hessian(self, tokens: Optional[Union[float, torch.Tensor]] = None) -> None:
        """
        Take in an estimate from the gradients, ``tokens * g^2``: call it after the backward pass of
        a mean loss with labels drawn from the model's predictions. Gradients stay as they are.

        :param tokens: How many tokens the loss is a mean over, over all ranks and micro-batches,
            a number or a 0-d tensor. Default is :data:`batch_tokens`.

        :raises OLMoConfigurationError: If neither is given, or no parameter has a gradient.
        """
        members = [member for group in self.param_groups for member in self._members(group)]
        factor = self.batch_tokens if tokens is None else tokens
        if factor is None:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'batch_tokens' is None, allowed is the number of tokens "
                "that the loss is a mean over"
            )
        if not members:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: update_hessian() was called and no parameter has a "
                "gradient, allowed is a call after a backward pass"
            )
        # The sum of squares is finite only if each of them is.
        norms = [torch.linalg.vector_norm(m.grad, dtype=m.state[STEP].dtype) for m in members]
        self._take_in(members, [x * x * factor for x in norms], lambda g: (g * g) * factor)

    @torch.no_grad()
    def update_hessian_from_estimates(self, estimates: Mapping[str, torch.Tensor]) -> None:
        """
        Take in estimates of the diagonal of the mean loss's Hessian, as they are.

        :param estimates: By canonical name, of the parameter's shape: a :class:`DTensor` where the
            parameter is one, or its local part. Parameters without one keep their average.

        :raises OLMoConfigurationError: If there are none, or a name or shape is not a parameter's.
        """
        params = {self.name_of(param): param for param in self.state}
        members = []
        for slot, (name, estimate) in enumerate(estimates.items()):
            if name not in params:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: there is an estimate for '{name}', allowed are names "
                    f"of trainable parameters: {', '.join(sorted(params)[:3])}, ..."
                )
            param = params[name]
            local = self._local_estimate(name, param, estimate)
            members.append(Member(slot, param, local, self.state[param]))
        if not members:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'estimates' is empty, allowed is at least one"
            )
        self._take_in(members, [member.grad for member in members], lambda estimate: estimate)

    def _local_estimate(
        self, name: str, param: torch.Tensor, estimate: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(estimate, DTensor) and isinstance(param, DTensor):
            if estimate.placements != param.placements:
                estimate = estimate.redistribute(param.device_mesh, param.placements)
        local, expected = get_local_tensor(estimate), get_local_tensor(param)
        if local.shape != expected.shape:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the estimate for '{name}' has the shape "
                f"{tuple(estimate.shape)}, allowed is {tuple(param.shape)}"
            )
        return local

    def _take_in(
        self,
        members: Sequence[Member],
        checked: Sequence[torch.Tensor],
        estimate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """
        ``h <- b2 h + (1 - b2) estimate(grad)``, or nothing, on all ranks alike.

        :param checked: For each member what is finite only if its estimate is.
        """
        finite = all_finite([member.param for member in members], checked)
        beta2_of = {p: g["betas"][1] for g in self.param_groups for p in g["params"]}
        for group in self.param_groups:
            group[HESSIAN_UPDATES] += 1
        for member in members:
            hessian, step = member.local(HESSIAN).view(-1), member.state[HESSIAN_STEP]
            if self._skip_step:
                self._before.setdefault(member.param, (hessian.clone(), step.clone()))
            step.add_(finite)
            grad, beta2 = member.grad.reshape(-1), beta2_of[member.param]
            # Not the numbers with which a step rounds the momentum.
            names = {member.param: f"{self.name_of(member.param)}/hessian"}
            rounding = rounding_of(member, [hessian], names, self.hessian_updates, self._seed)
            for i, j in chunks(hessian):
                new = hessian[i:j].to(step.dtype) * beta2 + estimate(grad[i:j].to(step.dtype)) * (
                    1 - beta2
                )
                write_state([hessian[i:j]], [new], finite, some_of(rounding, i, j))

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """
        Update every parameter that has a gradient.

        :param closure: Re-evaluates the model and returns the loss.

        :returns: What ``closure`` returned.

        :raises OLMoConfigurationError: If no estimate of the Hessian was given yet.
        """
        if self.hessian_updates == 0:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: no estimate of the Hessian was given before the first "
                f"step, allowed is a step after one: {self.how_to_estimate}"
            )
        loss = super().step(closure)
        if (proceed := self._proceed) is not None:
            for param, (hessian, count) in self._before.items():
                state = self.state[param]
                write_state([get_local_tensor(state[HESSIAN]).view(-1)], [hessian], ~proceed, None)
                write_state([state[HESSIAN_STEP]], [count], ~proceed, None)
        self._before = {}
        return loss

    def update(self, work: Sequence[GroupWork]) -> None:
        super().update([each._replace(group=self._with_estimates(each.group)) for each in work])

    def _with_estimates(self, group: Dict[str, Any]) -> Dict[str, Any]:
        # One by one, not from the group: parameters that came later have had fewer.
        counts = [self.state[p][HESSIAN_STEP] for p in group["params"] if p in self.state]
        return {**group, HESSIAN_STEP: torch.stack(counts)}
