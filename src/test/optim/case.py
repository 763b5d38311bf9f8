"""
What the contract tests share: a model, gradients, and the form of a row of the contract table.
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from olmo_core.distributed.utils import get_local_tensor

from olmo_optim_ext import SAM, Mars, Sophia
from olmo_optim_ext.config import ExtOptimConfig

Grads = Dict[str, torch.Tensor]

STEPS = 20
"""Length of the runs that are compared across meshes and resumes."""


class MixedShapes(nn.Module):
    """One parameter of each kind; with 4 ranks some shards are uneven and some empty."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.square = nn.Linear(8, 8)
        self.tall = nn.Linear(8, 14, bias=False)
        self.wide = nn.Linear(20, 6, bias=False)
        self.few_rows = nn.Linear(8, 3)
        self.row = nn.Linear(8, 1)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.2)


def grads_at(step: int, model: nn.Module, scale: float = 0.1) -> Grads:
    """The global gradients of a step: the same whatever the mesh."""
    grads: Grads = {}
    for index, (name, param) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grads[name] = torch.randn(param.shape, generator=generator) * scale
    return grads


Loss = Callable[[], torch.Tensor]

CURVATURE = 10.0
"""The gradient of a further pass, at ``p + e``, is ``g + CURVATURE e``."""


def drive(optim: torch.optim.Optimizer, loss: Optional[Loss] = None) -> None:
    """
    What a trainer does for an optimizer between the backward pass and ``step()``.

    :param loss: Evaluates the loss anew. Without it the gradients that there are serve.
    """
    if isinstance(optim, Sophia):
        if optim.param_groups[0]["calls"] % optim.hessian_update_interval == 0:
            if loss is None:
                optim.update_hessian()
            else:
                params = {optim.name_of(param): param for param in optim.state}
                optim.update_hessian_from_estimates(hessian_diagonal(loss(), params))
    if isinstance(optim, Mars) and optim.exact:
        _look_back(optim)
    if isinstance(optim, SAM) and optim.wants_second_pass():
        _look_around(optim)


def _look_back(optim: Mars) -> None:
    """The gradients of the batch at the last weights."""
    params = _with_gradient(optim)
    grads = [param.grad for param in params]
    now = [get_local_tensor(param.detach()).clone() for param in params]
    with optim.at_last_weights():
        for param, at in zip(params, now):
            _add_curvature(param, at)
    optim.keep_last_gradients()
    for param, grad in zip(params, grads):
        param.grad = grad


def _look_around(optim: SAM) -> None:
    """The gradients of the second pass."""
    params = _with_gradient(optim)
    before = [get_local_tensor(param.detach()).clone() for param in params]
    optim.perturb()
    for param, at in zip(params, before):
        _add_curvature(param, at)


def _with_gradient(optim: torch.optim.Optimizer) -> List[torch.Tensor]:
    return [p for group in optim.param_groups for p in group["params"] if p.grad is not None]


def _add_curvature(param: torch.Tensor, at: torch.Tensor) -> None:
    assert param.grad is not None
    param.grad = param.grad.clone()
    moved = get_local_tensor(param.detach()) - at
    get_local_tensor(param.grad).add_(moved, alpha=CURVATURE)


def hessian_diagonal(
    loss: torch.Tensor, params: Mapping[str, torch.Tensor]
) -> Dict[str, torch.Tensor]:
    """The diagonal of the Hessian, one coordinate after the other."""
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    out = {}
    for (name, param), grad in zip(params.items(), grads):
        rows = [
            torch.autograd.grad(each, param, retain_graph=True)[0].reshape(-1)[i]
            for i, each in enumerate(grad.reshape(-1))
        ]
        out[name] = torch.stack(rows).view(param.shape)
    return out


def take_step(optim: torch.optim.Optimizer, loss: Optional[Loss] = None) -> None:
    drive(optim, loss)
    optim.step()


def train(
    model: nn.Module, optim: torch.optim.Optimizer, first: int, last: int, scale: float = 0.1
) -> None:
    """Steps ``first`` to ``last`` (exclusive) on plain tensors, under a moving learning rate."""
    for step in range(first, last):
        set_lr(optim, step)
        grads = grads_at(step, model, scale)
        for name, param in model.named_parameters():
            param.grad = grads[name]
        take_step(optim)
        optim.zero_grad()


def set_lr(optim: torch.optim.Optimizer, step: int) -> None:
    for group in optim.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * (1.0 - 0.01 * step)


def weights(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def equal(a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
) -> float:
    """The largest ``||W - W_ref|| / ||W_ref - W_0||`` over parameters."""
    return max(
        float(
            torch.linalg.vector_norm(got[name].double() - expected[name].double())
            / torch.linalg.vector_norm(expected[name].double() - start[name].double())
        )
        for name in expected
    )


Oracle = Callable[[Dict[str, torch.Tensor], int], Dict[str, torch.Tensor]]
"""From the start weights and a number of steps to the end weights."""


@dataclass
class Case:
    config: ExtOptimConfig
    """With which the contracts run."""

    oracles: Sequence[Tuple[ExtOptimConfig, Oracle, float]]
    """Pairs of a config and what it must agree with, and the relative error allowed."""

    bad_fields: List[Dict[str, Any]]
    """Values that the config must refuse, one field each."""

    bitwise: bool
    """Whether meshes agree bitwise."""

    fast_lr: float
    """A learning rate that solves the small problems."""

    fast_lr_of: Dict[str, float] = field(default_factory=dict)
    """
    Other learning rates for some of the problems, by name, of rules whose step grows with the
    gradient: what is fast for one problem diverges for another.
    """

    bound: Callable[[float, float], float] = lambda lr, largest_grad: 5 * 5 * lr
    """
    How far five updates may move a coordinate: from the learning rate and the largest gradient.
    """

    whole_model: bool = False
    """Whether the update of a parameter also follows from the gradients of the others."""

    state_bytes: Dict[str, float] = field(default_factory=dict)
    """Bytes of state per parameter by algorithm."""

    factor_bytes: Callable[[int, int], float] = lambda n_out, n_in: 0
    """Bytes of state of an ``(out, in)`` matrix beside these."""

    own_bytes: Callable[[str, Tuple[int, ...]], float] = lambda name, shape: 0
    """Bytes of state of a parameter beside these, by name and shape."""

    without_decay: Dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.0})
    """Fields with which nothing is done to parameters but the update."""

    without_randomness: Dict[str, Any] = field(default_factory=dict)
    """
    Fields with which nothing random enters the first five calls: what is random follows from the
    number of the call.
    """

    other_values: Dict[str, Any] = field(default_factory=lambda: {"lr": 0.02, "weight_decay": 0.3})
    """Other values of hyperparameters, which must not compile anything anew."""


def torch_oracle(make: Callable[[List[nn.Parameter]], torch.optim.Optimizer]) -> Oracle:
    def run(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
        model = MixedShapes()
        model.load_state_dict(start)
        optim = make(list(model.parameters()))
        train(model, optim, 0, steps)
        return weights(model)

    return run


def adamw_oracle(start: Dict[str, torch.Tensor], steps: int) -> Dict[str, torch.Tensor]:
    """``torch.optim.AdamW`` with the hyperparameters of :data:`ADAMW_REST`."""
    oracle = torch_oracle(
        lambda params: torch.optim.AdamW(
            params, lr=0.002, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.05, foreach=False
        )
    )
    return oracle(start, steps)


MATRICES = ("square.weight", "tall.weight", "wide.weight", "few_rows.weight")
"""Of :class:`MixedShapes`."""

ADAMW_REST: Dict[str, Any] = dict(
    adamw_lr=0.002, adamw_betas=(0.8, 0.9), adamw_eps=1e-7, adamw_weight_decay=0.05
)
BAD_ENGINE: List[Dict[str, Any]] = [
    {"compile": "false"},
    {"skip_step": 1},
    {"rolling_interval_length": 1},
    {"rolling_interval_length": 1025},
    {"sigma_factor": 0},
    {"state_dtype": "float16"},
    {"seed": -1},
    {"cautious_weight_decay": "yes"},
]


def grows_with_gradient(lr: float, largest_grad: float) -> float:
    """The bound of a rule whose step is proportional to the gradient."""
    return 5 * 5 * lr * (1 + largest_grad)
