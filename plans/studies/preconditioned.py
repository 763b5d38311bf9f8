"""
SOAP and Kron against other implementations and against a tuned AdamW; plans/soap.md and
plans/kron.md have the answers.

    python plans/studies/preconditioned.py steps [--cycles N]
    python plans/studies/preconditioned.py train [--steps N]
    python plans/studies/preconditioned.py kron_torch

``steps`` times whole cycles of refreshes in turn, on matrices of a transformer of width 512. Peers
are those that are installed: pytorch-optimizer, heavyball, kron-torch. ``train`` trains a
transformer of two layers and width 64 on the text that ships with Python, 1024 bytes a step, on one
thread. ``kron_torch`` gives that package, which must be installed, our probes and compares 50
steps; TORCHDYNAMO_DISABLE=1 spares its compilations.
"""

import argparse
import importlib.util
import statistics
import time
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
import torch.nn as nn
from orthonoise import header, held_out_loss, new_model, row, text, train

from olmo_optim_ext import AdamWConfig, KronConfig, SoapConfig
from olmo_optim_ext.config import ExtOptimConfig
from olmo_optim_ext.engine.random import generator

SHAPES = [(512, 512)] * 4 + [(2048, 512)] * 2 + [(512, 2048)]

Params = List[nn.Parameter]


def ours(config: ExtOptimConfig) -> Callable[[Params], torch.optim.Optimizer]:
    def build(params: Params) -> torch.optim.Optimizer:
        model = nn.Module()
        for i, param in enumerate(params):
            layer = nn.Linear(*param.shape[::-1], bias=False, device="meta")
            layer.weight = param
            model.add_module(f"matrix{i}", layer)
        return config.build(model)

    return build


def peers(kind: str, due: float) -> Dict[str, Callable[[Params], torch.optim.Optimizer]]:
    found: Dict[str, Callable[[Params], torch.optim.Optimizer]] = {}

    def add(package: str, build: Callable[[Any, Params], torch.optim.Optimizer]) -> None:
        if importlib.util.find_spec(package) is not None:
            found[package] = lambda params: build(importlib.import_module(package), params)

    if kind == "soap":
        add("pytorch_optimizer", lambda p, params: p.SOAP(params, precondition_frequency=10))
        add("heavyball", lambda p, params: p.SOAP(params, precondition_frequency=10))
    else:
        add("kron_torch", lambda p, params: p.Kron(params, preconditioner_update_probability=due))
        add(
            "pytorch_optimizer",
            lambda p, params: p.Kron(params, pre_conditioner_update_probability=due),
        )
    return found


def time_steps(cycles: int) -> None:
    """One after the other in each round; the first cycles, which compile, are not counted."""

    def kron(due: float) -> ExtOptimConfig:
        return KronConfig(precond_update_prob_max=due, precond_update_prob_min=due)

    cases: List[Tuple[str, str, ExtOptimConfig, int, float]] = [
        ("soap, frequency 10", "soap", SoapConfig(), 10, 0.0),
        ("kron, probability 1", "kron", kron(1.0), 3, 1.0),
        ("kron, probability 0.03", "kron", kron(0.03), 34, 0.03),
    ]
    header("rule", "against", "ms a step", "theirs", "ratio, quartiles")
    for name, kind, config, cycle, due in cases:
        contestants = {"ours": ours(config), **peers(kind, due)}
        optims = {}
        grads = [torch.randn(shape) * 0.01 for shape in SHAPES]
        for label, build in contestants.items():
            optims[label] = build([nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES])
        seconds: Dict[str, List[float]] = {label: [] for label in optims}
        for round in range(cycles + 2):
            for label, optim in optims.items():
                total = 0.0
                for _ in range(cycle):
                    for param, grad in zip(optim.param_groups[0]["params"], grads):
                        param.grad = grad  # some drop it
                    start = time.perf_counter()
                    optim.step()
                    total += time.perf_counter() - start
                if round >= 2:
                    seconds[label].append(total / cycle)
        for label in list(optims)[1:]:
            ratios = [a / b for a, b in zip(seconds["ours"], seconds[label])]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            own, theirs = (1e3 * statistics.median(seconds[each]) for each in ("ours", label))
            row(name, label, f"{own:.0f}", f"{theirs:.0f}", f"{middle:.2f} ({low:.2f}-{high:.2f})")


def compare_with_kron_torch() -> None:
    package: Any = importlib.import_module("kron_torch.kron")
    shapes = {"square": (9, 9), "tall": (14, 8), "wide": (6, 20)}
    schedule = dict(min_prob=0.15, decay=0.1, flat_start=5)
    own_schedule = {
        f"precond_update_prob_{k.removesuffix('_prob')}": v for k, v in schedule.items()
    }
    header("settings", "largest difference in 50 steps, of the motion")
    for mode in ("none", "one_diag", "smart_one_diag", "all_diag"):
        config = KronConfig(
            lr=0.01, weight_decay=0.1, balance_prob=0.0, author_noise=True, memory_save_mode=mode
        )
        config = config.replace(**own_schedule)
        model, start = nn.Module(), {}
        for name, (rows, cols) in shapes.items():
            model.add_module(name, nn.Linear(cols, rows, bias=False))
            start[name] = model.get_submodule(name).weight.detach().clone()
        theirs = {name: nn.Parameter(weight.clone()) for name, weight in start.items()}
        their_optim = package.Kron(
            list(theirs.values()),
            **dict(lr=0.01, weight_decay=0.1, memory_save_mode=None if mode == "none" else mode),
            preconditioner_update_probability=package.precond_update_prob_schedule(**schedule),
        )
        their_optim.rng = SimpleNamespace(random=lambda: 1.0)  # no balancing
        optim = config.build(model)
        for call in range(1, 51):
            names = iter(shapes)

            def our_probe(x: torch.Tensor, call=call, names=names) -> torch.Tensor:
                source = generator(0, call, f"{next(names)}.weight", "probe", x.device)
                return torch.randn(x.shape, generator=source)

            for name, shape in shapes.items():
                grad = torch.randn(shape) * 0.1
                model.get_submodule(name).weight.grad = grad
                theirs[name].grad = grad.clone()
            optim.step()
            original, torch.randn_like = torch.randn_like, our_probe
            try:
                their_optim.step()
            finally:
                torch.randn_like = original
        errors = [
            (model.get_submodule(name).weight - param).norm() / (param - start[name]).norm()
            for name, param in theirs.items()
        ]
        row(f"memory_save_mode {mode}", f"{float(max(errors)):.1e}")


def train_against_adamw(steps: int) -> None:
    """
    All under a learning rate that decays to 0 over the same steps, in factors of 2; AdamW's best is
    also that of what SOAP and Kron leave to it.
    """
    tokens, seeds, every = text(), range(3), max(1, steps // 60)

    def curve(config: ExtOptimConfig, seed: int) -> List[float]:
        model, losses = new_model(seed), []

        def evaluate(step: int, optim: Any) -> None:
            if (step + 1) % every == 0:
                losses.append(held_out_loss(model, tokens))

        train(model, config, steps, seed, evaluate)
        return losses

    def best(rates: List[float], make: Callable[[float], ExtOptimConfig]) -> Tuple[float, Any]:
        found = {lr: [curve(make(lr), seed) for seed in seeds] for lr in rates}
        for lr, by_seed in found.items():
            finals = [losses[-1] for losses in by_seed]
            name = type(make(lr)).__name__.removesuffix("Config")
            row(name, lr, f"{np.mean(finals):.4f}", f"{np.std(finals, ddof=1):.4f}")
        return min(found.items(), key=lambda item: np.mean([losses[-1] for losses in item[1]]))

    header("rule", "lr", "held-out loss, mean of 3 seeds", "standard deviation")
    lr, baseline = best([0.0005 * 2**i for i in range(6)], lambda lr: AdamWConfig(lr=lr))
    own = {
        "soap": best([0.001 * 2**i for i in range(5)], lambda x: SoapConfig(lr=x, adamw_lr=lr)),
        "kron": best([0.0005 * 2**i for i in range(5)], lambda x: KronConfig(lr=x, adamw_lr=lr)),
    }
    print()
    header("rule", "lr", "share of AdamW's steps to its final loss, by seed", "mean")
    for name, (rate, by_seed) in own.items():
        shares = []
        for losses, theirs in zip(by_seed, baseline):
            reached = [i for i, loss in enumerate(losses) if loss <= theirs[-1]]
            shares.append((reached[0] + 1) / len(theirs) if reached else float("inf"))
        row(name, rate, ", ".join(f"{x:.2f}" for x in shares), f"{np.mean(shares):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=["steps", "train", "kron_torch"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--cycles", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.question == "steps":
        time_steps(arguments.cycles)
    elif arguments.question == "kron_torch":
        compare_with_kron_torch()
    else:
        torch.set_num_threads(1)
        train_against_adamw(arguments.steps)
