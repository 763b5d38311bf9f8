"""
Estimates of the Hessian's diagonal for :class:`~olmo_optim_ext.elementwise.sophia.Sophia`, from
further passes over a part of the batch.

What is random follows from (seed, step) and from what it is drawn for: a label from the place of
its token in the global batch, a probe from the place of its element in the parameter. So it is the
same after a resume and on every mesh.
"""

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Deque, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import torch
import torch.distributed as dist
from olmo_core.data.utils import get_labels, split_batch
from olmo_core.distributed.utils import get_local_tensor, get_rank, get_world_size
from olmo_core.nn.functional import cross_entropy_loss
from olmo_core.nn.lm_head import LMHead, LMOutputWithLoss
from olmo_core.nn.moe.router import MoERouter
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerTrainModule
from olmo_core.utils import move_to_device

from ..elementwise.sophia import HessianEstimator, Sophia
from ..engine.placement import element_index
from ..engine.random import random_bits, stream
from .attached import optimizer_of, transformer_of
from .passes import backward_again, gradients_apart

__all__ = ["CLIPPED_METRIC", "HESSIAN_SHARE_METRIC", "SophiaCallback", "estimate_hessian"]

HESSIAN_SHARE_METRIC = "optim/hessian share of step time"
"""Of the time of all steps since the training began, the share that estimates have taken."""

CLIPPED_METRIC = "optim/clipped coordinates"
"""The share of coordinates whose update was clipped."""


@dataclass
class SophiaCallback(Callback):
    """
    Gives :class:`~olmo_optim_ext.elementwise.sophia.Sophia` its estimates of the Hessian::

        trainer_config.add_callback("sophia", SophiaCallback())

    How often, of which kind and from how much of the batch is what the optimizer's config says. An
    estimate is made before the main pass over the same batch, at the first step and then at every
    one that comes a multiple of ``hessian_update_interval`` after it; none at the trainer's
    ``steps_to_skip``. As long as none was finite and its step taken, the next step makes another.

    In the steps with an estimate it records :data:`CLIPPED_METRIC`, and in all of them
    :data:`HESSIAN_SHARE_METRIC`, on CUDA with events that are read when they are over: there is no
    host-device sync but one in the second step that is run, to see whether there is an estimate.

    :raises OLMoConfigurationError: When it is attached, unless the train module is a
        ``TransformerTrainModule`` with this optimizer.
    """

    # After callbacks that change the batch.
    priority: ClassVar[int] = -1000

    _has_hessian: bool = field(default=False, init=False, repr=False)
    _estimated: bool = field(default=False, init=False, repr=False)
    _watch: Optional["_Stopwatch"] = field(default=None, init=False, repr=False)

    def post_attach(self):
        module, _ = self._parts()
        self._watch = _Stopwatch(module.device)

    def pre_step(self, batch: Dict[str, Any]):
        module, optim = self._parts()
        assert self._watch is not None
        self._watch.begin()
        self._estimated = not self._skips() and self._due(optim)
        if self._estimated:
            estimate_hessian(module, optim, batch, self.step)
        self._watch.lap()

    def post_train_batch(self):
        _, optim = self._parts()
        assert self._watch is not None
        self._watch.end()
        if (share := self._watch.share()) is not None:
            self.trainer.record_metric(HESSIAN_SHARE_METRIC, share)
        if self._estimated:
            self.trainer.record_metric(CLIPPED_METRIC, optim.clipped_share())

    def _skips(self) -> bool:
        return any(each.start <= self.step < each.stop for each in self.trainer.steps_to_skip or ())

    def _due(self, optim: Sophia) -> bool:
        if (self.step - 1) % optim.hessian_update_interval == 0:
            return True
        self._has_hessian = self._has_hessian or optim.has_hessian()
        return not self._has_hessian

    def _parts(self) -> Tuple[TransformerTrainModule, Sophia]:
        owner = type(self).__name__
        module = transformer_of(self.trainer.train_module, owner)
        return module, optimizer_of(module, Sophia, "is Sophia of olmo_optim_ext", owner)


def estimate_hessian(
    module: TransformerTrainModule, optim: Sophia, batch: Mapping[str, Any], step: int
) -> None:
    """
    Give the optimizer an estimate from the first instances of the batch. Collective. Weights,
    gradients and the batch are afterwards what they were.

    :param batch: This rank's part of the global batch, as the trainer gives it to callbacks.
    :param step: Of the trainer, from which with the optimizer's seed follows what is random.
    """
    instances = batch["input_ids"].shape[0]
    part = dict(
        split_batch(dict(batch), max(1, round(optim.hessian_batch_fraction * instances)))[0]
    )
    with gradients_apart(module):
        if optim.estimator == HessianEstimator.hutchinson:
            optim.update_hessian_from_estimates(_hutchinson(module, optim, part, step))
        else:
            tokens = _backward_on_sampled_labels(module, part, optim.seed, step)
            if optim.batch_tokens is not None:
                whole = batch["input_ids"].numel() * get_world_size(module.dp_process_group)
                tokens = tokens * (optim.batch_tokens / whole)
            optim.update_hessian(tokens)


# Gauss-Newton-Bartlett


def _backward_on_sampled_labels(
    module: TransformerTrainModule, batch: Dict[str, Any], seed: int, step: int
) -> torch.Tensor:
    """
    Leaves the gradients of the mean loss with labels drawn from the model's predictions, for the
    tokens of the batch that have a label.

    :returns: How many tokens the mean is over, 0-d. Each rank takes the mean of its own, and the
        mean of these is taken over the ``W`` ranks: of independent gradients it varies like the
        mean over ``W^2 / sum(1 / n)`` tokens, which is their number where all have ``n`` of them.
    """
    ignored = module.label_ignore_index
    labels = batch.get("labels")
    labels = get_labels(batch, label_ignore_index=ignored) if labels is None else labels
    # In place of its label each token has its place in the global batch, from which its random
    # number follows: so places come to the predictions the way in which labels do, whatever
    # divides the batch.
    batch = {**batch, "labels": torch.where(labels == ignored, labels, _places(labels, module))}
    batch.pop("instance_mask", None)  # in the labels; else the mean would be over its tokens, too
    count = move_to_device((labels != ignored).sum(), module.device)
    with _without_auxiliary_losses(module), _sampled_labels(module, stream(seed, step, "labels")):
        backward_again(module, batch)
    inverse = count.to(torch.float32).reciprocal()
    ranks = get_world_size(module.dp_process_group)
    if ranks > 1:
        dist.all_reduce(inverse, group=module.dp_process_group)
    return ranks**2 / inverse


def _places(labels: torch.Tensor, module: TransformerTrainModule) -> torch.Tensor:
    """Places of tokens in the global batch, as the ranks deal its instances out in turn."""
    group = module.dp_process_group
    rank, ranks = get_rank(group), get_world_size(group)
    instances, length = labels.shape
    first = max(0, module.label_ignore_index + 1)  # no place must look like what is ignored
    rows = torch.arange(instances, device=labels.device) * ranks + rank
    return first + rows.unsqueeze(1) * length + torch.arange(length, device=labels.device)


@contextmanager
def _sampled_labels(module: TransformerTrainModule, key: int) -> Iterator[None]:
    """Inside the head takes its loss over labels that it draws, and takes labels for places."""
    head = module.model.lm_head
    assert isinstance(head, LMHead)
    places: List[torch.Tensor] = []

    def without_labels(_: Any, args: Any, kwargs: Dict[str, Any]) -> Any:
        places.append(get_local_tensor(kwargs["labels"]))
        return args, {**kwargs, "labels": None, "return_logits": None}

    def with_loss(_: Any, args: Any, kwargs: Dict[str, Any], logits: torch.Tensor) -> Any:
        place, scores = places.pop(), get_local_tensor(logits)
        labels = sample_labels(scores.detach(), place, kwargs["ignore_index"], key)
        sum_of_losses, _ = cross_entropy_loss(
            scores.view(-1, scores.shape[-1]),
            labels.view(-1),
            ignore_index=kwargs["ignore_index"],
            reduction="sum",
        )
        # OLMo-core's own division, which knows of tensor and context parallelism.
        loss = head._finalize_loss(
            sum_of_losses,
            place.shape[0],
            loss_reduction=kwargs["loss_reduction"],
            loss_div_factor=kwargs["loss_div_factor"],
        )
        nothing = torch.zeros_like(sum_of_losses.detach())  # the train module adds them up
        return LMOutputWithLoss(logits=None, loss=loss, ce_loss=nothing, z_loss=nothing)

    hooks = [
        head.register_forward_pre_hook(without_labels, with_kwargs=True),
        head.register_forward_hook(with_loss, with_kwargs=True),
    ]
    # Not compiled: what the hooks draw would be compiled anew for each key.
    compiled, head._compiled_call_impl = head._compiled_call_impl, None
    try:
        yield
    finally:
        head._compiled_call_impl = compiled
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def sample_labels(
    logits: torch.Tensor, places: torch.Tensor, ignore_index: int, key: int
) -> torch.Tensor:
    """
    Draw labels with the probabilities ``softmax(logits)``.

    :param logits: ``(instances, tokens, vocabulary)``.
    :param places: ``(instances, tokens)``, int64: the place of each token, or ``ignore_index``.
    :param key: The number of a :func:`~olmo_optim_ext.engine.random.stream`.

    :returns: ``(instances, tokens)``, where ``places`` is ``ignore_index`` the same.
    """
    # Filled on the device: a copy from the host would be a sync.
    bits = random_bits(places, torch.full((), key, device=places.device))
    uniform = (bits >> 8).to(torch.float32) * 2.0**-24
    drawn = []
    for scores, u in zip(logits.unbind(), uniform.unbind()):  # one by one, to save memory
        cumulative = scores.to(torch.float32).softmax(-1).cumsum(-1)
        threshold = (u * cumulative[:, -1]).unsqueeze(1)
        index = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
        drawn.append(index.clamp(max=scores.shape[-1] - 1))
    return torch.where(places == ignore_index, places, torch.stack(drawn))


@contextmanager
def _without_auxiliary_losses(module: TransformerTrainModule) -> Iterator[None]:
    """The estimate is of the loss of predictions; the head's own z-loss is left out with it."""
    routers = [m for m in module.model.modules() if isinstance(m, MoERouter)]
    weights = [(router.lb_loss_weight, router.z_loss_weight) for router in routers]
    for router in routers:
        router.lb_loss_weight = router.z_loss_weight = None
    try:
        yield
    finally:
        for router, its in zip(routers, weights):
            router.lb_loss_weight, router.z_loss_weight = its


# Hutchinson


def _hutchinson(
    module: TransformerTrainModule, optim: Sophia, batch: Dict[str, Any], step: int
) -> Dict[str, torch.Tensor]:
    """
    ``u (g(w + e u) - g(w - e u)) / 2e`` with ``u`` of -1 and 1: the local parts, by name. ``H`` is
    that of the whole loss that is trained on.
    """
    epsilon = optim.hutchinson_epsilon
    before = {param: get_local_tensor(param).detach().clone() for param in optim.state}

    def probe(param: torch.Tensor) -> torch.Tensor:
        return _probe(param, stream(optim.seed, step, optim.name_of(param), "probe"))

    def gradients(distance: float) -> Dict[str, torch.Tensor]:
        module.zero_grads()
        with torch.no_grad():
            for param, weights in before.items():
                get_local_tensor(param).copy_(weights + distance * probe(param))
        backward_again(module, batch)
        return optim.local_gradients()

    try:
        above, below = gradients(epsilon), gradients(-epsilon)
    finally:
        with torch.no_grad():
            for param, weights in before.items():
                get_local_tensor(param).copy_(weights)
    return {
        name: (above[name] - below[name]).to(torch.float32) / (2 * epsilon) * probe(param)
        for param in before
        if (name := optim.name_of(param)) in above
    }


def _probe(param: torch.Tensor, key: int) -> torch.Tensor:
    """-1 or 1 for each local element."""
    local = get_local_tensor(param)
    index = element_index(param)
    if index.ndim == 0:  # of the first of consecutive elements
        index = torch.arange(local.numel(), device=local.device) + index
    bits = random_bits(index, torch.full((), key, device=local.device))
    return ((bits & 1) * 2 - 1).to(torch.float32).view(local.shape)


# Cost

_Moment = Union[float, torch.cuda.Event]


class _Stopwatch:
    """
    Seconds that the device has spent, read when they are over: it is not waited for. With CUDA's
    events this was only reasoned, not run.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._steps: Deque[List[_Moment]] = deque()
        self._estimates = self._all = 0.0

    def begin(self) -> None:
        self._steps.append([self._now()])

    def lap(self) -> None:
        self._steps[-1].append(self._now())

    def end(self) -> None:
        self._steps[-1].append(self._now())

    def share(self) -> Optional[float]:
        """Time until the lap over time until the end, of all steps that are over."""
        while self._steps and self._is_over(self._steps[0][-1]):
            begin, lap, end = self._steps.popleft()
            self._estimates += _seconds(begin, lap)
            self._all += _seconds(begin, end)
        return self._estimates / self._all if self._all > 0 else None

    def _now(self) -> _Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_over(self, moment: _Moment) -> bool:
        return isinstance(moment, float) or moment.query()


def _seconds(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1000
