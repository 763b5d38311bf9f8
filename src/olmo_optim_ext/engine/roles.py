"""
Which parameter is what. The only place that knows parameter names: globs, tables and checkpoints
use the canonical names made here.
"""

from dataclasses import dataclass
from typing import Dict, Iterator, List, Set, Tuple

import torch
import torch.nn as nn
from olmo_core.config import StrEnum
from olmo_core.nn.moe.mlp import MoEMLPBase
from olmo_core.nn.moe.v2.routed_experts import RoutedExperts
from olmo_core.nn.moe.v2.shared_experts import SharedExperts
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "ParamRole",
    "Role",
    "canonical_name",
    "classify",
    "frozen_parameter_names",
    "named_trainable_parameters",
]

_WRAPPERS = {"_checkpoint_wrapped_module", "_orig_mod"}


class Role(StrEnum):
    """What a parameter is to its model."""

    matrix = "matrix"
    """A linear map between hidden activations, ``(out, in)``."""

    embedding = "embedding"
    """A table of vectors, ``(entries, width)``, also where the head is tied to it."""

    head = "head"
    """The map from the last activations to the vocabulary, ``(vocabulary, width)``."""

    vector = "vector"
    """Gains, biases, scalars, and everything that no other role fits."""

    experts = "experts"
    """Weights or biases of the experts of a mixture-of-experts layer, stacked."""


@dataclass(frozen=True)
class ParamRole:
    """A row of the role table."""

    name: str
    """Canonical name."""

    shape: Tuple[int, ...]
    """Of the whole parameter."""

    role: Role

    tied_to: Tuple[str, ...] = ()
    """Other names of the same tensor."""


def canonical_name(name: str) -> str:
    """
    A parameter's name without what activation checkpointing and ``torch.compile`` insert:
    ``_checkpoint_wrapped_module.`` and ``_orig_mod.``.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrap(model: nn.Module) -> nn.Module:
    # "module." is stripped as a wrapper, not as text: a model may have a child of that name.
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif inner := [m for name, m in model.named_children() if name in _WRAPPERS]:
            model = inner[0]
        else:
            return model


def _modules(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    for name, module in _unwrap(model).named_modules():
        yield canonical_name(name), module


def named_trainable_parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    """The trainable parameters by canonical name, in the model's order, each once."""
    return {
        canonical_name(name): param
        for name, param in _unwrap(model).named_parameters()
        if param.requires_grad
    }


def frozen_parameter_names(model: nn.Module) -> Set[str]:
    """The canonical names of the parameters that are not trained."""
    return {
        canonical_name(name)
        for name, param in _unwrap(model).named_parameters()
        if not param.requires_grad
    }


def classify(model: nn.Module) -> Dict[str, ParamRole]:
    """
    The role of each trainable parameter.

    The head is the module ``lm_head`` of the model, what ``get_output_embeddings()`` of a Hugging
    Face model returns, or a module whose weight is an embedding's. Embeddings are found by module
    type, ties by identity of the tensor. A matrix has two dimensions larger than 1; a convolution's
    weight counts as a vector.

    :returns: Rows by canonical name, in the model's order.
    """
    all_names = _names_by_tensor(model)
    embeddings, experts = _ids_of_embeddings(model), _ids_of_experts(model)
    head = _ids_of_head(model)

    rows: Dict[str, ParamRole] = {}
    for name, param in named_trainable_parameters(model).items():
        if id(param) in embeddings:
            role = Role.embedding
        elif id(param) in experts:
            role = Role.experts
        elif param.ndim != 2 or min(param.shape) <= 1:
            role = Role.vector
        elif id(param) in head:
            role = Role.head
        else:
            role = Role.matrix
        others = tuple(other for other in all_names[id(param)] if other != name)
        rows[name] = ParamRole(name, tuple(param.shape), role, others)
    return rows


def _names_by_tensor(model: nn.Module) -> Dict[int, List[str]]:
    names: Dict[int, List[str]] = {}
    for name, param in _unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    return names


def _ids(params: Iterator[torch.Tensor]) -> Set[int]:
    return {id(param) for param in params}


def _ids_of_embeddings(model: nn.Module) -> Set[int]:
    return {
        id(module.weight)
        for _, module in _modules(model)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }


def _ids_of_experts(model: nn.Module) -> Set[int]:
    found: Set[int] = set()
    for _, module in _modules(model):
        if isinstance(module, (MoEMLPBase, RoutedExperts, SharedExperts)):
            found |= _ids(module.parameters())
    return found


def _ids_of_head(model: nn.Module) -> Set[int]:
    found: Set[int] = set()
    for name, module in _modules(model):
        if name == "lm_head":
            found |= _ids(module.parameters())
    output_embeddings = getattr(_unwrap(model), "get_output_embeddings", None)
    if callable(output_embeddings) and (head := output_embeddings()) is not None:
        found |= _ids(head.parameters())
    return found
