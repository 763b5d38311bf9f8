"""
Five questions about muon_orthonoise; plans/muon_orthonoise.md has the answers.

    python plans/studies/orthonoise.py qr|cubic|threshold|warmup|ranks [--steps N]

The last three train a transformer of two layers and width 64 on the text that ships with Python,
1024 bytes a step, on one thread.
"""

import argparse
from itertools import islice
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from olmo_core.nn.transformer import TransformerConfig
from torch.nn.functional import cross_entropy

from mixture_pretraining_stages.sources import SourceSpec, read_documents
from olmo_optim_ext import MuonConfig, MuonOrthoNoiseConfig
from olmo_optim_ext.config import ExtOptimConfig
from olmo_optim_ext.linalg.polar import cubic_steps
from olmo_optim_ext.linalg.spectrum import orthogonality_error

SEQUENCES, LENGTH = 8, 128


def text() -> np.ndarray:
    documents = islice(read_documents(SourceSpec(builtin="python-code")), 200)
    return np.frombuffer("".join(each.text for each in documents).encode(), np.uint8)


def batch(tokens: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
    starts = generator.integers(0, len(tokens) - LENGTH, SEQUENCES)
    return torch.from_numpy(np.stack([tokens[s : s + LENGTH] for s in starts])).long()


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    logits = model(x)[:, :-1]
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))


def held_out_from(tokens: np.ndarray) -> int:
    return int(0.9 * len(tokens))


def held_out_loss(model: nn.Module, tokens: np.ndarray) -> float:
    held_out, source = tokens[held_out_from(tokens) :], np.random.default_rng(0)
    with torch.no_grad():
        losses = [loss_of(model, batch(held_out, source)) for _ in range(32)]
    return torch.stack(losses).mean().item()


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = TransformerConfig.llama_like(d_model=64, vocab_size=256, n_layers=2, n_heads=4)
    model = config.build(init_device="cpu")
    model.init_weights(device=torch.device("cpu"), max_seq_len=LENGTH)
    return model


def train(
    model: nn.Module,
    config: ExtOptimConfig,
    steps: int,
    seed: int,
    each_step: Optional[Callable[[int, Any], None]] = None,
) -> Tuple[float, Any]:
    """
    Under a learning rate that decays to 0.

    :returns: The loss on held-out text, and the optimizer.
    """
    tokens = text()
    border, source = held_out_from(tokens), np.random.default_rng(seed)
    optim = config.build(model)
    for step in range(steps):
        for group in optim.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / steps)
        loss_of(model, batch(tokens[:border], source)).backward()
        optim.step()
        optim.zero_grad()
        if each_step is not None:
            each_step(step, optim)
    return held_out_loss(model, tokens), optim


def fired(optim: Any) -> Dict[str, int]:
    states = {optim.name_of(param): state for param, state in optim.state.items()}
    return {name: int(state["fired"]) for name, state in states.items() if "fired" in state}


def row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: Any) -> None:
    row(*cells)
    print("|" + "---|" * len(cells))


def ask_qr(steps: int) -> None:
    header("dtype", "torch.linalg.qr on CPU")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            torch.linalg.qr(torch.randn(8, 4).to(dtype))
            row(dtype, "runs")
        except RuntimeError as error:
            row(dtype, str(error).splitlines()[0])


def ask_cubic(steps: int) -> None:
    m, n = 128, 512
    i = torch.arange(1.0, m + 1)
    spectra = {
        "flat": torch.ones(m),
        "Gaussian": torch.linalg.svdvals(torch.randn(m, n)),
        "power law, -0.5": i**-0.5,
        "power law, -1": i**-1.0,
        "power law, -2": i**-2.0,
        "exponential, to e^-5": torch.exp(-5 * i / m),
        "rank 8": torch.where(i <= 8, 1.0, 0.0),
        "rank 8 and 1e-3": torch.where(i <= 8, 1.0, 1e-3),
    }
    left = torch.linalg.qr(torch.randn(m, m)).Q
    right = torch.linalg.qr(torch.randn(n, m)).Q
    header("spectrum", "error before", "after 3", "smallest and largest after 3", "steps to 0.1")
    for name, values in spectra.items():
        x = ((left * values) @ right.T).unsqueeze(0)
        errors = [orthogonality_error(cubic_steps(x, k)).item() for k in range(60)]
        after = torch.linalg.svdvals(cubic_steps(x, 3)[0])
        enough = next((k for k, error in enumerate(errors) if error < 0.1), "never")
        sizes = f"{after[-1]:.2g}, {after[0]:.2g}"
        row(name, f"{errors[0]:.2f}", f"{errors[3]:.2f}", sizes, enough)


def ask_threshold(steps: int) -> None:
    header("rank_threshold", "share of steps x matrices with noise", "matrices that ever had some")
    for threshold in (0.3, 0.5, 0.7):
        config = MuonOrthoNoiseConfig(rank_threshold=threshold, rank_interval=5)
        _, optim = train(new_model(0), config, steps, 0)
        counts = fired(optim)
        share = sum(counts.values()) / (steps * len(counts))
        some = [name.replace("blocks.", "") for name, count in counts.items() if count]
        of_all = "all" if len(some) == len(counts) else ", ".join(some)
        row(threshold, f"{share:.2f}", f"{len(some)} of {len(counts)}: {of_all}")


def ask_warmup(steps: int) -> None:
    always: Dict[str, Any] = dict(rank_threshold=None, anneal_steps=steps)
    configs: Dict[str, ExtOptimConfig] = {
        "none (ext_muon)": MuonConfig(),
        "from step 0": MuonOrthoNoiseConfig(**always),
        f"from step {2 * steps // 5}": MuonOrthoNoiseConfig(**always, start_step=2 * steps // 5),
    }
    header("noise", "held-out loss, mean", "standard deviation over seeds", "losses")
    for name, config in configs.items():
        losses = [train(new_model(seed), config, steps, seed)[0] for seed in range(3)]
        spread = np.std(losses, ddof=1)
        row(name, f"{np.mean(losses):.4f}", f"{spread:.4f}", ", ".join(f"{x:.4f}" for x in losses))


def ask_ranks(steps: int) -> None:
    """Two replicas with a batch each and the mean gradient, as DDP has them."""
    tokens, seen = text(), sorted({1, 10, 30, steps // 2, steps})

    def matrices(model: nn.Module) -> torch.Tensor:
        parts = [p.detach().flatten() for n, p in model.named_parameters() if "blocks" in n]
        return torch.cat(parts)

    def apart(seeds: Sequence[int]) -> Dict[int, float]:
        models = [new_model(0) for _ in seeds]
        configs = [MuonOrthoNoiseConfig(rank_threshold=None, seed=seed) for seed in seeds]
        optims = [config.build(model) for config, model in zip(configs, models)]
        start, source, found = matrices(models[0]), np.random.default_rng(0), {}
        for step in range(1, steps + 1):
            for model in models:
                loss_of(model, batch(tokens, source)).backward()
            for params in zip(*(model.parameters() for model in models)):
                mean = torch.stack([param.grad for param in params]).mean(0)
                for param in params:
                    param.grad = mean.clone()
            for optim in optims:
                optim.step()
                optim.zero_grad()
            if step in seen:
                first, second = map(matrices, models)
                found[step] = float((first - second).norm() / (first - start).norm())
        return found

    same, other = apart((0, 0)), apart((0, 1))
    header("steps", "same seed", "seeds that differ")
    for step in seen:
        row(step, f"{same[step]:.3g}", f"{other[step]:.3g}")


QUESTIONS: Dict[str, Callable[[int], None]] = {
    "qr": ask_qr,
    "cubic": ask_cubic,
    "threshold": ask_threshold,
    "warmup": ask_warmup,
    "ranks": ask_ranks,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    QUESTIONS[arguments.question](arguments.steps)
