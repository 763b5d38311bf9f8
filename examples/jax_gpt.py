"""
A small GPT in Flax, trained by Dion and by AdamW on the text that ships with Python::

    python examples/jax_gpt.py

Both start from the same weights and see the same batches. Losses on held-out text are printed and,
with those of the batches, drawn into ``runs/jax_gpt.png``. It takes about two minutes on two cores.
"""

import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'olmo-optim-ext[jax-example]'")

from mixture_pretraining_stages.pictures import new_figure, save_figure
from mixture_pretraining_stages.sources import SourceSpec, is_held_out, read_documents
from mixture_pretraining_stages.tokenizers import load_tokenizer
from olmo_optim_ext.jax import dion, matrix_dimension_numbers

MIXTURE = {"python-code": 0.7, "python-docs": 0.3}
"""Shares of the sources, as in the first stage of the quickstart."""

RATES = {"Dion": 0.015, "AdamW": 0.003}
"""
Peak learning rates, each the best of those tried, by the held-out loss after 300 steps of seed 0:

- Dion: 0.01 2.517, 0.015 2.511, 0.02 2.515, 0.03 2.563
- AdamW: 0.002 2.613, 0.003 2.610, 0.004 2.620, 0.006 2.638
"""

HEAD_WIDTH = 32

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Block(nn.Module):
    """
    Attention and an MLP. Dion takes parameters of two axes for matrices, so these are ``Dense``
    layers, and only what they give is split into heads.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dense = partial(nn.Dense, use_bias=False)
        normed = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (
            dense(width, name=name)(normed).reshape(*x.shape[:2], -1, HEAD_WIDTH)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(width, name="attention_out")(attended)
        hidden = nn.gelu(dense(4 * width, name="up")(nn.RMSNorm(name="mlp_norm")(x)))
        return x + dense(width, name="down")(hidden)


class GPT(nn.Module):
    """From tokens of shape (batch, length) to logits of the next ones."""

    vocab_size: int
    context: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        # By the names wte, wpe and head dion() knows what to leave to AdamW.
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens)
        x = x + nn.Embed(self.context, self.width, name="wpe")(jnp.arange(tokens.shape[1]))
        for layer in range(self.layers):
            x = Block(name=f"layer_{layer}")(x)
        return nn.Dense(self.vocab_size, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class Curve(NamedTuple):
    losses: list[float]  # Of the batch of each step.
    held_out: list[tuple[int, float]]  # Steps that were done, and the loss then.
    seconds: float  # Of a step: the median, without the first, which compiles.


def read_text() -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """The quickstart's text in bytes: of each source what is trained on and what is held out, and
    the size of the vocabulary."""
    tokenizer = load_tokenizer("bytes")
    text, held_out = [], []
    for source in MIXTURE:
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for document in read_documents(SourceSpec(builtin=source)):
            ids = np.append(tokenizer.encode(document.text), tokenizer.config.eos_token_id)
            parts[is_held_out(document.key)].append(ids)
        text.append(np.concatenate(parts[0]))
        held_out.append(np.concatenate(parts[1]))
    return text, held_out, tokenizer.config.vocab_size


def draw_batches(
    sources: list[np.ndarray], number: int, size: int, length: int, seed: int
) -> list[np.ndarray]:
    """Batches of shape (size, length), from random places of sources by their shares."""
    rng = np.random.default_rng(seed)

    def window() -> np.ndarray:
        tokens = sources[rng.choice(len(sources), p=list(MIXTURE.values()))]
        start = rng.integers(len(tokens) - length)
        return tokens[start : start + length]

    return [np.stack([window() for _ in range(size)]).astype(np.int32) for _ in range(number)]


def make_optimizers(
    steps: int, rank_fraction: float, seed: int
) -> dict[str, optax.GradientTransformation]:
    """They share the schedule's shape, weight decay, clipping and Adam's ``b2``."""
    schedules = {
        name: optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
        for name, rate in RATES.items()
    }
    rules = {
        "Dion": dion(schedules["Dion"], rank_fraction=rank_fraction, weight_decay=0.01, key=seed),
        "AdamW": optax.adamw(schedules["AdamW"], b2=0.95, weight_decay=0.01),
    }
    return {name: optax.chain(optax.clip_by_global_norm(1.0), rules[name]) for name in rules}


def train(
    name: str,
    optimizer: optax.GradientTransformation,
    model: GPT,
    params: optax.Params,
    batches: list[np.ndarray],
    held_out: list[np.ndarray],
) -> Curve:
    def loss_of(params: optax.Params, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    # Donated arrays are written over: there is one copy of parameters and state, not two.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: optax.Params, state: optax.OptState, tokens: jax.Array) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(loss_of)
    state = optimizer.init(params)
    losses, evaluations, seconds = [], [], []
    for done, tokens in enumerate(batches, start=1):
        start = time.perf_counter()
        params, state, loss = step(params, state, tokens)
        losses.append(float(loss))  # Waits for the step.
        seconds.append(time.perf_counter() - start)
        if done % (len(batches) // 5) == 0 or done == len(batches):
            mean = float(np.mean([evaluate(params, tokens) for tokens in held_out]))
            evaluations.append((done, mean))
            print(f"{name:5}  step {done:4}  held-out loss {mean:.3f}", flush=True)
    return Curve(losses, evaluations, float(np.median(seconds[1:])))


def print_rules(params: optax.Params) -> None:
    """Which parameters are Dion's; those of layers, which are alike, in one line."""
    rows: Counter[tuple[str, str, str]] = Counter()

    def add(path: Any, param: jax.Array, axes: Any) -> None:
        name = re.sub(r"\d+", "*", jax.tree_util.keystr(path, simple=True, separator="/"))
        rows[name, str(param.shape), "AdamW" if axes is None else "Dion"] += 1

    jax.tree_util.tree_map_with_path(add, params, matrix_dimension_numbers(params))
    print(f"{'parameter':30}{'how many':>8}  {'shape':14}rule of dion()")
    for (name, shape, rule), number in rows.items():
        print(f"{name:30}{number:8}  {shape:14}{rule}")


def draw(curves: dict[str, Curve], path: Path) -> None:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), ("tab:blue", "tab:orange")):
        steps = len(curve.losses)
        window = max(1, steps // 20)
        means = np.convolve(curve.losses, np.ones(window) / window, mode="valid")
        # Without the warm-up, whose losses are so high that they flatten the rest.
        x = np.arange(window, steps + 1)[steps // 20 :]
        label = f"{name}, training, mean of {window} steps"
        axes.plot(x, means[steps // 20 :], color=color, alpha=0.4, linewidth=1.2, label=label)
        axes.plot(*zip(*curve.held_out), "o-", color=color, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="A small GPT on Python's own text")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def run(
    steps: int,
    output: Path,
    seed: int,
    rank_fraction: float,
    *,
    width: int = 128,
    layers: int = 4,
    context: int = 128,
    batch_size: int = 8,
) -> dict[str, Curve]:
    text, held_out_text, vocab_size = read_text()
    model = GPT(vocab_size, context, width, layers)

    @jax.jit
    def init() -> optax.Params:
        return model.init(jax.random.key(seed), jnp.zeros((1, context), int))["params"]

    print_rules(init())
    shape = batch_size, context + 1  # The targets are a token later than the inputs.
    batches = draw_batches(text, steps, *shape, seed)
    held_out = draw_batches(held_out_text, 32, *shape, seed=0)
    curves = {
        name: train(name, optimizer, model, init(), batches, held_out)
        for name, optimizer in make_optimizers(steps, rank_fraction, seed).items()
    }
    draw(curves, output)
    results = ", ".join(
        f"{name} {curve.held_out[-1][1]:.3f} ({curve.seconds:.3f} s a step)"
        for name, curve in curves.items()
    )
    print(f"Held-out loss after {steps} steps: {results}. Curves: {output}")
    return curves


@app.command()
def main(
    steps: int = typer.Option(300, min=10, help="Of each optimizer."),
    output: Path = typer.Option(Path("runs/jax_gpt.png"), dir_okay=False, writable=True),
    seed: int = typer.Option(0, min=0, max=2**31 - 1, help="Of the weights and the batches."),
    rank_fraction: float = typer.Option(0.25, help="Of Dion, in (0, 1]."),
) -> None:
    """Train a small GPT by Dion and by AdamW, and draw their losses."""
    if not 0 < rank_fraction <= 1:
        raise typer.BadParameter(f"--rank-fraction is {rank_fraction}, and must be in (0, 1].")
    if output.suffix != ".png":
        raise typer.BadParameter(f"--output is '{output}', and must end in .png.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--output is in '{error.filename}': {error.strerror}.") from error
    run(steps, output, seed, rank_fraction)


if __name__ == "__main__":
    app()
