"""
Wrappers around every optimizer of the catalogue.
"""

from typing import Any, Dict, Iterator, Type

import pytest
import torch

from olmo_optim_ext import (
    LookaheadConfig,
    SAMConfig,
    ScheduleFree,
    ScheduleFreeConfig,
    get_config_class,
    list_optimizers,
    optimizer_info,
)
from olmo_optim_ext.engine.base import ExtOptimizer
from olmo_optim_ext.wrappers.base import PREFIX, Wrapper

from .case import MixedShapes, equal, train, weights

INSIDE = [name for name in list_optimizers() if optimizer_info(name).family != "wrapper"]
WRAPPERS: Dict[str, Any] = {
    "lookahead": LookaheadConfig(k=2),
    "schedule_free": ScheduleFreeConfig(),
    "sam": SAMConfig(interval=2),
}
NOTHING: Dict[str, Dict[str, Any]] = {"lookahead": {"alpha": 1.0}, "sam": {"rho": 0.0}}
"""With which a wrapper is the optimizer inside."""

STEPS = 6


def inside(name: str) -> Dict[str, Any]:
    return {"batch_tokens": 64} if name == "sophia" else {}


def run_of(config: Any) -> Any:
    model = MixedShapes()
    optim = config.build(model)
    train(model, optim, 0, STEPS)
    return model, optim


def everything(model: MixedShapes, optim: Any) -> Dict[str, torch.Tensor]:
    named = model.named_parameters()
    states = {f"{n} {k}": v.clone() for n, p in named for k, v in optim.state[p].items()}
    return {**states, **weights(model)}


def own_classes(wrapper: Type[Wrapper]) -> Iterator[type]:
    return (cls for cls in wrapper.__mro__ if issubclass(cls, Wrapper))


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_and_the_optimizer_inside_share_no_names(wrapper, name):
    bare = get_config_class(name)().build(MixedShapes())
    config = WRAPPERS[wrapper].replace(inner={"name": name})
    wrapped = config.build(MixedShapes())
    own = {key for key in vars(wrapped) if key.startswith("_wrapper")}
    assert own and vars(wrapped).keys() - own == vars(bare).keys()
    members = {key for cls in own_classes(config.wrapper) for key in vars(cls)}
    hooks = set(dir(ExtOptimizer)) | {"__module__", "__abstractmethods__", "_abc_impl"}
    assert (members & set(dir(type(bare)))) - hooks == set()
    assert not [key for group in bare.param_groups for key in group if key.startswith(PREFIX)]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_works_around_every_optimizer(wrapper, name):
    config = WRAPPERS[wrapper].replace(inner={"name": name, **inside(name)})
    if wrapper in NOTHING:
        alone = weights(run_of(get_config_class(name)(**inside(name)))[0])
        assert equal(weights(run_of(config.replace(**NOTHING[wrapper]))[0]), alone)
    model, optim = run_of(config)
    before = weights(model)
    assert all(weight.isfinite().all() for weight in before.values())
    if isinstance(optim, ScheduleFree):
        with optim.averaged():
            assert not equal(weights(model), before)
        assert equal(weights(model), before)

    other = MixedShapes(1)
    resumed: Any = config.build(other)
    train(other, resumed, 0, 1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optim.state_dict())
    for m, o in ((model, optim), (other, resumed)):
        train(m, o, STEPS, STEPS + 2)
    assert equal(everything(other, resumed), everything(model, optim))
