"""
Each schedule against torch's, in steps and in tokens, and what is refused.
"""

import math
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import Scheduler, scheduler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from olmo_optim_ext import (
    CosWithRestarts,
    CyclicScheduler,
    MultiStepScheduler,
    OneCycleScheduler,
    PolynomialScheduler,
)
from olmo_optim_ext.schedulers import refuse_cycled_momentum

LR, STEPS, BATCH = 0.3, 60, 48


def one_cycle(optim: Optimizer, share: float = 0.3, **options: Any) -> Any:
    """torch's phases end at ``pct_start * total_steps - 1`` and ``total_steps - 1``."""
    total = STEPS + 1
    return torch_schedulers.OneCycleLR(
        optim, max_lr=LR, total_steps=total, pct_start=(share * STEPS + 1) / total, **options
    )


def cyclic(optim: Optimizer, **options: Any) -> Any:
    return torch_schedulers.CyclicLR(optim, base_lr=LR / 4, max_lr=LR, **options)


def restarts(optim: Optimizer, *args: Any) -> Any:
    return torch_schedulers.CosineAnnealingWarmRestarts(optim, *args)


CASES: Dict[str, Tuple[Scheduler, Callable[[Optimizer], Any]]] = {
    "polynomial": (
        PolynomialScheduler(power=1.7),
        lambda o: torch_schedulers.PolynomialLR(o, total_iters=STEPS, power=1.7),
    ),
    "polynomial, shorter than the run": (
        PolynomialScheduler(power=0.5, t_max=40),
        lambda o: torch_schedulers.PolynomialLR(o, total_iters=40, power=0.5),
    ),
    "multi_step": (
        MultiStepScheduler(milestones=[7, 30, 31], gamma=0.3),
        lambda o: torch_schedulers.MultiStepLR(o, [7, 30, 31], gamma=0.3),
    ),
    "multi_step by shares": (
        MultiStepScheduler(milestone_fractions=[0.1, 0.35, 0.7]),
        lambda o: torch_schedulers.MultiStepLR(o, [6, 21, 42]),
    ),
    "cos_with_restarts": (CosWithRestarts(period=13), lambda o: restarts(o, 13)),
    "cos_with_restarts by shares": (CosWithRestarts(period_fraction=0.1), lambda o: restarts(o, 6)),
    "cos_with_restarts, longer and longer": (
        CosWithRestarts(period=7, t_mult=2, alpha_f=0.2),
        lambda o: restarts(o, 7, 2, LR * 0.2),
    ),
    "one_cycle": (OneCycleScheduler(), one_cycle),
    "one_cycle, linear": (
        OneCycleScheduler(anneal_strategy="linear", warmup=15),  # type: ignore[arg-type]
        lambda o: one_cycle(o, 0.25, anneal_strategy="linear"),
    ),
    "one_cycle in three phases": (
        OneCycleScheduler(
            three_phase=True,
            warmup_fraction=0.4,
            div_factor=10,
            final_div_factor=100,
            base_momentum=0.5,
            max_momentum=0.99,
        ),
        lambda o: one_cycle(
            o,
            0.4,
            three_phase=True,
            div_factor=10,
            final_div_factor=100,
            base_momentum=0.5,
            max_momentum=0.99,
        ),
    ),
    "cyclic": (CyclicScheduler(up=8), lambda o: cyclic(o, step_size_up=8)),
    "cyclic, triangular2": (
        CyclicScheduler(up_fraction=0.1, down=4, mode="triangular2"),  # type: ignore[arg-type]
        lambda o: cyclic(o, step_size_up=6, step_size_down=4, mode="triangular2"),
    ),
    "cyclic, exp_range": (
        CyclicScheduler(up=5, down=7, mode="exp_range", gamma=0.9**12),  # type: ignore[arg-type]
        lambda o: cyclic(o, step_size_up=5, step_size_down=7, mode="exp_range", gamma=0.9),
    ),
}


def groups_of(optimizer: str) -> Optimizer:
    params = [torch.nn.Parameter(torch.zeros(1))]
    if optimizer == "sgd":
        return SGD(params, lr=LR, momentum=0.9)
    return AdamW(params, lr=LR, betas=(0.9, 0.999))


def momentum(group: Dict[str, Any]) -> float:
    return group["momentum"] if "momentum" in group else group["betas"][0]


def at(step: int, batch: int = BATCH) -> Any:
    """The clock of a run, after ``step`` of :data:`STEPS`."""
    return SimpleNamespace(
        global_step=step,
        max_steps=STEPS,
        global_train_tokens_seen=step * batch,
        max_tokens=STEPS * batch,
    )


def in_tokens(ours: Scheduler) -> Scheduler:
    """The same with all lengths in tokens."""
    lengths = ("warmup", "period", "up", "down", "t_max")
    given = {name: value for name in lengths if (value := getattr(ours, name, None)) is not None}
    changes: Dict[str, Any] = {name: value * BATCH for name, value in given.items()}
    changes["units"] = "tokens"
    if getattr(ours, "milestones", None):
        changes["milestones"] = [each * BATCH for each in ours.milestones]  # type: ignore[attr-defined]
    return replace(ours, **changes)


def run(ours: Scheduler, optimizer: str, steps: Any = range(STEPS)) -> List[Tuple[float, float]]:
    group = groups_of(optimizer).param_groups[0]
    values = []
    for step in steps:
        ours.set_lr(group, at(step))
        values.append((group["lr"], momentum(group)))
    assert set(group) == {*groups_of(optimizer).param_groups[0], "initial_lr"}
    return values


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_has_torchs_rate_and_momentum(name, optimizer):
    ours, of_torch = CASES[name]
    optim = groups_of(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps here
        theirs = of_torch(optim)
        expected = []
        for _ in range(STEPS):
            group = optim.param_groups[0]
            expected.append((group["lr"], momentum(group)))
            theirs.step()
    for found, wanted in zip(run(ours, optimizer), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-16)
    moves = {m for _, m in expected}
    assert (len(moves) > 1) == ("cycl" in name)


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_steps_times_the_batch(name):
    ours, _ = CASES[name]
    every = range(STEPS + 1)
    assert run(in_tokens(ours), "sgd", every) == run(ours, "sgd", every)


@pytest.mark.parametrize("name", CASES)
def test_any_order_of_calls_gives_the_same(name):
    ours, _ = CASES[name]
    in_order = run(ours, "adamw")
    order = list(range(STEPS))
    random.Random(0).shuffle(order)
    assert run(ours, "adamw", order) == [in_order[step] for step in order]


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_stays_the_tensor_and_is_never_read(name):
    ours, _ = CASES[name]
    ours = replace(ours, warmup=3) if hasattr(ours, "warmup_min_lr") else ours  # type: ignore[call-arg]
    of_floats = [ours.get_lr(LR, step, STEPS) for step in range(STEPS)]
    group = groups_of("sgd").param_groups[0]
    lr = torch.tensor(LR, dtype=torch.float64)
    group.update(lr=lr, initial_lr=lr.clone())
    for step, expected in enumerate(of_floats):
        ours.set_lr(group, at(step))
        assert group["lr"] is lr and group["initial_lr"] == LR
        assert lr.item() == pytest.approx(expected, rel=1e-15)
        assert isinstance(group["momentum"], float)
        # On the meta device there is no value, and reading one raises.
        assert ours.get_lr(torch.empty((), device="meta"), step, STEPS).device.type == "meta"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "ours",
    [
        PolynomialScheduler(warmup=10, warmup_min_lr=0.1),
        MultiStepScheduler(warmup_fraction=0.1, milestones=[50]),
        CosWithRestarts(warmup=10, period=20, alpha_f=0.1),
    ],
)
def test_a_warm_up_is_linear_and_ends_at_the_initial_rate(ours):
    warmup = ours.warmup or round(100 * ours.warmup_fraction)
    for step in range(warmup + 1):
        expected = ours.warmup_min_lr + (LR - ours.warmup_min_lr) * step / warmup
        assert ours.get_lr(LR, step, 100) == pytest.approx(expected, rel=1e-15)
    assert ours.get_lr(LR, warmup + 1, 100) <= LR


def test_the_ends_of_runs_are_the_lowest_rates():
    assert PolynomialScheduler(alpha_f=0.1, warmup=5).get_lr(1.0, 100, 100) == 0.1
    assert PolynomialScheduler(t_max=50).get_lr(1.0, 60, 100) == 0.0
    # torch's restarts here.
    for ours in (CosWithRestarts(period_fraction=0.25), CosWithRestarts(warmup=10, period=45)):
        assert ours.get_lr(1.0, 100, 100) == 0.0
        assert ours.get_lr(1.0, 55, 100) > 0.8
    assert CosWithRestarts(period=100, t_mult=3).get_lr(1.0, 400, 400) == 0.0
    one = OneCycleScheduler()
    assert one.get_lr(1.0, 100, 100) == one.get_lr(1.0, 120, 100) == pytest.approx(4e-6)
    assert one.get_momentum(100, 100) == one.get_momentum(120, 100) == 0.95
    assert OneCycleScheduler(t_max=50).get_lr(1.0, 15, 100) == 1.0


def test_shares_are_the_numbers_that_were_written():
    # In floats 0.07 * 100 is above 7 and 0.1 * 30 above 3.
    ours = MultiStepScheduler(milestone_fractions=[0.07])
    assert [ours.get_lr(1.0, step, 100) for step in (6, 7)] == [1.0, 0.1]
    thirds = CosWithRestarts(period_fraction=0.1)
    assert [thirds.get_lr(1.0, step, 30) for step in range(0, 30, 3)] == [1.0] * 10
    # Not whole steps: the first step from there on, also in tokens.
    ours = MultiStepScheduler(milestone_fractions=[0.33])
    assert [ours.get_lr(1.0, step, 10) for step in (3, 4)] == [1.0, 0.1]
    assert [ours.get_lr(1.0, 7 * step, 70) for step in (3, 4)] == [1.0, 0.1]


def test_without_cycle_momentum_the_momentum_stays():
    still: List[Any] = [OneCycleScheduler(cycle_momentum=False)]
    for ours in (*still, CyclicScheduler(up=5, cycle_momentum=False)):
        assert {m for _, m in run(ours, "sgd")} == {0.9}


NAMES = {
    "polynomial": PolynomialScheduler,
    "multi_step": MultiStepScheduler,
    "cos_with_restarts": CosWithRestarts,
    "one_cycle": OneCycleScheduler,
    "cyclic": CyclicScheduler,
}


def test_they_are_registered_and_none_of_olmo_cores_is_replaced():
    for name, cls in NAMES.items():
        assert Scheduler.get_registered_class(name) is cls
    own = [
        cls
        for cls in vars(scheduler).values()
        if isinstance(cls, type) and issubclass(cls, Scheduler) and cls is not Scheduler
    ]
    assert len(own) >= 13
    for cls in own:
        assert Scheduler.get_registered_class(cls.get_registered_name()) is cls


@pytest.mark.parametrize("name", CASES)
def test_configs_of_olmo_core_find_them(name):
    ours, _ = CASES[name]
    plain = ours.as_config_dict()
    assert plain["_CLASS_"] == f"{type(ours).__module__}.{type(ours).__name__}"
    assert Scheduler.from_dict(plain) == ours
    fields = {key: value for key, value in plain.items() if key not in ("_CLASS_", "type")}
    assert Scheduler.from_dict({"type": ours.get_registered_name(), **fields}) == ours


BAD: List[Tuple[str, str, Dict[str, Any]]] = [
    ("polynomial", "'power' is 0", {"power": 0}),
    ("polynomial", "'power' is inf", {"power": math.inf}),
    ("polynomial", "'power' is None", {"power": None}),
    ("polynomial", "'alpha_f' is nan", {"alpha_f": math.nan}),
    ("polynomial", "'alpha_f' is 1.5", {"alpha_f": 1.5}),
    ("polynomial", "'t_max' is 0", {"t_max": 0}),
    ("polynomial", "'units' is 'epochs'.*steps, tokens", {"units": "epochs"}),
    ("polynomial", "'warmup' is -1", {"warmup": -1}),
    ("polynomial", "'warmup' is 2.5", {"warmup": 2.5}),
    ("polynomial", "'warmup_fraction' is 1.1", {"warmup_fraction": 1.1}),
    ("polynomial", "'warmup_min_lr' is -0.1", {"warmup_min_lr": -0.1}),
    ("polynomial", "'warmup' is 3 and 'warmup_fraction'", {"warmup": 3, "warmup_fraction": 0.1}),
    ("multi_step", "'milestones' is None and .*one of them", {}),
    ("multi_step", r"'milestones' is \[\]", {"milestones": []}),
    ("multi_step", r"'milestones' is \[3, 2\].*rising", {"milestones": [3, 2]}),
    ("multi_step", r"'milestones' is \[3, 3\]", {"milestones": [3, 3]}),
    ("multi_step", r"'milestones' is \[0\].*>= 1", {"milestones": [0]}),
    ("multi_step", r"'milestones' is \[True\]", {"milestones": [True]}),
    ("multi_step", "'milestones' is 3", {"milestones": 3}),
    ("multi_step", r"'milestone_fractions' is \[1.0\]", {"milestone_fractions": [1.0]}),
    ("multi_step", r"'milestone_fractions' is \[nan\]", {"milestone_fractions": [math.nan]}),
    (
        "multi_step",
        "'milestones' is .* and 'milestone_fractions'",
        {"milestones": [1], "milestone_fractions": [0.5]},
    ),
    ("multi_step", "'gamma' is 0", {"milestones": [1], "gamma": 0}),
    ("cos_with_restarts", "'period' is None and .*one of them", {}),
    ("cos_with_restarts", "'period' is 0", {"period": 0}),
    ("cos_with_restarts", "'period_fraction' is 0", {"period_fraction": 0}),
    ("cos_with_restarts", "'t_mult' is 1.5", {"period": 3, "t_mult": 1.5}),
    ("cos_with_restarts", "'t_mult' is 0", {"period": 3, "t_mult": 0}),
    ("one_cycle", "'div_factor' is 0.5", {"div_factor": 0.5}),
    ("one_cycle", "'final_div_factor' is inf", {"final_div_factor": math.inf}),
    ("one_cycle", "'anneal_strategy' is 'cosine'", {"anneal_strategy": "cosine"}),
    ("one_cycle", "'three_phase' is 'no'", {"three_phase": "no"}),
    ("one_cycle", "'warmup_fraction' is 0", {"warmup_fraction": 0}),
    ("one_cycle", "most 0.5", {"warmup_fraction": 0.6, "three_phase": True}),
    ("one_cycle", "'base_momentum' is 0.96.*0.95", {"base_momentum": 0.96}),
    ("one_cycle", "'max_momentum' is 1", {"max_momentum": 1}),
    ("one_cycle", "'base_momentum' is nan", {"base_momentum": math.nan}),
    ("one_cycle", "'cycle_momentum' is 1", {"cycle_momentum": 1}),
    ("cyclic", "'up' is None and .*one of them", {}),
    ("cyclic", "'up' is 0", {"up": 0}),
    ("cyclic", "'down' is 3 and 'down_fraction'", {"up": 1, "down": 3, "down_fraction": 0.1}),
    ("cyclic", "'up_fraction' is 2", {"up_fraction": 2}),
    ("cyclic", "'mode' is 'square'.*triangular2", {"up": 1, "mode": "square"}),
    ("cyclic", "'gamma' is 1.1", {"up": 1, "mode": "exp_range", "gamma": 1.1}),
    ("cyclic", "'gamma' is 0.9 with .*exp_range", {"up": 1, "gamma": 0.9}),
    ("cyclic", "'alpha_base' is -1", {"up": 1, "alpha_base": -1}),
]


@pytest.mark.parametrize("name,message,fields", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_values_are_named(name, message, fields):
    with pytest.raises(OLMoConfigurationError, match=f"{NAMES[name].__name__}: .*{message}"):
        NAMES[name](**fields)


def test_a_warm_up_from_above_and_a_run_without_end_are_refused():
    with pytest.raises(OLMoConfigurationError, match="'warmup_min_lr' is 0.5.*most.*0.1"):
        PolynomialScheduler(warmup=5, warmup_min_lr=0.5).get_lr(0.1, 1, 10)
    clock = at(3)
    clock.max_tokens = None
    group = groups_of("sgd").param_groups[0]
    with pytest.raises(OLMoConfigurationError, match="max_tokens"):
        CyclicScheduler(up=3, units="tokens").set_lr(group, clock)  # type: ignore[arg-type]


def test_where_only_a_value_is_read_no_momentum_can_be_cycled():
    sequential = scheduler.SequentialScheduler(
        schedulers=[OneCycleScheduler(cycle_momentum=False), CyclicScheduler(up=3)],
        schedulers_max=[10],
    )
    with pytest.raises(OLMoConfigurationError, match=r"x.schedulers.1.cycle_momentum: True"):
        refuse_cycled_momentum(sequential, "x")
    refuse_cycled_momentum(CyclicScheduler(up=3, cycle_momentum=False), "x")
