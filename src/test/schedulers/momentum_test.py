"""
The momentum of a parameter group: every rule follows the one that is set, and what has none says
so.
"""

from typing import Any, Dict, Optional

import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError
from torch._dynamo.utils import counters

from olmo_optim_ext import (
    AdamWConfig,
    CyclicScheduler,
    MuonConfig,
    OneCycleScheduler,
    ScionConfig,
    get_config_class,
    list_optimizers,
)
from olmo_optim_ext.schedulers import momentum_of, set_momentum

from ..optim.case import MixedShapes, train, weights
from .schedulers_test import at

WITHOUT = ("adagrad", "adafactor", "schedule_free")
AT_ZERO = ("rmsprop",)


NEEDED: Dict[str, Dict[str, Any]] = {"sophia": {"batch_tokens": 1}, "rmsprop": {"momentum": 0.9}}


def after(name: str, momentum: Optional[float]) -> Dict[int, Dict[str, Any]]:
    """The weights of each parameter group after four steps, the last two with a momentum."""
    model = MixedShapes()
    optim = get_config_class(name)(**NEEDED.get(name, {})).build(model)
    train(model, optim, 0, 2)
    for group in optim.param_groups:
        if momentum is not None:
            set_momentum(group, momentum, "a test")
            assert momentum_of(group, "a test") == pytest.approx(momentum, rel=1e-15)
    train(model, optim, 2, 4)
    found = weights(model)
    name_of = {id(param): key for key, param in model.named_parameters()}
    return {
        index: {name_of[id(param)]: found[name_of[id(param)]] for param in group["params"]}
        for index, group in enumerate(optim.param_groups)
    }


@pytest.mark.parametrize("name", [n for n in list_optimizers() if n not in WITHOUT])
def test_every_group_follows_the_momentum_that_is_set(name):
    plain, changed = after(name, None), after(name, 0.3)
    for index, params in plain.items():
        assert any(not torch.equal(changed[index][key], params[key]) for key in params), index


def test_scions_is_one_less_the_weight_of_the_new_gradient():
    optim = ScionConfig(momentum=0.25).build(MixedShapes())
    for group in optim.param_groups:
        assert momentum_of(group, "a test") == 0.75
        set_momentum(group, 0.9, "a test")
        assert group["momentum"] == pytest.approx(0.1)


def test_of_a_group_that_is_left_to_adamw_it_is_the_first_beta():
    optim = MuonConfig(momentum=0.95, adamw_betas=(0.8, 0.9)).build(MixedShapes())
    found = {g["algorithm"]: momentum_of(g, "a test") for g in optim.param_groups}
    assert found == {"muon": 0.95, "adamw": 0.8}
    for group in optim.param_groups:
        keys = set(group)
        OneCycleScheduler().set_lr(group, at(60))
        assert set(group) == keys
    left = {g["algorithm"]: (g["momentum"], g["betas"]) for g in optim.param_groups}
    assert left == {"muon": (0.95, (0.8, 0.9)), "adamw": (0.95, (0.95, 0.9))}


@pytest.mark.parametrize("name", [*WITHOUT, *AT_ZERO])
def test_cycling_what_is_not_there_is_refused(name):
    (group, *_) = get_config_class(name)().build(MixedShapes()).param_groups
    with pytest.raises(OLMoConfigurationError, match="'cycle_momentum' is True, which is not"):
        CyclicScheduler(up=3).set_lr(group, at(1))
    CyclicScheduler(up=3, cycle_momentum=False).set_lr(group, at(1))


def test_a_cycle_compiles_nothing_anew():
    model = MixedShapes()
    optim = AdamWConfig(compile=True).build(model)
    train(model, optim, 0, 1)
    counters.clear()
    betas = set()
    for step in range(1, 6):
        for group in optim.param_groups:
            OneCycleScheduler().set_lr(group, at(10 * step))
            group["weight_decay"] *= 0.9
            betas.add(group["betas"])
        train(model, optim, step, step + 1)
    assert len(betas) == 5
    assert counters["stats"]["unique_graphs"] == 0
