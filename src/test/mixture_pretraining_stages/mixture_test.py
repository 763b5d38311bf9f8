"""
Mixtures: what a stage takes of each source, in which order, and what was drawn.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from olmo_core.data import DataCollator
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.mixture import (
    MixtureLoader,
    build_mixture,
    drawn_tokens,
    share_out,
)
from mixture_pretraining_stages.plans import StagePlan, plan_stages
from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.sources import SourceSpec, prepare_source
from mixture_pretraining_stages.tokenizers import load_tokenizer

from .spec import tiny_spec, write_spec, write_text

SIZES = {"first": 10_000, "second": 1_000}


def plan_of(folder: Path, mixture: Dict[str, Any], tokens: int = 25_600, **stage: Any) -> StagePlan:
    stages = [{"name": "one", "tokens": tokens, "mixture": mixture, **stage}]
    spec = load_spec(write_spec(folder / "spec.yaml", tiny_spec(folder, stages=stages)))
    spec.check()
    return plan_stages(spec)[0]


def shares(folder: Path, mixture: Dict[str, Any], tokens: int = 25_600) -> Dict[str, List[float]]:
    plan = plan_of(folder, mixture, tokens)
    return {
        share.source: [share.asked, share.planned, share.repetitions]
        for share in share_out(plan, SIZES)
    }


def test_weights_are_shares_of_the_tokens(tmp_path):
    got = shares(tmp_path, {"first": 3, "second": {"weight": 1}})
    assert got["first"] == pytest.approx([0.75, 0.75, 1.92])
    assert got["second"] == pytest.approx([0.25, 0.25, 6.4])


def test_tokens_and_repetitions_are_fixed_and_weights_share_the_rest(tmp_path):
    got = shares(tmp_path, {"first": 1, "second": {"repetitions": 2.56}})
    assert got == {
        "first": pytest.approx([0.9, 0.9, 2.304]),
        "second": pytest.approx([0.1, 0.1, 2.56]),
    }
    got = shares(tmp_path, {"first": {"tokens": 20_480}, "second": 5})
    assert got["first"] == pytest.approx([0.8, 0.8, 2.048])
    assert got["second"][1] == pytest.approx(0.2)


def test_what_a_limit_on_repetitions_keeps_back_goes_to_the_other_weights(tmp_path):
    got = shares(tmp_path, {"first": 1, "second": {"weight": 1, "max_repetitions": 2}})
    assert got["second"] == pytest.approx([0.5, 2000 / 25_600, 2])
    assert got["first"] == pytest.approx([0.5, 23_600 / 25_600, 2.36])


@pytest.mark.parametrize(
    "mixture,message",
    [
        (
            {
                "first": {"weight": 1, "max_repetitions": 1},
                "second": {"weight": 1, "max_repetitions": 1},
            },
            "stages.0.mixture: with max_repetitions the sources have 11,000 tokens for 25,600",
        ),
        (
            {"first": {"tokens": 30_000}},
            "stages.0.mixture: tokens and repetitions are 30,000 tokens in all, .* the 25,600 of",
        ),
        (
            {"first": {"tokens": 30_000}, "second": 1},
            "stages.0.mixture: .*30,000.* at most the 25,600",
        ),
        (
            {"first": {"tokens": 25_600}, "second": 1},
            "stages.0.mixture.second: .*leave 0 of the stage's 25,600 .*a sequence of 32",
        ),
        (
            {"second": {"tokens": 12_800, "max_repetitions": 4}, "first": 1},
            "stages.0.mixture.second.tokens: 12,800 tokens are 12.80 times .*max_repetitions is 4",
        ),
        (
            {"first": 1, "second": {"repetitions": 0.001}},
            "stages.0.mixture.second: 1.0 tokens are not allowed.*a sequence of 32",
        ),
    ],
    ids=[
        "too little",
        "too much",
        "nothing left",
        "weights of nothing",
        "above the limit",
        "less than a sequence",
    ],
)
def test_amounts_that_do_not_add_up_are_refused(mixture, message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message):
        shares(tmp_path, mixture)


@pytest.mark.parametrize(
    "mixture,message",
    [
        ({"first": {"weight": 1, "tokens": 5}}, "stages.0.mixture.first: .*weight and tokens"),
        ({"first": {}}, "stages.0.mixture.first: it has no amount.*exactly one of weight"),
        ({"first": {"weight": -1}}, "stages.0.mixture.first.weight: -1.0 .*> 0"),
        ({"first": {"repetitions": float("inf")}}, "stages.0.mixture.first.repetitions: inf"),
        ({"first": {"weight": 1, "max_repetitions": 0.5}}, "max_repetitions: 0.5 .*>= 1"),
        ({"first": {"repetitions": 1, "max_repetitions": 2}}, "max_repetitions: 2.0.*repetitions"),
        ({"first": {"wieght": 1}}, "stages.0.mixture.first"),
        ({"first": "much"}, "stages.0.mixture.first: 'much'"),
    ],
    ids=str,
)
def test_a_bad_amount_is_named(mixture, message, tmp_path):
    with pytest.raises(OLMoConfigurationError, match=message):
        plan_of(tmp_path, mixture)


def loader_of(folder: Path, mixture: Dict[str, Any], tokens: int, **options: Any) -> MixtureLoader:
    """With 256 tokens a batch in sequences of 32."""
    tokenizer = load_tokenizer("bytes")
    plan = plan_of(folder, mixture, tokens)
    sources = {}
    for seed, name in enumerate(mixture):
        text = write_text(folder / f"text-{name}", seed, documents=20 if seed else 300)
        spec = SourceSpec(path=str(text))
        sources[name] = prepare_source(name, spec, tokenizer, folder / "cache")
    its_shares = share_out(plan, {name: s.train_tokens for name, s in sources.items()})
    instances = {n: s.train_instances(plan.sequence_length, folder) for n, s in sources.items()}
    loader = MixtureLoader(
        build_mixture(plan, its_shares, instances, folder / "work", seed=5),
        collator=DataCollator(pad_token_id=tokenizer.config.pad_token_id),
        tokenizer=tokenizer.config,
        work_dir=folder / "work",
        global_batch_size=plan.global_batch_size,
        seed=5,
        display_source_visualization=False,
        **options,
    )
    loader.reshuffle(epoch=1)
    return loader


def test_at_each_moment_the_drawn_mixture_is_the_asked_one_but_for_an_instance(tmp_path):
    loader = loader_of(tmp_path, {"first": 0.7, "second": 0.3}, tokens=256_000)
    drawn = np.zeros(2)
    for batch in loader:
        drawn += list(loader.count(batch).values())
        # A stratum of either side of the border may not have been drawn from.
        assert abs(drawn[0] - 0.7 * drawn.sum()) <= 2 * 32
    assert drawn.sum() >= 256_000


def test_nothing_of_a_source_comes_again_before_all_of_it_has(tmp_path):
    limited = {"weight": 1, "max_repetitions": 2}
    loader = loader_of(tmp_path, {"first": 1, "second": limited}, tokens=51_200)
    end = loader.source_ends[0]
    drawn = [
        tuple(ids.tolist())
        for batch in loader
        for index, ids in zip(batch["index"], batch["input_ids"])
        if int(index) >= end
    ]
    once = loader.pass_sizes[1]
    assert 1.9 * once < len(drawn)
    assert len(set(drawn[:once])) == len(set(drawn)) == once
    assert max(Counter(drawn[: 2 * once]).values()) == 2


def test_the_counted_tokens_are_those_of_the_source(tmp_path):
    loader = loader_of(tmp_path, {"first": 1, "second": 1}, tokens=2560)
    for batch in loader:
        counted = loader.count(batch)
        assert sum(counted.values()) == batch["input_ids"].numel() == 256
        of_second = 0
        for index, ids in zip(batch["index"].tolist(), batch["input_ids"]):
            first, second = loader.sources[0].sampled_sources  # type: ignore[attr-defined]
            source, offset = (first, 0) if index < len(first) else (second, len(first))
            assert ids.tolist() == np.asarray(source[index - offset]["input_ids"]).tolist()
            of_second += len(ids) * (source is second)
        assert counted["second"] == of_second


def test_two_ranks_draw_together_what_one_draws(tmp_path):
    mixture = {"first": 0.7, "second": 0.3}
    one = [batch["index"].tolist() for batch in loader_of(tmp_path, mixture, tokens=2560)]
    two = [
        [
            b["index"].tolist()
            for b in loader_of(tmp_path, mixture, 2560, dp_world_size=2, dp_rank=r)
        ]
        for r in range(2)
    ]
    assert [sorted(a + b) for a, b in zip(*two)] == [sorted(each) for each in one]
    assert len({index for batch in one for index in batch}) == 8 * len(one)


def test_what_was_drawn_is_counted_by_stage():
    rows = [
        {"step": 1, "stage": "a", "data/x tokens": 192.0, "data/y tokens": 64.0},
        {"step": 2, "stage": "a", "data/x tokens": 128.0, "data/y tokens": 128.0},
        {"step": 3, "stage": "b", "data/x tokens": 256.0},
    ]
    assert drawn_tokens(rows, "a", ["x", "y"]) == {"x": (320.0, 0.625), "y": (192.0, 0.375)}
    assert drawn_tokens(rows, "b", ["x", "y"]) == {"x": (256.0, 1.0), "y": (0.0, 0.0)}
    assert drawn_tokens(rows, "c", ["x", "y"]) == {"x": (0.0, 0.0), "y": (0.0, 0.0)}
