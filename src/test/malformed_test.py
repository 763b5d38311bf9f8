"""
Configs with a mistake: the command ends with code 2 and one paragraph that names the key.
"""

from pathlib import Path
from typing import Any, Dict, List

import pytest

from .mixture_pretraining_stages.spec import tiny_spec, write_spec

MISTAKES: Dict[str, List[str]] = {
    # The key that the message must name, and what is typed.
    "nam": ["nam=x"],
    "name": ["name=''"],
    "model": ["model=olmo9"],
    "model: llama_like": ["model={factory: llama_like, d_model: wide, n_layers: 1, n_heads: 2}"],
    "model.attn_backend": ["model.attn_backend=flash"],
    "tokenizer": ["tokenizer=nowhere.json"],
    "tokenizer.eos_token_id": ["tokenizer={vocab_size: 300, eos_token_id: 900, pad_token_id: 0}"],
    "sequence_length": ["sequence_length=long"],
    "rank_microbatch_size": ["rank_microbatch_size=100"],
    "global_batch_size": ["global_batch_size=1.5"],
    "seed": ["seed=-3"],
    "optimizer": ["optimizer=adamw"],
    "optimizer.name": ["optimizer.name=mouon"],
    "optimizer.lr": ["optimizer.lr=fast"],
    "'lr'": ["optimizer.lr=-0.1"],
    "optimizer.betas": ["optimizer={name: adamw, betas: [[0.9], 0.9]}"],
    "'betas'": ["optimizer={name: adamw, betas: [0.9]}"],
    "'inner'": ["optimizer={name: lookahead, inner: soap}"],
    "soapp": ["optimizer={name: lookahead, inner: {name: soapp}}"],
    "group_overrides": ["optimizer.group_overrides=[{params: [nothing], opts: {lr: 1}}]"],
    "scheduler": ["scheduler=cosine"],
    "scheduler.type": ["scheduler.type=cosine"],
    "scheduler.warmup": ["scheduler.warmup=soon"],
    "decay_fraction": ["scheduler.decay_fraction=3"],
    "max_grad_norm": ["max_grad_norm=-1"],
    "precision": ["precision=float16"],
    "compile": ["compile=perhaps"],
    "parallelism.data": ["parallelism.data=zero3"],
    "parallelism.pipeline": ["parallelism.pipeline=2"],
    "sources.first.path": ["sources.first.path=/nowhere/at/all"],
    "sources.first.builtin": ["sources.first={builtin: perl-code}"],
    "sources.first.url": ["sources.first={url: x}"],
    "stages": ["stages=[]"],
    "stages.0.tokens": ["stages.0.tokens=-5"],
    "stages.0.name": ["stages.0.name=a/b"],
    "stages.0.mixture.third": ["stages.0.mixture.third=1"],
    "stages.0.mixture.first": ["stages.0.mixture.first={weight: 1, tokens: 3}"],
    "stages.0.mixture": ["stages.0.mixture={first: {weight: 1, max_repetitions: 1}}", "+long"],
    "stages.0.mixture.first.tokens": [
        "stages.0.mixture={first: {tokens: 300000, max_repetitions: 1}, second: 1}",
        "+long",
    ],
    "stages.1.lr_scale": ["stages.1.lr_scale=.nan"],
    "stages.1.warmup": ["stages.1.warmup=-1"],
    "stages.1.optimizer.name": ["stages.1.optimizer={name: sopa}"],
    "stages.1.optimizer": ["stages.1.optimizer={name: olmo_core.muon}"],
    "stages.1.scheduler.type": ["stages.1.scheduler={type: never}"],
    "stages.1.sequence_length": ["stages.1.sequence_length=0"],
    "stages.1.rank_microbatch_size": ["stages.1.sequence_length=48"],
    "evaluation.tokens": ["evaluation.tokens=3"],
    "evaluation.every": ["evaluation.every=0"],
    "checkpoint.keep": ["checkpoint.keep=0"],
    "optimizer_metrics": ["optimizer_metrics={}", "optimizer={name: adamw}"],
    "warm_start.path": ["warm_start={path: /nowhere}"],
    "warm_start.optimizer_state": ["warm_start={path: x, optimizer: {name: adamw}}"],
    "wandb": ["wandb={projct: x}"],
    "cache": ["cache=/proc/nothing"],
    "output": ["output=/proc/nothing"],
    "nowhere": ["name=${nowhere}"],
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_is_one_paragraph_that_names_the_key(key, call, tmp_path):
    changes: Dict[str, Any] = {"output": str(tmp_path / "run")}
    spec = {**tiny_spec(tmp_path), **changes}
    overrides = MISTAKES[key]
    if "+long" in overrides:
        spec["stages"][0]["tokens"] = 1_024_000
    path = write_spec(tmp_path / "spec.yaml", spec)
    arguments = [str(path), *(o for o in overrides if o != "+long")]
    code, out, err = call("pretrain", *arguments)
    assert code == 2
    said = (out + err).strip()
    assert key in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    assert not list(Path(tmp_path / "run").glob("stages/*/step*"))


def test_there_are_forty_mistakes():
    assert len(MISTAKES) >= 40
