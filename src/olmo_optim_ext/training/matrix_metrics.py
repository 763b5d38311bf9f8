"""
What an optimizer with a rule for matrices did to them, among the metrics of a run.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar, DefaultDict, Dict, Iterable, List, Mapping

import numpy as np
import torch
from olmo_core.distributed.utils import all_gather_object
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.callbacks import Callback

from ..engine.base import CALLS
from ..engine.matrix_base import MatrixBase
from ..engine.roles import classify
from ..matrix.reports import FAILED, to_numbers
from .attached import optimizer_of

__all__ = ["MatrixMetricsCallback", "matrix_metric"]

RANKS = ("effective rank", "stable rank")
RELATIVE = "relative "
FIRED = "noise fired"
COUNTS = ("failed refreshes", FAILED)
"""Measures that add up over matrices."""

Numbers = Dict[str, float]


def matrix_metric(measure: str, of: str) -> str:
    """
    The name of a metric.

    :param of: A parameter's canonical name, or a role.
    """
    return f"optim/{measure}/{of}"


@dataclass
class MatrixMetricsCallback(Callback):
    """
    Records what the optimizer reports of its matrices in every so many steps::

        trainer_config.add_callback("matrix_metrics", MatrixMetricsCallback(interval=50))

    ``optim/MEASURE/PARAMETER`` is the mean over the matrices that a parameter stores, and
    ``optim/MEASURE/ROLE`` the mean over the parameters of a role
    (:class:`~olmo_optim_ext.engine.roles.Role`), which is what the model says it is:
    ``group_overrides`` are not looked at. The measures:

    - ``effective rank`` and ``stable rank`` of what is orthogonalised, the momentum with the look
      ahead; of Dion, of what its update captures of it. Of a role ``relative effective rank`` and
      ``relative stable rank``: divided by the smaller side, as shapes differ.
    - ``orthogonality error``: the root mean square of ``s^2 - 1`` over the singular values ``s`` of
      the update before its scale.
    - ``update RMS``: of the update's elements, before the learning rate.
    - With noise, ``noise scale``, the Frobenius norm of the noise over ``sqrt(min(out, in))``, 0 in
      a step without, and ``noise fired``, the share of all calls of ``step()`` that had some.
    - Of rules that orthogonalise whole matrices ``failed orthogonalisations``: of how many
      matrices of the parameter or role the update of this step is not finite, is zero though the
      matrix is not, or has singular values whose root mean square is above 1.5.
    - Of SOAP ``failed refreshes``, how often an eigenbasis was not found and the old one kept,
      added up over the whole run, both sides, and all matrices of the parameter or role.

    There is no host-device sync in ``step()``. After a step with a report, and only there, the host
    waits for the device; each rank evaluates the matrices that it has computed, and all exchange
    the results, so that all record the same. A matrix takes a rank 15 to 50 ms where its smaller
    side is 256 or more (one core). Nothing is recorded of a step that was skipped, and of a
    matrix whose report is not finite only that its orthogonalisation has failed.

    :raises OLMoConfigurationError: When it is attached, unless :data:`interval` is at least 1 and
        the train module has one optimizer, of this package and with a rule for matrices.
    """

    # Before the checkpointers, which make the trainer log all metrics recorded so far.
    priority: ClassVar[int] = 100

    interval: int = 50
    """In steps, >= 1; those whose number it divides."""

    per_layer: bool = True
    """Also record each parameter on its own."""

    _asked: bool = field(default=False, init=False, repr=False)

    def post_attach(self):
        if self.interval < 1:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'interval' is {self.interval!r}, allowed are integers >= 1"
            )
        self._optimizer()

    def pre_optim_step(self):
        if self.step % self.interval == 0:
            self._optimizer().ask_for_report()
            self._asked = True

    def post_train_batch(self):
        if not self._asked:  # also in one of the trainer's ``steps_to_skip``
            return
        self._asked = False
        optim = self._optimizer()
        reports = optim.take_report()
        if bool(optim.step_skipped):
            return
        everywhere = all_gather_object(_evaluate(optim, reports))
        by_parameter = _by_parameter(everywhere)
        model: Any = self.trainer.train_module
        by_role: DefaultDict[str, List[Numbers]] = defaultdict(list)
        for name, row in classify(model.model).items():
            if name in by_parameter:
                by_role[str(row.role)].append(by_parameter[name])
                if self.per_layer:
                    self._record(name, _without(by_parameter[name], map(RELATIVE.__add__, RANKS)))
        for role, numbers in by_role.items():
            self._record(role, _without(_combined(numbers), RANKS))

    def _record(self, of: str, numbers: Numbers) -> None:
        for measure, value in numbers.items():
            self.trainer.record_metric(matrix_metric(measure, of), value)

    def _optimizer(self) -> MatrixBase:
        allowed = "are optimizers of olmo_optim_ext with a rule for matrices"
        return optimizer_of(self.trainer.train_module, MatrixBase, allowed, type(self).__name__)


def _evaluate(
    optim: MatrixBase, reports: Mapping[str, Mapping[str, torch.Tensor]]
) -> Dict[str, Dict[str, Numbers]]:
    """By parameter and matrix, of those that this rank has reports of."""
    out: Dict[str, Dict[str, Numbers]] = {}
    calls = optim.param_groups[0][CALLS]
    for name, matrix, shape in optim.matrices():
        report = {key: x.cpu().numpy() for key, x in reports.get(matrix, {}).items()}
        if not all(np.isfinite(x).all() for x in report.values()):
            report = {FAILED: report[FAILED]} if FAILED in report else {}
        if not report:
            continue
        numbers = to_numbers(report)
        for measure in RANKS:
            if measure in numbers:
                numbers[RELATIVE + measure] = numbers[measure] / min(shape)
        if FIRED in numbers:
            numbers[FIRED] /= calls
        out.setdefault(name, {})[matrix] = numbers
    return out


def _by_parameter(everywhere: Iterable[Mapping[str, Mapping[str, Numbers]]]) -> Dict[str, Numbers]:
    """Means over the matrices of each parameter, each of which several ranks may have computed."""
    together: DefaultDict[str, DefaultDict[str, List[Numbers]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for of_rank in everywhere:
        for parameter, matrices in of_rank.items():
            for matrix, numbers in matrices.items():
                together[parameter][matrix].append(numbers)
    return {
        parameter: _combined([_mean(copies) for copies in matrices.values()])
        for parameter, matrices in together.items()
    }


def _mean(several: List[Numbers]) -> Numbers:
    measures = dict.fromkeys(measure for numbers in several for measure in numbers)
    return {
        measure: fmean(numbers[measure] for numbers in several if measure in numbers)
        for measure in measures
    }


def _combined(several: List[Numbers]) -> Numbers:
    """Of different matrices: sums of counts, means of all else."""
    counts = {
        measure: sum(numbers.get(measure, 0.0) for numbers in several)
        for measure in COUNTS
        if any(measure in numbers for numbers in several)
    }
    return {**_mean(several), **counts}


def _without(numbers: Numbers, measures: Iterable[str]) -> Numbers:
    left_out = set(measures)
    return {measure: value for measure, value in numbers.items() if measure not in left_out}
