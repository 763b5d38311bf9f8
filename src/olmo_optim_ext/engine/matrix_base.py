"""
What all optimizers with a rule for matrices share, however they get at matrices that are sharded:
which parameters follow the rule, what is planned for them, their factors, and reports.
"""

from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from .base import ALGORITHM, CALLS, STEP, EngineOptions, ExtOptimizer, GroupWork
from .elementwise import ElementwiseRule, apply_rule
from .exchange import BUCKET_BYTES
from .factors import Shape
from .layout import MatrixLayout
from .moments import Moment
from .placement import Path, gather_whole
from .plan import Job, Plan
from .write import Rounding, chunks, rounding_of, write_weights

__all__ = ["MatrixBase", "MatrixOptions"]


class MatrixOptions(EngineOptions, total=False):
    """Keywords that all optimizers for matrices take; see :class:`MatrixOptimizer`."""

    layouts: Optional[Mapping[str, MatrixLayout]]
    replicas: Optional[dist.ProcessGroup]


class MatrixBase(ExtOptimizer):
    """
    An optimizer with a rule for matrices, and elementwise rules for what that leaves: embeddings,
    head and vectors. Which of them a group follows is its ``algorithm``: :data:`algorithm` or one
    of :data:`leftover_rules`. A subclass says with :meth:`plan` and :meth:`update_matrices` how
    matrices that are shared by ranks are computed.

    A rule may keep factors of each matrix (:meth:`factor_shapes`), which only the owner has. Then
    ``state_dict()`` and ``load_state_dict()`` are collective where parameters are sharded: DCP
    calls them on all ranks.

    :param layouts: By canonical name, the matrices that a parameter stores; one if it is not named.
    :param replicas: The ranks that hold plain parameters alike, as under DDP, and share the work on
        their matrices; ``None`` if each rank computes all. A rule with factors computes all on each
        rank, as its state must not differ.
    """

    algorithm: ClassVar[str]

    needs_matrices: ClassVar[bool] = True
    """Whether a model without parameters for the rule is a mistake."""

    leftover_rules: ClassVar[Mapping[str, ElementwiseRule]]
    """By algorithm, the rules for parameters that hold no matrices."""

    matrix_buffers: ClassVar[Tuple[str, ...]]
    """Names of the state that is shaped and sharded like a parameter with matrices."""

    matrix_moments: ClassVar[Tuple[Moment, ...]] = ()
    """What of the state of parameters with matrices are averages of gradients."""

    bucket_bytes: ClassVar[int] = BUCKET_BYTES

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        layouts: Optional[Mapping[str, MatrixLayout]] = None,
        replicas: Optional[dist.ProcessGroup] = None,
        **engine: Unpack[EngineOptions],
    ):
        self._layouts = dict(layouts or {})
        self._replicas = replicas
        self._plans: Dict[torch.Tensor, Plan] = {}
        self._report_asked = False
        self.reports: Optional[Dict[str, Dict[str, torch.Tensor]]] = None
        super().__init__(params, {**defaults, ALGORITHM: None}, **engine)
        has_matrices = any(group[ALGORITHM] == self.algorithm for group in self.param_groups)
        if self.needs_matrices and not has_matrices:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: no parameter has the role 'matrix', allowed is a model "
                "with at least one trainable matrix; for others choose an elementwise optimizer"
            )

    def __getstate__(self) -> Dict[str, Any]:
        # Process groups cannot be copied.
        return {**super().__getstate__(), "_plans": {}, "_replicas": None}

    def plan(
        self, params: Sequence[Tuple[Dict[str, Any], torch.Tensor, MatrixLayout]]
    ) -> List[Plan]:
        """
        What does not change from step to step, for each of some parameters, given with their group.
        Called on all ranks alike.
        """
        raise NotImplementedError

    def update_matrices(self, work: Sequence[GroupWork]) -> None:
        """Update the parameters that follow the rule for matrices, and their state, in place."""
        raise NotImplementedError

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        """By what an ``(out, in)`` update is multiplied, beside the learning rate."""
        raise NotImplementedError

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        """Floating point operations of the owner of one matrix: owners share them."""
        raise NotImplementedError

    def decay(self, group: Mapping[str, Any], step: torch.Tensor) -> Union[float, torch.Tensor]:
        """
        By what weights are multiplied before the update is subtracted.

        :param step: Updates of the parameter, including this one, 0-d, on the device.
        """
        del step
        return 1 - group["lr"] * group["weight_decay"]

    def flops(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        """Floating point operations of a step for one matrix, on all ranks."""
        return self.cost(group, n_out, n_in)

    def factor_shapes(self, group: Mapping[str, Any], n_out: int, n_in: int) -> Dict[str, Shape]:
        """Names and shapes of the factors of an ``(out, in)`` matrix. Float32."""
        return {}

    def fill_factor(
        self,
        group: Mapping[str, Any],
        name: str,
        factor: torch.Tensor,
        matrix: str,
        shape: Tuple[int, int],
    ) -> None:
        """Give a factor of an ``(out, in)`` matrix, which is zero, its first value."""

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        if group[ALGORITHM] == self.algorithm:
            return self.matrix_buffers
        return self.leftover_rules[group[ALGORITHM]].buffers

    def moments(self, group: Mapping[str, Any]) -> Sequence[Moment]:
        if group[ALGORITHM] == self.algorithm:
            return self.matrix_moments
        return self.leftover_rules[group[ALGORITHM]].moments

    def put(self, param: torch.Tensor, key: str, value: torch.Tensor) -> None:
        self._ensure_plans()
        plan = self._plans.get(param)
        if plan is None or key not in plan.factors.names:
            super().put(param, key, value)
            return
        whole = value
        if isinstance(param, DTensor):
            whole = gather_whole(get_local_tensor(value), param)
        rows = whole.reshape(plan.layout.rows, plan.layout.cols)
        for index, block in enumerate(plan.layout.blocks()):
            held = plan.factors.views(self.state[param], index)
            if key not in held:
                continue
            matrix = rows.narrow(0, block.first_row, block.n_rows)
            matrix = matrix.narrow(1, block.first_col, block.n_cols)
            matrix = matrix.T if plan.layout.in_out else matrix
            held[key].copy_(plan.factors.held_part(key, index, matrix))

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        name = type(self).__name__
        algorithm = param_group.get(ALGORITHM)
        allowed = (self.algorithm, *self.leftover_rules)
        if algorithm not in allowed:
            raise OLMoConfigurationError(
                f"{name}: '{ALGORITHM}' of a parameter group is {algorithm!r}, allowed are "
                f"{' and '.join(map(repr, allowed))}; {name}Config.build(model) sets it"
            )
        super().add_param_group(param_group)

    def _create_shared_state(self) -> None:
        super()._create_shared_state()
        self._make_plans()

    def _ensure_plans(self) -> None:
        if not self._plans:  # of a copy
            self._make_plans()

    def state_dict(self) -> Dict[str, Any]:
        """As the base's; a collective call where sharded parameters have factors."""
        self._ensure_plans()
        return super().state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As the base's; a collective call where sharded parameters have factors."""
        self._ensure_plans()
        super().load_state_dict(state_dict)

    def _make_plans(self) -> None:
        new = [
            (group, param, self._layout_of(param))
            for group in self.param_groups
            if group[ALGORITHM] == self.algorithm
            for param in group["params"]
            if param in self.state and param not in self._plans
        ]
        for (group, param, _), plan in zip(new, self.plan(new)):
            self._plans[param] = plan
            self._create_factors(group, param, plan)

    def _factor_shapes(
        self, group: Mapping[str, Any], layout: MatrixLayout
    ) -> List[Dict[str, Shape]]:
        """For each matrix of a parameter."""
        return [
            self.factor_shapes(group, *((b.n_rows, b.n_cols)[:: -1 if layout.in_out else 1]))
            for b in layout.blocks()
        ]

    def _create_factors(self, group: Dict[str, Any], param: torch.Tensor, plan: Plan) -> None:
        state = self.state[param]
        dtype = state[STEP].dtype  # in which the group computes
        if all(name in state for name in plan.factors.names):  # of a copy
            return
        for name in plan.factors.names:
            state[name] = plan.factors.new(name, dtype, param.device)
        if param.is_meta:  # for a table of roles
            return
        for matrix, block in enumerate(plan.layout.blocks()):
            matrix_name, shape = self.matrix_name(param, plan, matrix), plan.shape(block)
            for name, held in plan.factors.views(state, matrix).items():
                whole = held.new_zeros(plan.factors.shapes[matrix][name])
                self.fill_factor(group, name, whole, matrix_name, shape)
                held.copy_(plan.factors.held_part(name, matrix, whole))

    def matrix_name(self, param: torch.Tensor, plan: Plan, matrix: int) -> str:
        name = self.name_of(param)
        return name if len(plan.layout.blocks()) == 1 else f"{name}[{matrix}]"

    def _layout_of(self, param: torch.Tensor) -> MatrixLayout:
        owner, name = type(self).__name__, self.name_of(param)
        layout = self._layouts.get(name)
        if layout is None:
            if param.ndim != 2:
                raise OLMoConfigurationError(
                    f"{owner}: parameter '{name}' of shape {tuple(param.shape)} has algorithm "
                    f"{self.algorithm!r}, allowed are matrices, or a layout for it"
                )
            layout = MatrixLayout.whole(param.shape)
        if not get_local_tensor(param).is_contiguous():
            raise OLMoConfigurationError(
                f"{owner}: parameter '{name}' of shape {tuple(param.shape)} has algorithm "
                f"{self.algorithm!r} and is not contiguous, allowed are contiguous matrices"
            )
        if layout.rows * layout.cols != param.numel() or layout.rows % max(param.shape[0], 1):
            raise OLMoConfigurationError(
                f"{owner}: the layout of parameter '{name}' of shape {tuple(param.shape)} is "
                f"({layout.rows}, {layout.cols}), allowed are layouts that divide it"
            )
        return layout

    def placements(self) -> Dict[str, Tuple[Path, Tuple[int, ...]]]:
        """
        For each parameter with matrices the path that they take, and, where one rank computes a
        matrix, the global rank of the owner of each.
        """
        self._ensure_plans()
        out: Dict[str, Tuple[Path, Tuple[int, ...]]] = {}
        for param, plan in self._plans.items():
            group = plan.placing.group
            owners = [dist.get_global_rank(group, rank) for rank in plan.owners if group]
            out[self.name_of(param)] = (plan.placing.path, tuple(owners))
        return out

    def matrices(self) -> List[Tuple[str, str, Tuple[int, int]]]:
        """
        Of each matrix in whose computation this rank may take part: the name of its parameter, its
        own name, and its shape ``(out, in)``.
        """
        self._ensure_plans()
        return [
            (self.name_of(param), self.matrix_name(param, plan, index), plan.shape(block))
            for param, plan in self._plans.items()
            for index, block in plan.blocks
        ]

    def ask_for_report(self) -> None:
        """Let the next step report on the matrices that this rank computes: :meth:`take_report`."""
        self._report_asked = True

    def take_report(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """
        What ``report`` returned for the last step, by the name of the matrix; for a step that was
        skipped it means nothing. Empty if none was asked for.
        """
        reports, self.reports = self.reports or {}, None
        return reports

    def all_matrices(self) -> Dict[str, Tuple[Dict[str, Any], Tuple[int, int]]]:
        """
        The group and the shape ``(out, in)`` of each matrix, by its name, whichever ranks have it:
        the same on every mesh.
        """
        self._ensure_plans()
        return {
            self.matrix_name(param, plan, index): (group, plan.shape(block))
            for group in self.param_groups
            for param in group["params"]
            if (plan := self._plans.get(param)) is not None
            for index, block in enumerate(plan.layout.blocks())
        }

    def update(self, work: Sequence[GroupWork]) -> None:
        self._ensure_plans()
        for algorithm, rule in self.leftover_rules.items():
            leftover = [each for each in work if each.group[ALGORITHM] == algorithm]
            if leftover:
                apply_rule(rule, leftover, self._names, self._compile, self._seed)
        self.reports = {} if self._report_asked else None
        self._report_asked = False
        self.update_matrices([each for each in work if each.group[ALGORITHM] == self.algorithm])

    def apply_update(
        self, job: Job, weights: torch.Tensor, update: torch.Tensor, scale: float
    ) -> None:
        """
        Decay and step.

        :param weights: Some of the local weights.
        :param update: The same elements of the update.
        """
        group, work = job.group, job.work.clock.dtype
        lr, decay = group["lr"], self.decay(group, job.member.state[STEP])
        flat = weights.is_contiguous() and update.is_contiguous()
        if flat:
            weights, update = weights.view(-1), update.view(-1)
        for begin, end in chunks(weights) if flat else [(0, weights.shape[0])]:
            part, step = weights[begin:end], update[begin:end].to(work) * (lr * scale)
            write_weights(
                *(part, part.to(work), step, decay),
                *(job.work.proceed, bool(group["cautious_weight_decay"])),
            )

    def rounding_of(self, job: Job, buffers: Sequence[torch.Tensor]) -> Optional[Rounding]:
        """What a parameter's bfloat16 state needs to be rounded."""
        return rounding_of(job.member, buffers, self._names, job.group[CALLS], self._seed)

    def _to_checkpoint(self, param: torch.Tensor, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._saved_as_it_is(param, key):
            return tensor
        return self._plans[param].factors.to_checkpoint(param, key, tensor)

    def _saved_as_it_is(self, param: torch.Tensor, key: str) -> bool:
        plan = self._plans.get(param)
        return plan is None or key not in plan.factors.names

    def _shape_in_checkpoint(
        self, param: torch.Tensor, key: str, tensor: torch.Tensor
    ) -> torch.Size:
        if self._saved_as_it_is(param, key):
            return tensor.shape
        return torch.Size([self._plans[param].factors.numel(key)])

    def _from_checkpoint(
        self, param: torch.Tensor, key: str, tensor: torch.Tensor, saved: torch.Tensor
    ) -> None:
        if self._saved_as_it_is(param, key):
            tensor.copy_(saved)
        else:
            self._plans[param].factors.from_checkpoint(key, tensor, saved)
