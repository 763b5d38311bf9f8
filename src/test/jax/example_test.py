"""
The example trains both of its models, draws them, and refuses what it can't do.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

EXAMPLE = Path(__file__).parents[3] / "examples" / "jax_gpt.py"
STEPS = 20
VOCAB_SIZE = 258


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("jax_gpt", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load()


def test_both_learn_from_the_same_start_and_are_drawn(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "MIXTURE", {"python-code": 1.0})  # The docs take longer to read.
    picture = tmp_path / "curves.png"
    sizes = dict(width=32, layers=1, context=32, batch_size=8)
    curves = example.run(STEPS, picture, 0, 0.25, **sizes)
    assert list(curves) == ["Dion", "AdamW"]
    assert curves["Dion"].losses[0] == pytest.approx(curves["AdamW"].losses[0], rel=1e-6)
    assert curves["Dion"].losses[-1] != curves["AdamW"].losses[-1]
    for curve in curves.values():
        assert len(curve.losses) == STEPS
        assert [done for done, _ in curve.held_out] == [4, 8, 12, 16, 20]
        final = curve.held_out[-1][1]
        assert math.isfinite(final) and final < math.log(VOCAB_SIZE) - 0.5
    assert imread(picture).std() > 0.05

    out = capsys.readouterr().out
    rules = {words[0]: words[-1] for words in map(str.split, out.splitlines()) if "/" in words[0]}
    assert {name for name, rule in rules.items() if rule == "Dion"} == {
        f"layer_*/{name}/kernel"
        for name in ("query", "key", "value", "attention_out", "up", "down")
    }
    for name, curve in curves.items():
        assert f"{name} {curve.held_out[-1][1]:.3f}" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--steps", "0"], "10"),
        (["--rank-fraction", "nan"], "must be in (0, 1]"),
        (["--rank-fraction", "0"], "must be in (0, 1]"),
        (["--output", "curves.txt"], "must end in .png"),
        (["--output", f"{EXAMPLE}/curves.png"], "jax_gpt.py"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(arguments, sentence, example, monkeypatch):
    monkeypatch.setattr(example, "run", lambda *_: pytest.fail("it ran"))
    result = CliRunner().invoke(example.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_without_flax_it_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "flax.linen", raising=False)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(
        SystemExit, match=r"needs flax\S*: pip install 'olmo-optim-ext\[jax-example\]'"
    ):
        load()
