"""
Gradients that are clipped by value: like torch's, but for what is not finite.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from olmo_optim_ext import AdamWConfig, Mars
from olmo_optim_ext.training import ClipGradValueCallback, SAMCallback, clip_grad_value

from .bad_batch_worker import STEPS, Witness, build_trainer

SKIPPED = "optim/step skipped"


def model_with_gradients(*extra: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for param in list(model.parameters())[:-1]:  # the last has none
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    if extra:
        grad = model[0].weight.grad
        assert isinstance(grad, torch.Tensor)
        grad.view(-1)[: len(extra)] = torch.tensor(extra)
    return model


def gradients(model: nn.Module) -> List[torch.Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [1e-3, 0.5, 100.0])
def test_finite_gradients_become_what_torch_makes_of_them(dtype, bound):
    ours, theirs = model_with_gradients(dtype=dtype), model_with_gradients(dtype=dtype)
    clip_grad_value(ours.parameters(), bound)
    nn.utils.clip_grad_value_(theirs.parameters(), bound)
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("with_norm", [True, False])
def test_a_batch_that_is_not_finite_is_still_skipped(value, with_norm):
    model = model_with_gradients(value, 3.0)
    optim = AdamWConfig().build(model)
    before = [param.detach().clone() for param in model.parameters()]
    clip_grad_value(model.parameters(), 0.1)
    clipped = model[0].weight.grad.view(-1)[:2]  # type: ignore[index]
    assert not clipped[0].isfinite() and clipped[1] == pytest.approx(0.1)
    if with_norm:
        optim.latest_grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    assert optim.step_skipped == 1
    for param, old in zip(model.parameters(), before):
        assert torch.equal(param, old)


def test_the_host_waits_for_no_value():
    # On the meta device there is none, and reading one raises.
    model = nn.Linear(2, 2, device="meta")
    for param in model.parameters():
        param.grad = torch.empty_like(param)
    clip_grad_value(model.parameters(), 1.0)


def test_shards_are_clipped_where_they_are():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        param = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.arange(12.0).view(4, 3) - 2, mesh, [Shard(0)])
        with CommDebugMode() as comm:
            clip_grad_value([param], 1.5)
        assert comm.get_total_counts() == 0
        local = param.grad.to_local()
        assert local.tolist() == [[-1.5, -1.0, 0.0], [1.0, 1.5, 1.5]]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, True, "1"])
def test_bad_bounds_are_refused(value):
    callback = ClipGradValueCallback(max_grad_value=value)
    callback.trainer = SimpleNamespace(train_module=None)  # type: ignore[assignment]
    with pytest.raises(OLMoConfigurationError, match="'max_grad_value' is .*a finite number > 0"):
        callback.post_attach()


def test_further_passes_come_before():
    assert ClipGradValueCallback.priority < SAMCallback.priority


def test_in_the_trainer_both_gradients_of_mars_are_clipped_and_bad_batches_skipped(
    tmp_path: Path, monkeypatch: Any
):
    bound, largest = 1e-3, []
    keep = Mars.keep_last_gradients

    def kept(optim: Mars) -> None:
        grads = [p.grad for group in optim.param_groups for p in group["params"]]
        largest.append(max(float(grad.abs().max()) for grad in grads if grad is not None))
        keep(optim)

    monkeypatch.setattr(Mars, "keep_last_gradients", kept)
    witness = Witness(bad_steps={4: "nan gradients", 8: "inf loss"})
    clip = ClipGradValueCallback(bound)
    build_trainer(tmp_path, "mars", witness, None, further=clip, exact=True).fit()
    skipped = {step for step, row in witness.record.metrics.items() if row.get(SKIPPED)}
    assert skipped == {4, 8}
    assert len(largest) == STEPS
    finite = [value for value in largest if math.isfinite(value)]
    assert len(finite) >= STEPS - 2 and max(finite) <= bound * (1 + 1e-6)
    assert max(finite) == pytest.approx(bound)
