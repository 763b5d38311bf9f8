"""
From one optimizer to another in the middle of training: state that means the same in both goes
over, from a checkpoint, the rest begins anew, and each decision is listed.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from olmo_core.distributed.checkpoint import get_checkpoint_metadata, load_state_dict
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.optim import Lion, SkipStepAdamW, SkipStepLion
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..engine.base import DECOUPLED, STEP, ExtOptimizer
from ..engine.moments import ADAM_MOMENTS, Beta, Moment
from ..engine.roles import named_trainable_parameters

__all__ = ["Decision", "carry_over"]

LION_MOMENTS = (Moment("exp_avg", 1, Beta("betas", 1), corrected=False),)


@dataclass(frozen=True)
class Decision:
    """What became of one state of one parameter."""

    parameter: str
    state: str
    source: Optional[str]
    """The state that it continues; ``None`` if it begins anew."""
    why: str


@dataclass(frozen=True)
class _Kept:
    """What the optimizer before has kept of a parameter."""

    group: Mapping[str, Any]
    moments: Sequence[Moment]


def carry_over(
    optim: ExtOptimizer, source: torch.optim.Optimizer, source_model: nn.Module, folder: str
) -> List[Decision]:
    """
    Fill the new state of an optimizer with what a checkpoint has of another one's.

    A mean of gradients, or of their squares, goes over to one of the same kind: with
    ``x = w / (1 - b) (1 - b^t) E`` on either side, so that ``E`` stays what it was. The count of
    updates ``t`` goes over if all that the rule keeps of a parameter does. If not, ``t`` is 0, and
    what the rule divides by ``1 - b^t`` gets the weight of a single gradient, ``1 - b``: more would
    be multiplied by up to ``1 / (1 - b)`` in the first updates. The history of the gate goes over.

    Collective where parameters are sharded.

    :param optim: A new one, with its state as it was made.
    :param source: The optimizer that has left the checkpoint, for its parameter groups; it may be
        on the meta device. Of optimizers of this package and of OLMo-core's Adam, AdamW and
        Lion is known what their state means.
    :param source_model: Its model.
    :param folder: The checkpoint's ``model_and_optim``.

    :returns: A decision for each state of each parameter.
    """
    saved = {
        key.removeprefix("optim.state."): value
        for key, value in get_checkpoint_metadata(folder).state_dict_metadata.items()
        if key.startswith("optim.state.") and isinstance(value, TensorStorageMetadata)
    }
    kept = _kept(source, source_model)
    before = type(source).__name__
    jobs: List[Tuple[torch.Tensor, Dict[str, Any], List[Tuple[Moment, Moment]]]] = []
    wanted: Dict[str, torch.Tensor] = {}
    for group in optim.param_groups:
        for param in (p for p in group["params"] if p in optim.state):
            name = optim.name_of(param)
            pairs = _pairs(optim, group, param, kept.get(name), saved)
            jobs.append((param, group, pairs))
            for _, theirs in pairs:
                key = f"{name}.{theirs.key}"
                dtype = saved[key].properties.dtype
                wanted[key] = torch.zeros_like(param.detach(), dtype=dtype)
            if pairs and f"{name}.{STEP}" in saved:
                wanted[f"{name}.{STEP}"] = torch.zeros((), dtype=torch.float32)
    gate = _gate(optim, saved)
    wanted.update(gate)
    if wanted:
        state_dict = {f"optim.state.{key}": value for key, value in wanted.items()}
        load_state_dict(folder, state_dict)
        wanted = {key: state_dict[f"optim.state.{key}"] for key in wanted}
    decisions: List[Decision] = []
    for param, group, pairs in jobs:
        name = optim.name_of(param)
        step = wanted.get(f"{name}.{STEP}")
        updates = None if step is None else float(step)
        decisions += _carry(optim, param, group, pairs, kept.get(name), wanted, updates, before)
    for key, value in gate.items():
        name = key.rpartition(".")[2]
        optim.shared[name].copy_(value)
        decisions.append(Decision("all", name, name, "the history of losses and gradient norms"))
    return decisions


def _kept(source: torch.optim.Optimizer, model: nn.Module) -> Dict[str, _Kept]:
    names = {param: name for name, param in named_trainable_parameters(model).items()}
    return {
        names[param]: _Kept(group, _moments(source, group))
        for group in source.param_groups
        for param in group["params"]
        if param in names
    }


def _moments(optim: torch.optim.Optimizer, group: Mapping[str, Any]) -> Sequence[Moment]:
    if isinstance(optim, ExtOptimizer):
        moments = optim.moments(group)
    elif isinstance(optim, (torch.optim.AdamW, SkipStepAdamW)):
        moments = ADAM_MOMENTS
    elif isinstance(optim, torch.optim.Adam):
        moments = () if group["weight_decay"] != 0 else ADAM_MOMENTS  # L2
    elif isinstance(optim, (Lion, SkipStepLion)):
        moments = LION_MOMENTS
    else:
        moments = ()
    if not group.get(DECOUPLED, True) and group["weight_decay"] != 0:
        return ()  # of gradients with weight decay in them
    return [moment for moment in moments if moment.beta(group) > 0]


def _pairs(
    optim: ExtOptimizer,
    group: Mapping[str, Any],
    param: torch.Tensor,
    kept: Optional[_Kept],
    saved: Mapping[str, TensorStorageMetadata],
) -> List[Tuple[Moment, Moment]]:
    """The moments of a parameter that go over: each with the one that it continues."""
    pairs = []
    for ours in _moments(optim, group):
        for theirs in () if kept is None else kept.moments:
            found = saved.get(f"{optim.name_of(param)}.{theirs.key}")
            if theirs.power == ours.power and found is not None and found.size == param.shape:
                pairs.append((ours, theirs))
                break
    return pairs


def _gate(
    optim: ExtOptimizer, saved: Mapping[str, TensorStorageMetadata]
) -> Dict[str, torch.Tensor]:
    """Where a checkpoint has the gate's history, and room for it."""
    out = {}
    for name, ours in optim.shared.items():
        if name.startswith("gate_"):
            key = next((key for key in saved if key.endswith(f".{name}")), None)
            if key is not None and saved[key].size == ours.shape:
                out[key] = torch.zeros_like(ours)
    return out


def _carry(
    optim: ExtOptimizer,
    param: torch.Tensor,
    group: Mapping[str, Any],
    pairs: Sequence[Tuple[Moment, Moment]],
    kept: Optional[_Kept],
    loaded: Mapping[str, torch.Tensor],
    updates: Optional[float],
    before: str,
) -> List[Decision]:
    name, state = optim.name_of(param), optim.state[param]
    own = state.keys() - {STEP} - {key for key in optim.shared if key.startswith("gate_")}
    known = {ours.key for ours, _ in pairs}
    keeps_clock = bool(pairs) and own == known and updates is not None
    decisions = []
    for ours, theirs in pairs:
        assert kept is not None
        value = loaded[f"{name}.{theirs.key}"]
        factor, why = _factor(ours, group, theirs, kept.group, updates, keeps_clock)
        if factor != 1:
            get_local_tensor(value).mul_(factor)
        optim.put(param, ours.key, value)
        decisions.append(Decision(name, ours.key, theirs.key, f"{ours.meaning}{why}"))
    if keeps_clock:
        assert updates is not None
        state[STEP].fill_(updates)
        decisions.append(Decision(name, STEP, STEP, f"{updates:.0f} updates"))
    fresh = own - known if keeps_clock or not own else {*(own - known), STEP}
    reasons = {m.key: f"{before} has left no {m.meaning} of it" for m in optim.moments(group)}
    reasons[STEP] = "it counts for all that the rule keeps, and not all of that goes over"
    decisions += [
        Decision(name, key, None, reasons.get(key, f"{before} has none")) for key in sorted(fresh)
    ]
    return decisions


def _factor(
    ours: Moment,
    group: Mapping[str, Any],
    theirs: Moment,
    their_group: Mapping[str, Any],
    updates: Optional[float],
    keeps_clock: bool,
) -> Tuple[float, str]:
    """By what a moment is multiplied on its way, and what is said of that."""
    beta, their_beta = ours.beta(group), theirs.beta(their_group)
    gain, their_gain = ours.gain(group), theirs.gain(their_group)
    alike = (beta, gain) == (their_beta, their_gain)
    if alike and (keeps_clock or not ours.corrected):
        return 1.0, ""
    if updates == 0:
        return 1.0, ", which is 0"
    mean = 1.0 if updates is None else 1 - their_beta**updates
    if not ours.corrected:
        target, why = 1.0, ""
    elif keeps_clock:
        assert updates is not None
        target, why = 1 - beta**updates, ""
    else:
        target, why = 1 - beta, " with the weight of one gradient, as the count of updates is new"
    factor = gain * target / (their_gain * mean)
    return factor, f"{why}, times {factor:.4g}"
