"""
SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv:2409.11321, algorithm
3).
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import numpy as np
import torch
from olmo_core.config import StrEnum
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..engine.elementwise import bias_correction
from ..engine.hyperparameters import to_flag
from ..engine.matrix import Owned
from ..engine.moments import Beta, Moment
from ..linalg.eigenbasis import eigenbasis, gram_average, power_step
from ..linalg.precision import full_precision
from .base import AdamWOptions
from .preconditioned import PreconditionedConfig, PreconditionedOptimizer

__all__ = ["Soap", "SoapConfig", "adam_in_basis", "rotate", "rotate_back"]

EXP_AVG, EXP_AVG_SQ = "basis_exp_avg", "basis_exp_avg_sq"
GRAMS, EIGVECS = ("gram_left", "gram_right"), ("eigvecs_left", "eigvecs_right")
UPDATES, FAILURES = "updates", "failed_refreshes"

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples fill [0, 1) evenly, also when only every so-manieth is taken."""

Bases = Sequence[Optional[torch.Tensor]]
"""
``Q_L`` ``(k, out, out)`` and ``Q_R`` ``(k, in, in)``, with an eigenvector in each row; ``None`` is
the identity.
"""


class Phase(StrEnum):
    """What a step does with a matrix."""

    first = "first"
    """Find the basis, and leave the matrix alone."""

    step = "step"
    """Update it."""

    refresh = "refresh"
    """Update it, and the basis."""


@full_precision()
def rotate(x: torch.Tensor, bases: Bases) -> torch.Tensor:
    """Into the basis: ``Q_L x Q_R^T``, of matrices ``(k, out, in)``."""
    left, right = bases
    x = x if left is None else left @ x
    return x if right is None else x @ right.mT


@full_precision()
def rotate_back(x: torch.Tensor, bases: Bases) -> torch.Tensor:
    """Out of the basis: ``Q_L^T x Q_R``."""
    left, right = bases
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def adam_in_basis(
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    betas: Sequence[float],
    eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, all in the basis.

    :returns: ``m / (sqrt(v) + eps)`` and the new ``m`` and ``v``.
    """
    beta1, beta2 = betas
    exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = torch.addcmul(exp_avg_sq * beta2, grad, grad, value=1 - beta2)
    return exp_avg / exp_avg_sq.sqrt().add_(eps), exp_avg, exp_avg_sq


class SoapOptions(AdamWOptions, total=False):
    """Keywords of :class:`Soap`; for their meaning see :class:`SoapConfig`."""

    lr: float
    betas: Tuple[float, ...]
    shampoo_beta: Optional[float]
    eps: float
    weight_decay: float
    precondition_frequency: int
    max_precond_dim: int
    one_sided: bool
    normalize_grads: bool
    correct_bias: bool
    stagger: bool
    float64_on_failure: bool


class Soap(PreconditionedOptimizer):
    """
    With ``g' = Q_L g Q_R^T`` and Adam's moments ``m`` and ``v`` of ``g'``, in the basis::

        W <- (1 - lr wd) (W - lr_t Q_L^T (m / (sqrt(v) + eps)) Q_R)
        L <- b L + (1 - b) g g^T,  R <- b R + (1 - b) g^T g

    where ``lr_t = lr sqrt(1 - b2^t) / (1 - b1^t)``. The first step of a matrix only finds ``Q_L``
    and ``Q_R``, in rows the eigenvectors of ``L`` and ``R``; later, every
    ``precondition_frequency`` updates, they follow by
    :func:`~olmo_optim_ext.linalg.eigenbasis.power_step`, ``m`` is rotated into the new basis, and
    the axes of ``v`` are permuted as the eigenvectors are.

    All state of a matrix belongs to the rank that owns it. For the arguments see
    :class:`SoapConfig`.

    :param params: Groups with ``algorithm`` set to ``"soap"`` or ``"adamw"``;
        ``SoapConfig(...).build(model)`` makes them.

    :raises OLMoConfigurationError: If a value is out of its range or no group follows SOAP.
    """

    algorithm = "soap"
    # In the basis, but as long as none is found that is the identity.
    matrix_moments = (Moment(EXP_AVG, 1, Beta("betas", 0)),)
    host_factors = (UPDATES,)
    nullable = frozenset({"shampoo_beta"})

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: Tuple[float, ...] = (0.95, 0.95),
        shampoo_beta: Optional[float] = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        one_sided: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        stagger: bool = False,
        float64_on_failure: bool = True,
        **options: Unpack[AdamWOptions],
    ):
        self._shifts: Dict[str, float] = {}
        defaults = dict(
            lr=lr,
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            one_sided=one_sided,
            normalize_grads=normalize_grads,
            correct_bias=correct_bias,
            stagger=stagger,
            float64_on_failure=float64_on_failure,
        )
        super().__init__(params, defaults, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        for flag in (
            *("one_sided", "normalize_grads", "correct_bias"),
            *("stagger", "float64_on_failure"),
        ):
            to_flag(group[flag], flag, type(self).__name__)

    def factor_shapes(
        self, group: Mapping[str, Any], n_out: int, n_in: int
    ) -> Dict[str, Tuple[int, ...]]:
        shapes: Dict[str, Tuple[int, ...]] = {UPDATES: (1,), FAILURES: (1,)}
        shapes[EXP_AVG] = shapes[EXP_AVG_SQ] = (n_out, n_in)
        for side in sides(group, n_out, n_in):
            n = (n_out, n_in)[side]
            shapes[GRAMS[side]] = shapes[EIGVECS[side]] = (n, n)
        return shapes

    def fill_factor(
        self,
        group: Mapping[str, Any],
        name: str,
        factor: torch.Tensor,
        matrix: str,
        shape: Tuple[int, int],
    ) -> None:
        if name in EIGVECS:
            factor.fill_diagonal_(1.0)

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        grad, old = owned.x, owned.factors
        beta1, beta2 = group["betas"]
        beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        at = sides(group, *grad.shape[-2:])
        new = {
            UPDATES: old[UPDATES] + 1,
            **{GRAMS[s]: gram_average(old[GRAMS[s]], grad.mT if s else grad, beta) for s in at},
        }
        if owned.phase == Phase.first:
            for s in at:
                new[EIGVECS[s]], found = eigenbasis(new[GRAMS[s]], group["float64_on_failure"])
                new[FAILURES] = _counted(new.get(FAILURES, old[FAILURES]), found)
            # Zero, but if another optimizer has left it.
            new[EXP_AVG] = rotate(old[EXP_AVG], [new.get(name) for name in EIGVECS])
            return torch.zeros_like(grad), new

        bases = [old.get(name) for name in EIGVECS]
        direction, exp_avg, exp_avg_sq = adam_in_basis(
            rotate(grad, bases), old[EXP_AVG], old[EXP_AVG_SQ], group["betas"], group["eps"]
        )
        update = rotate_back(direction, bases)
        if group["normalize_grads"]:
            update = update / (update.square().mean((-2, -1), keepdim=True).sqrt() + 1e-30)
        if group["correct_bias"]:
            step = owned.step - 1  # the first found the basis
            factor = bias_correction(beta2, step).sqrt() / bias_correction(beta1, step)
            update = update * factor[:, None, None]
        if owned.phase == Phase.refresh:
            exp_avg = rotate_back(exp_avg, bases)
            for s in at:
                basis, order, found = power_step(new[GRAMS[s]], old[EIGVECS[s]])
                places = order[:, None, :] if s else order[:, :, None]
                exp_avg_sq = exp_avg_sq.gather(2 if s else 1, places.expand_as(exp_avg_sq))
                new[EIGVECS[s]], bases[s] = basis, basis
                new[FAILURES] = _counted(new.get(FAILURES, old[FAILURES]), found)
            exp_avg = rotate(exp_avg, bases)
        return update, {**new, EXP_AVG: exp_avg, EXP_AVG_SQ: exp_avg_sq}

    def phase(
        self,
        group: Mapping[str, Any],
        name: str,
        shape: Tuple[int, int],
        on_host: Mapping[str, np.ndarray],
    ) -> Phase:
        updates, frequency = int(on_host[UPDATES][0]), group["precondition_frequency"]
        if updates == 0:
            return Phase.first
        shift = int(self._shift(name) * frequency) if group["stagger"] else 0
        return Phase.refresh if (updates + shift) % frequency == 0 else Phase.step

    def _shift(self, name: str) -> float:
        """
        By which share of a period a matrix is refreshed earlier with ``stagger``. A group that is
        added later moves the others.
        """
        if name not in self._shifts:
            # In the order in which matrices are dealt out to owners, so that what is refreshed in a
            # step costs alike, on each owner too.
            matrices = self.all_matrices()
            costs = {name: self.cost(group, *shape) for name, (group, shape) in matrices.items()}
            names = sorted(costs, key=lambda name: -costs[name])
            self._shifts = {name: i * GOLDEN % 1.0 for i, name in enumerate(names)}
        return self._shifts[name]

    def report(
        self, group: Mapping[str, Any], owned: Owned, updates: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        return {
            **super().report(group, owned, updates),
            "failed refreshes": owned.factors[FAILURES][:, 0].clone(),
        }

    def decay(self, group: Mapping[str, Any], step: torch.Tensor) -> torch.Tensor:
        return 1 - group["lr"] * group["weight_decay"] * (step > 1).to(step.dtype)

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        # The authors decay what the update made; with a cautious decay nobody says which is first.
        if group["cautious_weight_decay"]:
            return 1.0
        return 1 - group["lr"] * group["weight_decay"]

    def cost(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        return soap_flops(n_out, n_in, sides(group, n_out, n_in), group["precondition_frequency"])


def sides(group: Mapping[str, Any], n_out: int, n_in: int) -> List[int]:
    """Which sides of an ``(out, in)`` matrix have a preconditioner, 0 for the left, 1 the right."""
    shape = (n_out, n_in)
    found = [side for side in (0, 1) if 1 < shape[side] <= group["max_precond_dim"]]
    if group["one_sided"] and len(found) == 2:
        return [0] if n_out <= n_in else [1]
    return found


def soap_flops(n_out: int, n_in: int, at: Sequence[int], frequency: int) -> float:
    """
    Floating point operations of a step, on average: those of the products, QR as ``8/3 n^3``, and
    some for each element.
    """
    total = 16.0 * n_out * n_in
    for n in ((n_out, n_in)[side] for side in at):
        product = 2.0 * n * n_out * n_in
        # The Gram matrix, by half, there and back; of a refresh back and there, a product, and QR.
        total += 2.5 * product + (2 * product + 2.0 * n**3 + 8 / 3 * n**3) / frequency
    return total


def _counted(failures: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return failures + (~found).to(failures.dtype).unsqueeze(-1)


@OptimConfig.register("soap")
@dataclass
class SoapConfig(PreconditionedConfig[Soap]):
    """
    Config of :class:`Soap`. Embeddings, head and vectors follow AdamW (``adamw_*``), unless
    ``precondition_embeddings``, ``precondition_lm_head`` and ``precondition_1d`` say otherwise.
    """

    lr: float = 3e-3
    """Learning rate of matrices, >= 0. As in the authors' code."""

    betas: Tuple[float, ...] = (0.95, 0.95)
    """Decay of the moments in the basis, two numbers in [0, 1). As in the authors' code."""

    shampoo_beta: Optional[float] = None
    """
    Decay of the Gram matrices, in [0, 1). ``None`` takes ``betas[1]``. As in the authors' code,
    where -1 stands for it.
    """

    eps: float = 1e-8
    """Added to the root of the second moment, before its bias is corrected. >= 0."""

    weight_decay: float = 0.01
    """
    Decoupled, and after the update: a step multiplies by ``1 - lr * weight_decay`` what the update
    made. >= 0. As in the authors' code.
    """

    precondition_frequency: int = 10
    """Every how many updates the eigenvectors follow, >= 1. As in the authors' code."""

    max_precond_dim: int = 10000
    """A side that is larger has no preconditioner, >= 1. As in the authors' code."""

    one_sided: bool = False
    """
    Precondition the smaller side of each matrix only, of square ones the left (section 5 of the
    paper).
    """

    normalize_grads: bool = False
    """Scale the update of each matrix to an RMS of 1, before its bias is corrected."""

    correct_bias: bool = True
    """Correct the bias of the moments. As in the authors' code."""

    stagger: bool = False
    """
    Spread the refreshes of the matrices over the steps, on each owner too, so that no step pays for
    all. The authors' code refreshes all in the same step.
    """

    float64_on_failure: bool = True
    """
    Find the first eigenvectors in float64 where they are not found in float32. As in the authors'
    code. Where that fails too, or a later refresh does, the old ones stay.
    """

    @classmethod
    def optimizer(cls) -> Type[Soap]:
        return Soap
