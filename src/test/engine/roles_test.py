import sys
import types
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import (
    Attention,
    AttentionBackendName,
    AttentionConfig,
    FusedAttentionV2,
    GateConfig,
    GateGranularity,
    NormalizedAttention,
    recurrent,
)
from olmo_core.nn.attention import kda as kda_module
from olmo_core.nn.ddp.block import OLMoDDPTransformerBlockConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.moe import MoEConfig, MoERouterConfig
from olmo_core.nn.moe.mlp import DroplessMoEMLP, MoEMLP, MoEMLPBase
from olmo_core.nn.moe.moe import LatentMoEConfig
from olmo_core.nn.moe.v2 import routed_experts
from olmo_core.nn.moe.v2.nemotron import NemotronDenseMLP, NemotronMoEConfig
from olmo_core.nn.moe.v2.routed_experts import (
    ExpertActivation,
    RoutedExperts,
    RoutedExpertsConfig,
)
from olmo_core.nn.moe.v2.router import MoERouterConfigV2
from olmo_core.nn.moe.v2.shared_experts import SharedExperts, SharedExpertsConfig
from olmo_core.nn.mxfp8_linear import MXFP8Linear
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.nn.transformer.config import TransformerBlockType
from olmo_core.nn.vision import (
    MultimodalLMConfig,
    VisionConnectorConfig,
    VisionEncoderConfig,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from olmo_optim_ext.engine.layout import MatrixLayout
from olmo_optim_ext.engine.roles import (
    ParamRole,
    Role,
    RowBlocks,
    canonical_name,
    classify,
    layout_of,
    named_trainable_parameters,
)


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


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process is rank 0; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
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


def roles_and_layouts(model: nn.Module) -> Dict[str, Tuple[Role, Optional[MatrixLayout]]]:
    return {name: (row.role, row.layout) for name, row in classify(model).items()}


def matrices(
    model: nn.Module, name: str, blocks: Union[RowBlocks, int, Sequence[int]] = RowBlocks.whole
) -> List[torch.Tensor]:
    """Those that a parameter stores, each ``(out, in)``; views, whose change changes the model."""
    layout = layout_of(classify(model)[name], blocks)
    param = model.get_parameter(name).detach().view(layout.rows, layout.cols)
    stored = [
        param[block.first_row :, block.first_col :][: block.n_rows, : block.n_cols]
        for block in layout.blocks()
    ]
    return [matrix.T if layout.in_out else matrix for matrix in stored]


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


def swiglu(
    x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """``x``: ``(tokens, in)``; weights ``(out, in)``."""
    return (x @ up.T * F.silu(x @ gate.T)) @ down.T


def relu2(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.relu(x @ up.T).square() @ down.T


def test_matrices_of_moe_mlp_make_its_experts():
    mlp = MoEMLP(d_model=4, hidden_size=6, num_experts=3)
    w1, w2, w3 = (matrices(mlp, name) for name in ("w1", "w2", "w3"))
    x = torch.randn(3, 5, 4)
    out = mlp(x)
    assert len(w1) == len(w2) == len(w3) == 3
    for e in range(3):
        torch.testing.assert_close(out[e], swiglu(x[e], w3[e], w1[e], w2[e]))
    assert set(roles_of(mlp).values()) == {Role.experts}


@pytest.mark.filterwarnings("ignore:Grouped GEMM not available")
def test_matrices_of_dropless_moe_mlp_make_its_experts():
    mlp = DroplessMoEMLP(d_model=4, hidden_size=6, num_experts=3)
    w1, w2, w3 = (matrices(mlp, name) for name in ("w1", "w2", "w3"))
    x = torch.randn(3, 5, 4)
    out = mlp(x.view(15, 4), torch.tensor([5, 5, 5])).view(3, 5, 4)
    assert len(w1) == len(w2) == len(w3) == 3
    for e in range(3):
        torch.testing.assert_close(out[e], swiglu(x[e], w3[e], w1[e], w2[e]))
    assert set(roles_of(mlp).values()) == {Role.experts}


def routed(activation: ExpertActivation, bias: bool = False) -> RoutedExperts:
    # Sizes are multiples of 4: the kernel takes rows of a multiple of 16 bytes.
    return RoutedExperts(4, 8, 3, bias, DType.float32, activation=activation)


def run_routed(experts: RoutedExperts, x: torch.Tensor, monkeypatch) -> torch.Tensor:
    """``x`` and the result: ``(experts, tokens, d_model)``."""
    # The layer demands a GPU for these sizes, its kernel does not.
    monkeypatch.setattr(routed_experts, "REQUIRES_HOST_SIDE_SPLIT_SIZES", True)
    n_experts, n_tokens, d_model = x.shape
    return experts(x.view(-1, d_model), torch.tensor([n_tokens] * n_experts)).view(x.shape)


def test_matrices_of_routed_experts_make_its_experts(monkeypatch):
    experts = routed(ExpertActivation.swiglu)
    up_gate, down = matrices(experts, "w_up_gate", RowBlocks.fused), matrices(experts, "w_down")
    x = torch.randn(3, 5, 4)
    out = run_routed(experts, x, monkeypatch)
    assert len(up_gate) == 6 and len(down) == 3
    for e in range(3):
        expected = swiglu(x[e], up_gate[2 * e], up_gate[2 * e + 1], down[e])
        torch.testing.assert_close(out[e], expected)
    assert set(roles_of(experts).values()) == {Role.experts}


def test_routed_experts_without_gate_have_nothing_fused(monkeypatch):
    experts = routed(ExpertActivation.relu2)
    up, down = matrices(experts, "w_up_gate", RowBlocks.fused), matrices(experts, "w_down")
    x = torch.randn(3, 5, 4)
    out = run_routed(experts, x, monkeypatch)
    assert len(up) == len(down) == 3
    for e in range(3):
        torch.testing.assert_close(out[e], relu2(x[e], up[e], down[e]))


def test_alternating_gate_and_up_are_not_taken_apart(monkeypatch):
    experts = routed(ExpertActivation.gpt_oss_swiglu)
    up_gate, down = matrices(experts, "w_up_gate", RowBlocks.fused), matrices(experts, "w_down")
    x = torch.randn(3, 5, 4)
    out = run_routed(experts, x, monkeypatch)
    assert len(up_gate) == len(down) == 3
    for e in range(3):
        gate, up = x[e] @ up_gate[e][::2].T, x[e] @ up_gate[e][1::2].T
        hidden = (up + 1) * gate * torch.sigmoid(gate * experts.activation_alpha)
        torch.testing.assert_close(out[e], hidden @ down[e].T)


def test_biases_of_experts_are_vectors():
    rows = roles_and_layouts(routed(ExpertActivation.swiglu, bias=True))
    assert rows["b_up_gate"] == rows["b_down"] == (Role.vector, None)
    assert rows["w_up_gate"][0] == rows["w_down"][0] == Role.experts


@pytest.mark.parametrize("activation", [ExpertActivation.swiglu, ExpertActivation.relu2])
def test_matrices_of_shared_experts_make_its_experts(activation: ExpertActivation):
    experts = SharedExperts(4, 6, 3, False, DType.float32, activation)
    up_gate, down = matrices(experts, "w_up_gate", RowBlocks.fused), matrices(experts, "w_down")
    x = torch.randn(1, 5, 4)
    out = experts(x)
    for e in range(3):
        if activation == ExpertActivation.swiglu:
            expected = swiglu(x[0], up_gate[2 * e], up_gate[2 * e + 1], down[e])
        else:
            expected = relu2(x[0], up_gate[e], down[e])
        torch.testing.assert_close(out[e, 0], expected)
    assert len(down) == 3
    assert set(roles_of(experts).values()) == {Role.experts}


def test_stacks_of_unknown_experts_are_vectors():
    class OwnMLP(MoEMLPBase):
        def __init__(self):
            super().__init__(d_model=4, hidden_size=6, num_experts=3)
            self.w = nn.Parameter(torch.zeros(12, 6))

    assert roles_and_layouts(OwnMLP()) == {"w": (Role.vector, None)}


def test_experts_that_are_no_matrices_are_vectors():
    mlp = MoEMLP(d_model=4, hidden_size=1, num_experts=3)
    assert set(roles_and_layouts(mlp).values()) == {(Role.vector, None)}


def test_moe_mlp_has_the_layouts_of_all_experts_under_expert_parallelism(four_ranks: None):
    mlp = MoEMLP(d_model=4, hidden_size=6, num_experts=8)
    plain = classify(mlp)
    mlp.apply_ep(init_device_mesh("cpu", (4,)))
    assert isinstance(mlp.w1, DTensor) and mlp.num_local_experts == 2
    assert classify(mlp) == plain
    assert plain["w1"].layout == MatrixLayout((4,) * 8, (6,), in_out=True)


def test_routed_experts_have_the_layouts_of_a_ranks_experts_under_expert_parallelism(
    four_ranks: None,
):
    experts = RoutedExperts(4, 6, 8, False, DType.float32)
    experts.apply_ep(init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_dp", "ep_mp")))
    # A plain tensor: no one but this rank's group knows of these experts.
    assert not isinstance(experts.w_up_gate, DTensor) and experts.num_experts == 8
    rows = classify(experts)
    assert rows["w_up_gate"].layout == MatrixLayout((12,) * 4, (4,))
    assert rows["w_down"].layout == MatrixLayout((6,) * 4, (4,), in_out=True)


def test_roles_of_nemotron_layers():
    config = NemotronMoEConfig(
        num_experts=3,
        num_experts_per_tok=2,
        intermediate_size=6,
        shared_expert_intermediate_size=10,
        dtype=DType.float32,
    )
    moe = config.build(4, layer_idx=0, n_layers=1, init_device="meta")
    assert roles_and_layouts(moe) == {
        "routed_experts_router.weight": (Role.vector, None),
        "routed_experts.w_up_gate": (Role.experts, MatrixLayout((6, 6, 6), (4,))),
        "routed_experts.w_down": (Role.experts, MatrixLayout((6, 6, 6), (4,), in_out=True)),
        "shared_experts.w_up_gate": (Role.experts, MatrixLayout((4,), (10,), in_out=True)),
        "shared_experts.w_down": (Role.experts, MatrixLayout((10,), (4,), in_out=True)),
    }
    dense = NemotronDenseMLP(d_model=4, hidden_size=6, dtype=DType.float32, init_device="meta")
    assert roles_and_layouts(dense) == {
        "up_proj.weight": (Role.matrix, MatrixLayout.whole((6, 4))),
        "down_proj.weight": (Role.matrix, MatrixLayout.whole((4, 6))),
    }


def test_projections_to_and_from_the_latent_dimension_are_matrices():
    norm = LayerNormConfig(name=LayerNormType.rms, bias=False)
    latent = LatentMoEConfig(2, up_proj_input_norm=norm, up_proj_input_norm_enabled=True)
    config = MoEConfig(num_experts=3, hidden_size=6, router=MoERouterConfig(), latent_moe=latent)
    assert roles_and_layouts(config.build(4, init_device="meta", n_layers=1)) == {
        "latent_down_proj.weight": (Role.matrix, MatrixLayout.whole((2, 4))),
        "latent_up_proj_input_norm.weight": (Role.vector, None),
        "latent_up_proj.weight": (Role.matrix, MatrixLayout.whole((4, 2))),
        "router.weight": (Role.vector, None),
        "experts.mlp.w1": (Role.experts, MatrixLayout((2,) * 3, (6,), in_out=True)),
        "experts.mlp.w2": (Role.experts, MatrixLayout((6,) * 3, (2,), in_out=True)),
        "experts.mlp.w3": (Role.experts, MatrixLayout((2,) * 3, (6,), in_out=True)),
    }


def test_roles_of_a_block_of_the_newer_moe_layers():
    block = OLMoDDPTransformerBlockConfig(
        name=TransformerBlockType.moe_fused_v2,
        sequence_mixer=AttentionConfig(n_heads=2, backend=AttentionBackendName.torch),
        layer_norm=LayerNormConfig(),
        routed_experts=RoutedExpertsConfig(2, 6, 3, False, DType.float32),
        routed_experts_router=MoERouterConfigV2(
            d_model=4, num_experts=3, top_k=2, dtype=DType.float32
        ),
        shared_experts=SharedExpertsConfig(4, 6, 1, False, DType.float32),
        latent_moe=LatentMoEConfig(2),
    ).build(d_model=4, block_idx=0, n_layers=1, init_device="meta")
    rows = roles_and_layouts(block)
    assert {name: row for name, row in rows.items() if "attention" not in name} == {
        "latent_down_proj.weight": (Role.matrix, MatrixLayout.whole((2, 4))),
        "latent_up_proj.weight": (Role.matrix, MatrixLayout.whole((4, 2))),
        "routed_experts.w_up_gate": (Role.experts, MatrixLayout((12,) * 3, (2,))),
        "routed_experts.w_down": (Role.experts, MatrixLayout((6,) * 3, (2,), in_out=True)),
        "routed_experts_router.weight": (Role.vector, None),
        "shared_experts.w_up_gate": (Role.experts, MatrixLayout((4,), (12,), in_out=True)),
        "shared_experts.w_down": (Role.experts, MatrixLayout((6,), (4,), in_out=True)),
        "feed_forward_norm.weight": (Role.vector, None),
        "feed_forward_norm.bias": (Role.vector, None),
    }


def grouped_query_attention(cls: Callable[..., Attention], **kwargs) -> Attention:
    torch.manual_seed(0)
    attention = cls(
        d_model=8, n_heads=4, n_kv_heads=2, backend=AttentionBackendName.torch, **kwargs
    )
    assert attention.head_dim == 2
    return attention


def test_parts_of_fused_attention_are_q_k_and_v():
    fused = grouped_query_attention(FusedAttentionV2, bias=False)
    plain = grouped_query_attention(Attention, bias=False)
    with torch.no_grad():
        for name, matrix in zip("qkv", matrices(fused, "w_qkv.weight", RowBlocks.fused)):
            plain.get_parameter(f"w_{name}.weight").copy_(matrix)
        plain.w_out.weight.copy_(fused.w_out.weight)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(fused(x), plain(x))


def test_blocks_of_heads_are_those_of_fused_attention():
    fused = grouped_query_attention(FusedAttentionV2, bias=False)
    heads = matrices(fused, "w_qkv.weight", RowBlocks.heads)
    x = torch.randn(1, 5, 8)
    q, k, v = fused._prepare_qkv(x)  # (batch, tokens, heads, head_dim)
    expected = [part[:, :, h] for part in (q, k, v) for h in range(part.shape[2])]
    assert len(heads) == len(expected) == 4 + 2 + 2
    for matrix, projected in zip(heads, expected):
        torch.testing.assert_close(x @ matrix.T, projected)


@pytest.mark.parametrize("cls", [Attention, NormalizedAttention])
def test_blocks_of_heads_are_those_of_attention(cls: Callable[..., Attention]):
    attention = grouped_query_attention(cls)
    assert len(matrices(attention, "w_q.weight", RowBlocks.heads)) == 4
    assert len(matrices(attention, "w_k.weight", RowBlocks.heads)) == 2
    last_value_head = matrices(attention, "w_v.weight", RowBlocks.heads)[-1]
    with torch.no_grad():
        attention.w_out.weight.copy_(torch.eye(8))
        x = torch.randn(1, 5, 8)
        before = attention(x)
        last_value_head.add_(1.0)
        changed = (attention(x) - before).view(5, 4, 2)
    # The second of two value heads serves the last two of four query heads.
    assert not changed[:, :2].any() and changed[:, 2:].all()


def test_projections_of_attention_without_heads_of_q_k_or_v_have_no_head_dim():
    gate = GateConfig(granularity=GateGranularity.elementwise)
    for cls in (Attention, FusedAttentionV2):
        rows = classify(grouped_query_attention(cls, gate=gate, init_device="meta"))
        assert rows["w_out.weight"].head_dim is rows["w_g.weight"].head_dim is None
        assert rows["w_out.weight"].parts == rows["w_g.weight"].parts == ()


@pytest.fixture
def flash_linear_attention(monkeypatch) -> None:
    """Stands in for a package that needs a GPU and of which the layers take a norm."""
    modules = types.ModuleType("fla.modules")
    modules.FusedRMSNormGated = lambda size, eps, device, **_: nn.RMSNorm(size, eps, device=device)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.modules", modules)
    for module in (recurrent, kda_module):
        monkeypatch.setattr(module, "has_fla", lambda: True)


def test_heads_of_gated_delta_net(flash_linear_attention: None):
    layer = recurrent.GatedDeltaNet(
        d_model=8, n_heads=2, n_v_heads=4, expand_v=1.5, init_device="meta"
    )
    rows = classify(layer)
    # As forward() views them: 2 heads of q and k, 4 of v.
    assert rows["w_q.weight"].head_dim == rows["w_k.weight"].head_dim == 8 // 2
    assert rows["w_v.weight"].head_dim == 24 // 4 == 6
    others = {name for name, row in rows.items() if row.head_dim is None}
    assert {"w_a.weight", "w_b.weight", "w_g.weight", "w_out.weight"} <= others
    assert rows["q_conv1d.weight"].role == Role.vector and rows["q_conv1d.weight"].layout is None


def test_heads_of_kimi_delta_attention(flash_linear_attention: None):
    layer = kda_module.KimiDeltaAttention(d_model=8, n_heads=2, expand_v=1.5, init_device="meta")
    rows = classify(layer)
    assert rows["w_q.weight"].head_dim == rows["w_k.weight"].head_dim == 8 // 2
    assert rows["w_v.weight"].head_dim == 12 // 2
    others = {name for name, row in rows.items() if row.head_dim is None}
    assert {"f_proj_2.weight", "g_proj_2.weight", "w_b.weight", "w_out.weight"} <= others
    assert rows["f_proj_1.weight"].role == rows["g_proj_2.weight"].role == Role.matrix


def test_parts_of_a_mamba_mixer_are_gate_x_b_c_and_time_steps():
    config = recurrent.NemotronMamba2Config(
        ssm_state_size=2,
        mamba_num_heads=4,
        mamba_head_dim=2,
        n_groups=2,
        chunk_size=4,
        use_conv_bias=False,
        dtype=DType.float32,
    )
    mixer = config.build(6, layer_idx=0, n_layers=1)
    assert [len(m) for m in matrices(mixer, "in_proj.weight", RowBlocks.fused)] == [8, 8, 4, 4, 4]
    x = torch.randn(1, 5, 6)

    def without(part: int) -> torch.Tensor:
        weight = mixer.in_proj.weight.detach().clone()
        with torch.no_grad():
            matrices(mixer, "in_proj.weight", RowBlocks.fused)[part].zero_()
            out = mixer(x)
            mixer.in_proj.weight.copy_(weight)
        return out

    gate, inputs, b, c, _ = map(without, range(5))
    assert not gate.any() and not inputs.any()
    # Without B nothing enters the state, without C nothing leaves it.
    torch.testing.assert_close(b, c)
    assert b.any() and not torch.allclose(b, mixer(x))


def test_roles_of_a_multimodal_model():
    lm = TransformerConfig.olmo2_1M(vocab_size=384, attn_backend=AttentionBackendName.torch)
    vision = VisionEncoderConfig(
        image_default_input_size=(4, 4),
        image_patch_size=2,
        image_emb_dim=8,
        image_num_heads=4,
        image_num_key_value_heads=2,
        image_head_dim=2,
        image_num_layers=1,
        image_mlp_dim=6,
        image_num_pos=5,
    )
    connector = VisionConnectorConfig.from_vision_encoder(vision, output_dim=lm.d_model)
    rows = classify(MultimodalLMConfig(lm, vision, connector).build(init_device="meta"))
    assert rows["lm.lm_head.w_out.weight"].role == Role.head
    assert rows["lm.embeddings.weight"].role == Role.embedding
    assert rows["vision.positional_embedding"].role == Role.embedding
    assert rows["vision.positional_embedding"].layout == MatrixLayout.whole((5, 8))
    assert rows["vision.class_embedding"].role == Role.vector
    with_heads = {name for name, row in rows.items() if row.head_dim == 2}
    assert with_heads == {
        f"{attention}.{name}.weight"
        for attention in ("vision.blocks.0.attn", "connector.pooling")
        for name in ("wq", "wk", "wv")
    }


def test_gains_of_each_head_are_vectors():
    norm = LayerNormConfig(name=LayerNormType.rms, bias=False)
    attention = grouped_query_attention(
        Attention, qk_norm=norm, use_head_qk_norm=True, qk_norm_per_head_gains=True
    )
    rows = classify(attention)
    assert rows["q_norm.weight"].shape == (4, 2)
    assert (rows["q_norm.weight"].role, rows["q_norm.weight"].layout) == (Role.vector, None)


def test_mxfp8_linears_are_matrices():
    linear = MXFP8Linear(32, 64, bias=False, device=torch.device("meta"))
    # OLMo-core's own optimizer trains the weight in another precision.
    assert classify(linear) == {}
    linear.weight.requires_grad_(True)
    assert roles_and_layouts(linear) == {"weight": (Role.matrix, MatrixLayout.whole((64, 32)))}


class Everything(nn.Module):
    """A layer of each kind of which more is told than its weight's shape."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(8, 4)
        self.attention = FusedAttentionV2(
            d_model=8, n_heads=2, n_kv_heads=1, backend=AttentionBackendName.torch
        )
        self.torch_attention = nn.MultiheadAttention(8, 2)
        self.mlp = MoEMLP(d_model=4, hidden_size=8, num_experts=4)
        self.routed = RoutedExperts(4, 8, 4, True, DType.float32)
        self.shared = SharedExperts(4, 8, 2, False, DType.float32)
        self.conv = nn.Conv2d(4, 8, 3)
        self.gpt2 = GPT2LikeAttention(Conv1D(24, 8))
        self.lm_head = nn.Linear(4, 8)


def compile_in_place(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        module.compile(backend="eager")
    return model


def checkpoint_each_layer(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, checkpoint_wrapper(checkpoint_each_layer(child)))
    return model


def compile_each_layer(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, compiled(compile_each_layer(child)))
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        compile_in_place,
        compile_each_layer,
        compiled,
        checkpoint_each_layer,
        DistributedDataParallel,
    ],
)
def test_layouts_are_found_through_wrappers(wrap: Callable[[Any], nn.Module], one_rank: None):
    expected = classify(Everything())
    assert classify(wrap(Everything())) == expected
    assert sum(row.role == Role.experts for row in expected.values()) == 7
    assert sum(bool(row.parts) for row in expected.values()) == 5


def shard_each_layer(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (4,))
    for child in reversed(list(model.modules())):
        if list(child.parameters(recurse=False)):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def test_layouts_of_sharded_parameters_are_those_of_the_whole(four_ranks: None):
    model = shard_each_layer(Everything())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert classify(model) == classify(Everything())


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
        "emb.weight": ParamRole(
            "emb.weight", (7, 4), Role.embedding, ("head.weight",), MatrixLayout.whole((7, 4))
        ),
        "hidden.weight": ParamRole(
            "hidden.weight", (4, 4), Role.matrix, layout=MatrixLayout.whole((4, 4))
        ),
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
        "lm_head.weight": ParamRole(
            "lm_head.weight", (7, 4), Role.embedding, ("emb.weight",), MatrixLayout.whole((7, 4))
        ),
        "lm_head.bias": ParamRole("lm_head.bias", (7,), Role.vector),
    }


def test_tied_matrices_are_one_matrix_with_two_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert classify(model) == {
        "0.weight": ParamRole(
            "0.weight", (4, 4), Role.matrix, ("1.weight",), MatrixLayout.whole((4, 4))
        )
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
    assert roles_and_layouts(nn.Sequential(nn.EmbeddingBag(7, 4))) == {
        "0.weight": (Role.embedding, MatrixLayout.whole((7, 4)))
    }


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
    layout = MatrixLayout.whole(shape) if role == Role.matrix else None
    assert classify(model) == {"weight": ParamRole("weight", tuple(shape), role, layout=layout)}


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_convolutions_are_vectors(conv):
    assert set(roles_of(nn.Sequential(conv(4, 6, 3))).values()) == {Role.vector}


def test_a_small_head_is_a_vector():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 1)

    assert roles_of(Scorer()) == {"lm_head.weight": Role.vector, "lm_head.bias": Role.vector}


def test_experts_in_a_list_are_matrices():
    experts = nn.ModuleList(nn.Linear(4, 6, bias=False) for _ in range(2))
    assert roles_and_layouts(experts) == {
        f"{e}.weight": (Role.matrix, MatrixLayout.whole((6, 4))) for e in range(2)
    }


class Conv1D(nn.Module):
    """As in ``transformers.pytorch_utils``."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class GPT2LikeAttention(nn.Module):
    """As in ``transformers.models.gpt2``, of width 8."""

    def __init__(self, c_attn: nn.Module):
        super().__init__()
        self.c_attn = c_attn
        self.split_size = 8
        self.head_dim = 4


def test_hugging_face_conv1d_maps_rows_to_columns():
    conv = Conv1D(6, 4)
    (matrix,) = matrices(conv, "weight")
    x = torch.randn(5, 4)
    torch.testing.assert_close(conv(x), x @ matrix.T)
    assert roles_of(conv) == {"weight": Role.matrix, "bias": Role.vector}


def test_parts_and_heads_of_gpt2_attention_are_columns():
    model = GPT2LikeAttention(Conv1D(24, 8))
    q, k, v = matrices(model, "c_attn.weight", RowBlocks.fused)
    x = torch.randn(5, 8)
    for matrix, expected in zip((q, k, v), model.c_attn(x).split(model.split_size, dim=1)):
        torch.testing.assert_close(x @ matrix.T, expected)
    assert classify(model)["c_attn.weight"].head_dim == 4


def test_c_attn_that_is_a_linear_is_not_taken_apart():
    # GPTBigCode's puts q, k and v of each head side by side.
    row = classify(GPT2LikeAttention(nn.Linear(8, 24)))["c_attn.weight"]
    assert (row.parts, row.head_dim) == ((), None)


def test_parts_and_heads_of_torch_attention():
    attention = nn.MultiheadAttention(8, 2, bias=False)
    q, k, v = matrices(attention, "in_proj_weight", RowBlocks.fused)
    x = torch.randn(5, 1, 8)
    separate = F.multi_head_attention_forward(
        *(x, x, x, 8, 2, None, None, None, None, False, 0.0, attention.out_proj.weight, None),
        use_separate_proj_weight=True,
        q_proj_weight=q,
        k_proj_weight=k,
        v_proj_weight=v,
    )
    torch.testing.assert_close(attention(x, x, x)[0], separate[0])
    assert classify(attention)["in_proj_weight"].head_dim == 4
    assert classify(attention)["out_proj.weight"].head_dim is None


def test_heads_of_torch_attention_with_separate_projections():
    rows = classify(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    for name, n_in in (("q", 8), ("k", 6), ("v", 4)):
        row = rows[f"{name}_proj_weight"]
        assert (row.role, row.layout) == (Role.matrix, MatrixLayout.whole((8, n_in)))
        assert (row.parts, row.head_dim) == ((), 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_matrices_of_a_convolution_map_patches_to_pixels(groups: int):
    conv = nn.Conv2d(4, 6, (2, 3), groups=groups, bias=False)
    x = torch.randn(1, 4, 5, 5)
    patches = F.unfold(x, (2, 3))[0].chunk(groups)  # (in / groups * 2 * 3, pixels)
    pixels = torch.cat([m @ p for m, p in zip(matrices(conv, "weight"), patches, strict=True)])
    torch.testing.assert_close(pixels, conv(x)[0].flatten(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_matrices_of_a_transposed_convolution_map_pixels_to_patches(groups: int):
    conv = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups, bias=False)
    x = torch.randn(1, 4, 4, 3)
    pixels = x[0].flatten(1).chunk(groups)  # (in / groups, pixels)
    patches = torch.cat([m @ p for m, p in zip(matrices(conv, "weight"), pixels, strict=True)])
    torch.testing.assert_close(F.fold(patches, (5, 5), (2, 3)), conv(x)[0])


@pytest.mark.parametrize(
    "conv,layout",
    [
        (nn.Conv1d(4, 4, 3, groups=4), None),
        (nn.Conv1d(4, 8, 3, groups=4), None),
        (nn.ConvTranspose1d(4, 4, 3, groups=4), None),
        (nn.ConvTranspose1d(8, 4, 3, groups=4), None),
        (nn.Conv1d(4, 1, 3), None),
        (nn.Conv1d(1, 4, 1), None),
        (nn.Conv1d(1, 4, 3), MatrixLayout.whole((4, 3))),
    ],
)
def test_depthwise_and_thin_convolutions_store_no_matrix(
    conv: nn.Module, layout: Optional[MatrixLayout]
):
    assert roles_and_layouts(conv)["weight"] == (Role.vector, layout)


# Blocks of outputs


def stacked_row(**kwargs) -> ParamRole:
    """Two matrices of 12 outputs and 5 inputs."""
    return ParamRole("w", (24, 5), Role.experts, layout=MatrixLayout.stacked((24, 5), 2), **kwargs)


@pytest.mark.parametrize(
    "blocks,row_sizes",
    [
        (RowBlocks.whole, (12, 12)),
        (RowBlocks.fused, (6, 2, 4, 6, 2, 4)),
        (RowBlocks.heads, (2,) * 12),
        ("heads", (2,) * 12),
        (1, (12, 12)),
        (3, (4,) * 6),
        ([12], (12, 12)),
        ((2, 10), (2, 10, 2, 10)),
    ],
)
def test_blocks_split_the_outputs_of_every_matrix(blocks, row_sizes: Tuple[int, ...]):
    row = stacked_row(parts=(6, 2, 4), head_dim=2)
    assert layout_of(row, blocks) == MatrixLayout(row_sizes, (5,))


@pytest.mark.parametrize("blocks", list(RowBlocks))
def test_matrices_without_parts_and_heads_stay_whole(blocks: RowBlocks):
    assert layout_of(stacked_row(), blocks) == stacked_row().layout


def test_matrices_without_heads_have_their_parts_apart():
    row = stacked_row(parts=(8, 4))
    assert layout_of(row, RowBlocks.heads) == MatrixLayout((8, 4, 8, 4), (5,))


def test_blocks_split_columns_where_these_are_the_outputs():
    layout = MatrixLayout.side_by_side((5, 24), 2, in_out=True)
    row = ParamRole("w", (5, 24), Role.experts, layout=layout)
    assert layout_of(row, [4, 8]) == MatrixLayout((5,), (4, 8, 4, 8), in_out=True)


@pytest.mark.parametrize(
    "blocks,shown",
    [
        ("rows", "'rows'"),
        (5, "5"),
        (0, "0"),
        (-2, "-2"),
        (24, "24"),
        (10**18, "1" + 18 * "0"),
        (True, "True"),
        ([4, 4], "[4, 4]"),
        ([], "[]"),
        ([12.0], "[12.0]"),
        (2.0, "2.0"),
        (None, "None"),
    ],
)
def test_blocks_that_do_not_fit_raise(blocks, shown: str):
    with pytest.raises(OLMoConfigurationError) as error:
        layout_of(stacked_row(), blocks)
    message = str(error.value)
    assert f"row blocks {shown} of parameter 'w' of shape (24, 5)" in message
    assert "whole, fused, heads, a number that divides the 12 outputs" in message


@pytest.mark.parametrize(
    "blocks,kwargs",
    [
        (12, {}),
        ([11, 1], {}),
        ([14, -2], {}),
        (RowBlocks.fused, {"parts": (11, 1)}),
        (RowBlocks.heads, {"head_dim": 1}),
    ],
)
def test_blocks_of_one_output_raise(blocks, kwargs: Dict[str, Any]):
    with pytest.raises(OLMoConfigurationError, match="two dimensions larger than 1"):
        layout_of(stacked_row(**kwargs), blocks)


@pytest.mark.parametrize("blocks", [*RowBlocks, 1, [4]])
def test_blocks_of_what_stores_no_matrix_raise(blocks):
    with pytest.raises(OLMoConfigurationError, match="parameter 'norm'.*it stores no matrix"):
        layout_of(ParamRole("norm", (4,), Role.vector), blocks)
