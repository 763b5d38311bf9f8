"""
Rules that become others at some value of a hyperparameter, to the last bit.
"""

from typing import Any, Dict, List, Tuple

import pytest
import torch

from olmo_optim_ext import (
    AdamConfig,
    AdamWConfig,
    AdanConfig,
    AdEMAMixConfig,
    EvaConfig,
    LambConfig,
    LookaheadConfig,
    MarsConfig,
    MuonConfig,
    RAdamConfig,
    SAMConfig,
    SGDConfig,
)
from olmo_optim_ext.config import ExtOptimConfig

from .case import MixedShapes, equal, relative_error, train, weights

COMMON: Dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1)
ADAMW, ADAM, MUON = AdamWConfig(**COMMON), AdamConfig(**COMMON), MuonConfig(lr=0.01, momentum=0.8)


def trained(config: ExtOptimConfig, steps: int = 20, scale: float = 0.1) -> Dict[str, torch.Tensor]:
    model = MixedShapes()
    train(model, config.build(model), 0, steps, scale)
    return weights(model)


# Gradients so small that MARS clips none of them.
SMALL = 1e-3

REDUCTIONS: List[Tuple[str, ExtOptimConfig, ExtOptimConfig]] = [
    ("mars", MarsConfig(gamma=0.0, optimize_1d=True, **COMMON), ADAMW),
    (
        "mars, vectors by AdamW",
        MarsConfig(gamma=0.0, betas_1d=(0.9, 0.99), weight_decay_1d=0.1, **COMMON),
        ADAMW,
    ),
    (
        "ademamix",
        AdEMAMixConfig(**{**COMMON, "betas": (0.9, 0.99, 0.999)}, alpha=0.0),
        ADAMW,
    ),
    ("ext_adam, decoupled", AdamConfig(decoupled_weight_decay=True, **COMMON), ADAMW),
    ("eva", EvaConfig(adaptation_strength=0.0, **COMMON), ADAM),
    (
        "eva, decoupled",
        EvaConfig(adaptation_strength=0.0, decoupled_weight_decay=True, **COMMON),
        ADAMW,
    ),
    ("lookahead", LookaheadConfig(inner=ADAMW, alpha=1.0), ADAMW),
    ("lookahead around muon", LookaheadConfig(inner=MUON, alpha=1.0, k=3), MUON),
    ("sam", SAMConfig(inner=ADAMW, rho=0.0), ADAMW),
    ("sam around muon", SAMConfig(inner=MUON, rho=0.0, adaptive=True), MUON),
]


@pytest.mark.parametrize(
    "config,other", [row[1:] for row in REDUCTIONS], ids=[r[0] for r in REDUCTIONS]
)
def test_is_the_other_rule_to_the_last_bit(config, other):
    assert equal(trained(config, scale=SMALL), trained(other, scale=SMALL))


@pytest.mark.parametrize("name", ["gamma", "alpha", "adaptation_strength"])
def test_other_values_are_another_rule(name):
    config: Any = next(c for _, c, _ in REDUCTIONS if hasattr(c, name) and getattr(c, name) == 0.0)
    assert not equal(trained(config.replace(**{name: 0.5})), trained(config))


def at_step(config: ExtOptimConfig, step: float) -> Dict[str, torch.Tensor]:
    """The weights after one update that is taken for the one of this number."""
    model = MixedShapes()
    optim = config.build(model)
    for state in optim.state.values():
        state["step"].fill_(step - 1)
    train(model, optim, 0, 1)
    return weights(model)


def test_radam_is_adam_when_the_variance_is_known():
    assert equal(at_step(RAdamConfig(**COMMON), 1e6), at_step(ADAM, 1e6))
    assert not equal(at_step(RAdamConfig(**COMMON), 50), at_step(ADAM, 50))


def test_radam_is_averaged_sgd_until_then():
    """With the second beta 0.99 for four updates; the average has Adam's bias correction."""
    config = RAdamConfig(**{**COMMON, "betas": (0.0, 0.99), "weight_decay": 0.0})
    sgd = SGDConfig(lr=0.01, momentum=0.0)
    for steps, same in ((1, True), (4, True), (6, False)):
        assert equal(trained(config, steps), trained(sgd, steps)) == same


def test_lamb_without_decay_is_adam_unless_it_adapts():
    fields = {**COMMON, "weight_decay": 0.0}
    adam, start = trained(AdamConfig(**fields)), weights(MixedShapes())
    plain = trained(LambConfig(**fields))
    assert relative_error(plain, adam, start) < 2e-6
    assert not equal(trained(LambConfig(always_adapt=True, **fields)), plain)


def test_adan_without_decay_has_no_forms():
    fields = {**COMMON, "betas": (0.98, 0.92, 0.99), "weight_decay": 0.0}
    assert equal(trained(AdanConfig(**fields)), trained(AdanConfig(no_prox=True, **fields)))
