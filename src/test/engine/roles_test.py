from typing import Dict, Iterator, List, Set

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.moe.v2.routed_experts import RoutedExpertsConfig
from olmo_core.nn.moe.v2.shared_experts import SharedExpertsConfig
from olmo_core.nn.transformer import TransformerConfig
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from olmo_optim_ext import ParamRole, Role
from olmo_optim_ext.engine.roles import canonical_name, classify, named_trainable_parameters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    """Named like an OLMo-core model, with a child that is really called ``module``."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.blocks = nn.ModuleDict({"0": Block(), "1": Block()})
        self.module = nn.Linear(6, 4, bias=False)
        self.lm_head = nn.Linear(4, 7, bias=False)


EXPECTED_ROLES = {
    "embeddings.weight": Role.embedding,
    "blocks.0.w_in.weight": Role.matrix,
    "blocks.0.w_in.bias": Role.vector,
    "blocks.0.norm.weight": Role.vector,
    "blocks.0.norm.bias": Role.vector,
    "blocks.1.w_in.weight": Role.matrix,
    "blocks.1.w_in.bias": Role.vector,
    "blocks.1.norm.weight": Role.vector,
    "blocks.1.norm.bias": Role.vector,
    "module.weight": Role.matrix,
    "lm_head.weight": Role.head,
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    optimized = torch.compile(module, backend="eager")
    assert isinstance(optimized, nn.Module)
    return optimized


def roles_of(model: nn.Module) -> Dict[str, Role]:
    return {name: row.role for name, row in classify(model).items()}


def olmo_model(config: TransformerConfig) -> Dict[str, ParamRole]:
    return classify(config.build(init_device="meta"))


def same_tensors(got: Dict[str, nn.Parameter], expected: Dict[str, nn.Parameter]) -> bool:
    return list(got) == list(expected) and all(got[name] is expected[name] for name in got)


# Names


@pytest.mark.parametrize(
    "name,expected",
    [
        ("blocks.0.w_in.weight", "blocks.0.w_in.weight"),
        ("_orig_mod.blocks.0.w_in.weight", "blocks.0.w_in.weight"),
        ("blocks.0._checkpoint_wrapped_module.w_in.weight", "blocks.0.w_in.weight"),
        ("blocks.0._orig_mod._checkpoint_wrapped_module.w.weight", "blocks.0.w.weight"),
        ("module.weight", "module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mod", ""),
    ],
)
def test_canonical_name_drops_wrappers_and_nothing_else(name: str, expected: str):
    assert canonical_name(name) == expected


def test_wrapped_submodules_do_not_change_names_or_roles():
    model = Model()
    plain = dict(model.named_parameters())
    for name, wrapped in (
        ("embeddings", compiled(model.embeddings)),
        ("blocks.0", checkpoint_wrapper(model.blocks["0"])),
        ("blocks.1", compiled(checkpoint_wrapper(model.blocks["1"]))),
        ("lm_head", checkpoint_wrapper(compiled(model.lm_head))),
    ):
        model.set_submodule(name, wrapped)
    assert plain.keys() & dict(model.named_parameters()).keys() == {"module.weight"}
    assert same_tensors(named_trainable_parameters(model), plain)
    assert roles_of(model) == EXPECTED_ROLES


def test_compiled_model_has_the_names_and_roles_of_the_model():
    model = Model()
    wrapped = compiled(model)
    assert all(name.startswith("_orig_mod.") for name, _ in wrapped.named_parameters())
    assert same_tensors(named_trainable_parameters(wrapped), dict(model.named_parameters()))
    assert roles_of(wrapped) == EXPECTED_ROLES


@pytest.mark.parametrize("compile_first", [False, True])
def test_ddp_has_the_names_and_roles_of_the_model(compile_first: bool, one_rank: None):
    model = Model()
    ddp = DistributedDataParallel(compiled(model) if compile_first else model)
    assert all(name.startswith("module.") for name, _ in ddp.named_parameters())
    assert same_tensors(named_trainable_parameters(ddp), dict(model.named_parameters()))
    assert roles_of(ddp) == EXPECTED_ROLES


def test_rows_have_names_shapes_and_order_of_the_model():
    model = Model()
    rows = classify(model)
    assert [(name, row.name, row.shape) for name, row in rows.items()] == [
        (name, name, tuple(param.shape)) for name, param in model.named_parameters()
    ]
    assert {name: row.role for name, row in rows.items()} == EXPECTED_ROLES
    assert all(row.tied_to == () for row in rows.values())


def test_frozen_parameters_are_left_out():
    model = Model()
    model.blocks["0"].requires_grad_(False)
    model.embeddings.weight.requires_grad_(False)
    expected = {
        name: role
        for name, role in EXPECTED_ROLES.items()
        if not name.startswith(("blocks.0.", "embeddings."))
    }
    assert roles_of(model) == expected
    assert list(named_trainable_parameters(model)) == list(expected)


# OLMo-core models


@pytest.mark.parametrize("size", [TransformerConfig.olmo2_1M, TransformerConfig.olmo3_14M])
def test_roles_of_a_dense_olmo_model(size):
    rows = olmo_model(size(vocab_size=384, attn_backend=AttentionBackendName.torch))
    expected = {"embeddings.weight": Role.embedding}
    for block in range(4):
        for part, role in (
            ("attention.w_q", Role.matrix),
            ("attention.w_k", Role.matrix),
            ("attention.w_v", Role.matrix),
            ("attention.w_out", Role.matrix),
            ("attention.q_norm", Role.vector),
            ("attention.k_norm", Role.vector),
            ("attention_norm", Role.vector),
            ("feed_forward.w1", Role.matrix),
            ("feed_forward.w2", Role.matrix),
            ("feed_forward.w3", Role.matrix),
            ("feed_forward_norm", Role.vector),
        ):
            expected[f"blocks.{block}.{part}.weight"] = role
    expected["lm_head.norm.weight"] = Role.vector
    expected["lm_head.w_out.weight"] = Role.head
    assert {name: row.role for name, row in rows.items()} == expected
    assert rows["lm_head.w_out.weight"].shape[0] == rows["embeddings.weight"].shape[0] == 384


def test_tied_olmo_model_has_an_embedding_and_no_head():
    rows = olmo_model(
        TransformerConfig.olmo2_1M(
            vocab_size=384, attn_backend=AttentionBackendName.torch, tie_word_embeddings=True
        )
    )
    assert rows["embeddings.weight"].role == Role.embedding
    assert rows["embeddings.weight"].tied_to == ("lm_head.w_out.weight",)
    assert "lm_head.w_out.weight" not in rows
    assert Role.head not in {row.role for row in rows.values()}


def test_roles_of_a_moe_olmo_model():
    rows = olmo_model(
        TransformerConfig.smallmoe(
            vocab_size=384,
            d_model=24,
            n_layers=1,
            n_heads=2,
            attn_backend=AttentionBackendName.torch,
        )
    )
    moe = "blocks.0.feed_forward_moe."
    assert {name: row.role for name, row in rows.items() if name.startswith(moe)} == {
        f"{moe}router.weight": Role.vector,  # OLMo-core keeps it flat
        f"{moe}experts.mlp.w1": Role.experts,
        f"{moe}experts.mlp.w2": Role.experts,
        f"{moe}experts.mlp.w3": Role.experts,
        f"{moe}shared_mlp.w1.weight": Role.matrix,
        f"{moe}shared_mlp.w1.bias": Role.vector,
        f"{moe}shared_mlp.w2.weight": Role.matrix,
        f"{moe}shared_mlp.w2.bias": Role.vector,
        f"{moe}shared_mlp.w3.weight": Role.matrix,
        f"{moe}shared_mlp.w3.bias": Role.vector,
    }
    # Two dimensions, yet no matrix: OLMo-core stacks the experts along the rows.
    assert len(rows[f"{moe}experts.mlp.w1"].shape) == 2
    assert rows["lm_head.w_out.weight"].role == Role.head
    assert rows["blocks.0.attention.w_q.weight"].role == Role.matrix


@pytest.mark.parametrize(
    "config,names",
    [
        (
            RoutedExpertsConfig(4, 6, num_experts=3, bias=True, dtype=DType.float32),
            {"w_up_gate", "w_down", "b_up_gate", "b_down"},
        ),
        (
            SharedExpertsConfig(4, 6, num_experts=2, bias=False, dtype=DType.float32),
            {"w_up_gate", "w_down"},
        ),
    ],
)
def test_all_parameters_of_stacked_experts_are_experts(config, names: Set[str]):
    model = nn.ModuleDict({"experts": config.build(init_device="meta")})
    assert roles_of(model) == {f"experts.{name}": Role.experts for name in names}


# Other models


def test_head_tied_to_an_embedding_is_an_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(7, 4)
            self.hidden = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.emb.weight

    rows = classify(Tied())
    assert rows == {
        "emb.weight": ParamRole("emb.weight", (7, 4), Role.embedding, ("head.weight",)),
        "hidden.weight": ParamRole("hidden.weight", (4, 4), Role.matrix),
    }


def test_tied_weight_is_an_embedding_also_where_the_head_comes_first():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 7)
            self.emb = nn.Embedding(7, 4)
            self.emb.weight = self.lm_head.weight

    rows = classify(HeadFirst())
    assert rows == {
        "lm_head.weight": ParamRole("lm_head.weight", (7, 4), Role.embedding, ("emb.weight",)),
        "lm_head.bias": ParamRole("lm_head.bias", (7,), Role.vector),
    }


def test_tied_matrices_are_one_matrix_with_two_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert classify(model) == {
        "0.weight": ParamRole("0.weight", (4, 4), Role.matrix, ("1.weight",))
    }


class HuggingFaceLike(nn.Module):
    """Its head is called anything and is told by a method."""

    def __init__(self, has_head: bool):
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 6, bias=False)
        self.embed_out = nn.Linear(6, 7)
        self._has_head = has_head

    def get_output_embeddings(self):
        return self.embed_out if self._has_head else None


@pytest.mark.parametrize("wrap", ["plain", "compile", "ddp"])
@pytest.mark.parametrize("has_head", [True, False])
def test_output_embeddings_are_the_head(has_head: bool, wrap: str, one_rank: None):
    model: nn.Module = HuggingFaceLike(has_head)
    if wrap == "compile":
        model = compiled(model)
    elif wrap == "ddp":
        model = DistributedDataParallel(model)
    assert roles_of(model) == {
        "wte.weight": Role.embedding,
        "up.weight": Role.matrix,
        "embed_out.weight": Role.head if has_head else Role.matrix,
        "embed_out.bias": Role.vector,
    }


def test_last_linear_of_a_sequence_is_a_matrix():
    model = nn.Sequential(nn.Embedding(7, 4), nn.ReLU(), nn.Linear(4, 7))
    assert roles_of(model) == {
        "0.weight": Role.embedding,
        "2.weight": Role.matrix,
        "2.bias": Role.vector,
    }


def test_only_the_models_own_lm_head_is_the_head():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleDict({"lm_head": nn.Linear(4, 7, bias=False)})

    assert roles_of(Encoder()) == {"decoder.lm_head.weight": Role.matrix}


def test_embedding_bags_are_embeddings():
    assert roles_of(nn.Sequential(nn.EmbeddingBag(7, 4))) == {"0.weight": Role.embedding}


@pytest.mark.parametrize(
    "shape,role",
    [
        ([2, 2], Role.matrix),
        ([5, 2], Role.matrix),
        ([1, 8], Role.vector),
        ([8, 1], Role.vector),
        ([1, 1], Role.vector),
        ([0, 4], Role.vector),
        ([8], Role.vector),
        ([], Role.vector),
        ([4, 3, 3], Role.vector),
    ],
)
def test_only_two_dimensions_larger_than_one_make_a_matrix(shape: List[int], role: Role):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(shape))
    assert classify(model) == {"weight": ParamRole("weight", tuple(shape), role)}


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_convolutions_are_vectors(conv):
    assert set(roles_of(nn.Sequential(conv(4, 6, 3))).values()) == {Role.vector}


def test_a_small_head_is_a_vector():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 1)

    assert roles_of(Scorer()) == {"lm_head.weight": Role.vector, "lm_head.bias": Role.vector}
