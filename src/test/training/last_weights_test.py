"""
Exact MARS in OLMo-core's training loop.
"""

from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError

from olmo_optim_ext import MarsConfig
from olmo_optim_ext.training import LastWeightsCallback

from ..optim.case import MixedShapes, grads_at, take_step, weights
from .bad_batch_worker import STEPS, Witness, build_trainer, run
from .passes_worker import MARS_FORMS


def of_form(folder: Path, form: str, **more: Any) -> Any:
    fields: Dict[str, Any] = {"lr": 0.03, "gamma": 0.5, **MARS_FORMS[form], **more}
    return run(folder, "mars", bad_steps={}, **fields)


def params(record: Any) -> Dict[str, str]:
    return {key: value for key, value in record.end.items() if key.startswith("param ")}


def test_of_one_batch_the_gradient_at_the_last_weights_is_the_last_gradient(tmp_path: Path):
    exact, approximate = (of_form(tmp_path / form, form) for form in MARS_FORMS)
    assert exact.error is None and max(exact.metrics) == STEPS
    assert params(exact) == params(approximate)
    # Nothing remains of the pass but that: metrics are those of the main pass.
    losses = [
        [r.metrics[i]["train/CE loss"] for i in range(1, STEPS)] for r in (exact, approximate)
    ]
    assert losses[0] == losses[1]
    assert params(exact) != params(of_form(tmp_path / "other", "exact", gamma=0.0))


def test_a_bad_gradient_at_the_last_weights_costs_one_step():
    model = MixedShapes()
    optim: Any = MarsConfig(exact=True).build(model)
    for step in range(4):
        for name, grad in grads_at(step, model).items():
            model.get_parameter(name).grad = grad
        before = weights(model)
        if step == 2:
            good = model.tall.weight.grad
            model.tall.weight.grad = torch.full_like(model.tall.weight, torch.nan)
            optim.keep_last_gradients()
            model.tall.weight.grad = good
            optim.step()
        else:
            take_step(optim)
        assert optim.step_skipped == (step == 2)
        same = [torch.equal(weights(model)[name], before[name]) for name in before]
        assert all(same) if step == 2 else not any(same)


def test_weights_come_back_to_the_last_bit():
    model = MixedShapes()
    optim: Any = MarsConfig(exact=True).build(model)
    seen = []
    for step in range(3):
        seen.append(weights(model))
        with optim.at_last_weights():
            last = weights(model)
        assert all(torch.equal(weights(model)[name], seen[-1][name]) for name in last)
        assert all(torch.equal(last[name], seen[max(step - 1, 0)][name]) for name in last)
        for name, grad in grads_at(step, model).items():
            model.get_parameter(name).grad = grad
        take_step(optim)


def test_without_the_callback_the_first_step_says_what_to_add():
    model = MixedShapes()
    optim = MarsConfig(exact=True).build(model)
    for name, grad in grads_at(0, model).items():
        model.get_parameter(name).grad = grad
    with pytest.raises(OLMoConfigurationError, match="'exact' is True.*LastWeightsCallback"):
        optim.step()


@pytest.mark.parametrize("name,fields", [("ext_adamw", {}), ("mars", {})])
def test_the_callback_is_for_exact_mars(name: str, fields: Dict[str, Any], tmp_path: Path):
    trainer = build_trainer(tmp_path, name, Witness(), max_grad_norm=1.0, **fields)
    with pytest.raises(OLMoConfigurationError, match="allowed is mars with exact"):
        trainer.add_callback("last_weights", LastWeightsCallback())
