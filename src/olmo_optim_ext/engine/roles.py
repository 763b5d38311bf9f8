"""
Which parameter is what. The only place that knows parameter names: globs, tables and checkpoints
use the canonical names made here.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import (
    Any,
    DefaultDict,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

import torch
import torch.nn as nn
from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import Attention, FusedAttentionV2
from olmo_core.nn.attention.kda import KimiDeltaAttention
from olmo_core.nn.attention.recurrent import GatedDeltaNet, NemotronMamba2Mixer
from olmo_core.nn.layer_norm import LayerNorm
from olmo_core.nn.lm_head import LMHead
from olmo_core.nn.moe.mlp import DroplessMoEMLP, MoEMLP, MoEMLPBase
from olmo_core.nn.moe.v2.routed_experts import ExpertActivation, RoutedExperts
from olmo_core.nn.moe.v2.shared_experts import SharedExperts
from olmo_core.nn.vision import VisionConnector, VisionTransformer, ViTAttention
from torch.nn.parallel import DistributedDataParallel

from .layout import MatrixLayout

__all__ = [
    "ParamRole",
    "Role",
    "RowBlocks",
    "canonical_name",
    "classify",
    "frozen_parameter_names",
    "layout_of",
    "named_trainable_parameters",
]

_WRAPPERS = {"_checkpoint_wrapped_module", "_orig_mod"}
_NORMS = (LayerNorm, nn.LayerNorm, nn.RMSNorm)
_EXPERTS = (MoEMLPBase, RoutedExperts, SharedExperts)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Role(StrEnum):
    """What a parameter is to its model."""

    matrix = "matrix"
    """A linear map between hidden activations, ``(out, in)``."""

    embedding = "embedding"
    """A table of vectors, ``(entries, width)``, also where the head is tied to it."""

    head = "head"
    """The map from the last activations to the vocabulary, ``(vocabulary, width)``."""

    vector = "vector"
    """Gains, biases, scalars, convolutions, and everything that no other role fits."""

    experts = "experts"
    """Weights of the experts of a mixture-of-experts layer, stacked; their biases are vectors."""


class RowBlocks(StrEnum):
    """Which blocks of a matrix's outputs are taken as matrices of their own."""

    whole = "whole"
    """The matrix as it is stored."""

    fused = "fused"
    """Fused projections apart: q, k and v; gate and up."""

    heads = "heads"
    """Besides, each attention head's rows of q, k and v a matrix of its own."""


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

    layout: Optional[MatrixLayout] = None
    """
    The matrices that the whole parameter stores, all of one shape, also where its role is not
    ``matrix``. ``None`` for what cannot be matrices: a matrix has two dimensions larger than 1.
    """

    parts: Tuple[int, ...] = ()
    """
    Outputs of each of the linear maps that are fused along the outputs of every matrix of the
    layout, such as those of q, k and v. Empty if nothing is fused.
    """

    head_dim: Optional[int] = None
    """Outputs per attention head, where all outputs belong to heads of q, k or v."""

    scored: int = 0
    """How many of these outputs, the first ones, are q or k: attention scores are made of them."""

    is_gain: bool = False
    """Whether it is the gain of a normalization."""


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
    The role of each trainable parameter, and the matrices that it stores.

    The head is an ``LMHead``, the module ``lm_head`` of the model, what
    ``get_output_embeddings()`` of a Hugging Face model returns, or a module whose weight is an
    embedding's. Embeddings, experts, normalizations and convolutions are found by module type, ties
    by identity of the tensor. A convolution's weight is a vector, with the layout that it has as a
    matrix; experts in a plain list are matrices.

    :param model: On any device, wrapped or sharded or not.

    :returns: Rows by canonical name, in the model's order.
    """
    all_names = _names_by_tensor(model)
    told = _facts_by_tensor(model)
    head = _ids_of_head(model)

    rows: Dict[str, ParamRole] = {}
    for name, param in named_trainable_parameters(model).items():
        facts = told.get(id(param), _Facts())
        role, layout = facts.role, facts.layout
        if layout is None and param.ndim == 2 and role in (None, Role.embedding):
            layout = MatrixLayout.whole(param.shape)
        if layout is not None and layout.smallest_dim <= 1:
            layout = None
        if layout is None and role != Role.embedding:
            role = Role.vector
        elif role is None:
            role = Role.head if id(param) in head else Role.matrix
        rows[name] = ParamRole(
            name=name,
            shape=tuple(param.shape),
            role=role,
            tied_to=tuple(other for other in all_names[id(param)] if other != name),
            layout=layout,
            parts=() if layout is None else facts.parts,
            head_dim=None if layout is None else facts.head_dim,
            scored=0 if layout is None else facts.scored,
            is_gain=facts.is_gain,
        )
    return rows


def layout_of(row: ParamRole, blocks: Union[RowBlocks, int, Sequence[int]]) -> MatrixLayout:
    """
    The matrices of a parameter, with blocks of their outputs as matrices of their own.

    :param blocks: Which blocks; or ``n`` for as many equal ones; or the outputs of each, which add
        up to those of every matrix of the layout.

    :raises OLMoConfigurationError: If the parameter stores no matrix, or not these blocks of it.
    """
    value = f"'{blocks}'" if isinstance(blocks, str) else str(blocks)
    where = f"row blocks {value} of parameter '{row.name}' of shape {row.shape}"
    if row.layout is None:
        raise OLMoConfigurationError(
            f"{where}: it stores no matrix, allowed are parameters that store matrices, which have "
            "two dimensions larger than 1"
        )
    outputs = row.layout.out_sizes[0]
    sizes = _block_sizes(row, blocks, outputs)
    if sum(sizes) != outputs or min(sizes) < 2:
        raise OLMoConfigurationError(
            f"{where}: allowed are {', '.join(RowBlocks)}, a number that divides the {outputs} "
            "outputs of a matrix, or sizes that add up to them; all blocks have 2 outputs or more, "
            "since a matrix has two dimensions larger than 1"
        )
    return row.layout.split_outputs(sizes)


def _block_sizes(row: ParamRole, blocks: object, outputs: int) -> Tuple[int, ...]:
    """Empty for blocks that do not exist; other sizes may not fit."""
    if blocks == RowBlocks.heads and row.head_dim is not None:
        return (row.head_dim,) * (outputs // row.head_dim)
    if blocks in (RowBlocks.fused, RowBlocks.heads) and row.parts:
        return row.parts
    if isinstance(blocks, str):
        return (outputs,) if blocks in list(RowBlocks) else ()
    if isinstance(blocks, int):
        divides = not isinstance(blocks, bool) and blocks > 0 and outputs % blocks == 0
        return (outputs // blocks,) * blocks if divides else ()
    if isinstance(blocks, Sequence) and all(isinstance(size, int) for size in blocks):
        return tuple(blocks)
    return ()


def _names_by_tensor(model: nn.Module) -> Dict[int, List[str]]:
    names: Dict[int, List[str]] = {}
    for name, param in _unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    return names


def _ids_of_head(model: nn.Module) -> Set[int]:
    heads = [m for name, m in _modules(model) if name == "lm_head" or isinstance(m, LMHead)]
    output_embeddings = getattr(_unwrap(model), "get_output_embeddings", None)
    if callable(output_embeddings) and (head := output_embeddings()) is not None:
        heads.append(head)
    return {id(param) for module in heads for param in module.parameters()}


@dataclass
class _Facts:
    """What modules tell of a parameter that its shape does not; fields as in ``ParamRole``."""

    role: Optional[Role] = None
    layout: Optional[MatrixLayout] = None
    parts: Tuple[int, ...] = ()
    head_dim: Optional[int] = None
    scored: int = 0
    is_gain: bool = False


def _facts_by_tensor(model: nn.Module) -> Dict[int, _Facts]:
    told: DefaultDict[int, _Facts] = defaultdict(_Facts)
    for _, module in _modules(model):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            told[id(module.weight)].role = Role.embedding
        elif isinstance(module, VisionTransformer):
            told[id(module.positional_embedding)].role = Role.embedding
        elif isinstance(module, _NORMS + _EXPERTS):
            # Gains of each head, (heads, head_dim), and biases of experts have two dimensions.
            for name, param in module.named_parameters(recurse=False):
                told[id(param)].role = Role.vector
                told[id(param)].is_gain = isinstance(module, _NORMS) and name == "weight"
        elif isinstance(module, _CONVOLUTIONS):
            told[id(module.weight)].role = Role.vector
            told[id(module.weight)].layout = _layout_of_convolution(module)
        elif _is_hugging_face_conv1d(module):
            conv: Any = module
            told[id(conv.weight)].layout = MatrixLayout.whole(conv.weight.shape, in_out=True)
        for weight, layout, parts in _expert_weights(module):
            told[id(weight)] = _Facts(Role.experts, layout, parts)
        for projection, parts in _fused_projections(module):
            told[id(projection)].parts = parts
        for projection, head_dim, scored in _head_projections(module):
            told[id(projection)].head_dim = head_dim
            told[id(projection)].scored = scored
    return told


def _layout_of_convolution(module: nn.modules.conv._ConvNd) -> Optional[MatrixLayout]:
    if module.groups > 1 and module.weight.shape[1] == 1:
        return None  # depthwise: filters, which mix no channels
    # The channels of a group see no others: each group is a matrix. A transposed convolution maps
    # an input pixel, a row, to a window of outputs, the columns.
    whole = MatrixLayout.whole(module.weight.shape, in_out=module.transposed)
    return replace(whole, row_sizes=(whole.rows // module.groups,) * module.groups)


def _is_hugging_face_conv1d(module: nn.Module) -> bool:
    # By all base classes, since FSDP makes a module's class a subclass of it.
    return hasattr(module, "nf") and "Conv1D" in [cls.__name__ for cls in type(module).__mro__]


def _expert_weights(
    module: nn.Module,
) -> Iterator[Tuple[nn.Parameter, MatrixLayout, Tuple[int, ...]]]:
    """The stacked weights of a layer of experts, with layouts and parts."""
    # The number of experts is the parameter's: under expert parallelism that of RoutedExperts is a
    # plain tensor of the rank's experts, that of the others a DTensor of all.
    if isinstance(module, MoEMLP):
        for weight, n_in in (
            (module.w1, module.d_model),
            (module.w2, module.hidden_size),
            (module.w3, module.d_model),
        ):
            n = weight.shape[0] // n_in
            yield weight, MatrixLayout.stacked(weight.shape, n, in_out=True), ()
    elif isinstance(module, DroplessMoEMLP):
        for weight, in_out in ((module.w1, False), (module.w2, True), (module.w3, False)):
            n = weight.shape[0] // module.hidden_size
            yield weight, MatrixLayout.stacked(weight.shape, n, in_out), ()
    elif isinstance(module, (RoutedExperts, SharedExperts)):
        up_gate, down = module.w_up_gate, module.w_down
        n = down.shape[0]
        if isinstance(module, RoutedExperts):
            layout = MatrixLayout.stacked(up_gate.shape, n)
        else:
            layout = MatrixLayout.side_by_side(up_gate.shape, n, in_out=True)
        # relu2 has no gate, and that of gpt_oss_swiglu alternates with up, output by output.
        halves = module.activation == ExpertActivation.swiglu
        yield up_gate, layout, (module.hidden_size,) * 2 if halves else ()
        yield down, MatrixLayout.stacked(down.shape, n, in_out=True), ()


def _fused_projections(module: Any) -> Iterator[Tuple[torch.Tensor, Tuple[int, ...]]]:
    """The weights of projections that a sequence mixer splits, with the outputs of each part."""
    if isinstance(module, FusedAttentionV2):
        yield module.w_qkv.weight, (module.q_dim, module.kv_dim, module.kv_dim)
    elif isinstance(module, NemotronMamba2Mixer):
        inner, state = module.intermediate_size, module.n_groups * module.ssm_state_size
        # Gate, x, B, C and time steps.
        yield module.in_proj.weight, (inner, inner, state, state, module.num_heads)
    elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        yield module.in_proj_weight, (module.embed_dim,) * 3
    elif (weight := _hugging_face_c_attn(module)) is not None:
        yield weight, (module.split_size,) * (weight.shape[1] // module.split_size)


def _head_projections(module: Any) -> Iterator[Tuple[torch.Tensor, Optional[int], int]]:
    """
    The weights of a sequence mixer's projections to q, k and v, with the outputs per head, and how
    many of the outputs are q or k.
    """
    if isinstance(module, FusedAttentionV2):
        yield module.w_qkv.weight, module.head_dim, module.q_dim + module.kv_dim
    elif isinstance(module, Attention):
        yield from _apart(module.w_q.weight, module.w_k.weight, module.w_v.weight, module.head_dim)
    elif isinstance(module, (GatedDeltaNet, KimiDeltaAttention)):
        yield module.w_q.weight, module.head_k_dim, len(module.w_q.weight)
        yield module.w_k.weight, module.head_k_dim, len(module.w_k.weight)
        yield module.w_v.weight, module.head_v_dim, 0
    elif isinstance(module, ViTAttention):
        yield from _apart(module.wq.weight, module.wk.weight, module.wv.weight, module.head_dim)
    elif isinstance(module, VisionConnector) and module.pooling is not None:
        pooling = module.pooling
        yield from _apart(pooling.wq.weight, pooling.wk.weight, pooling.wv.weight, pooling.head_dim)
    elif isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            yield module.in_proj_weight, module.head_dim, 2 * module.embed_dim
        else:
            q, k, v = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
            yield from _apart(q, k, v, module.head_dim)
    elif (weight := _hugging_face_c_attn(module)) is not None:
        # Of queries, keys and values together, or of the last two.
        scored = weight.shape[1] - module.split_size
        yield weight, getattr(module, "head_dim", None), scored


def _apart(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int
) -> Iterator[Tuple[torch.Tensor, int, int]]:
    for weight, scored in ((q, len(q)), (k, len(k)), (v, 0)):
        yield weight, head_dim, scored


def _hugging_face_c_attn(module: Any) -> Optional[torch.Tensor]:
    # GPT-2's attention splits the outputs of a Conv1D named c_attn by its split_size. GPTBigCode's
    # has both names with a Linear, and the q, k and v of each head side by side.
    if not (hasattr(module, "c_attn") and hasattr(module, "split_size")):
        return None
    projection: Any = _unwrap(module.c_attn)
    return projection.weight if _is_hugging_face_conv1d(projection) else None
