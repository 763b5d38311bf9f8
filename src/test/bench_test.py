"""
What the bench reports. No test looks at how fast anything is.
"""

import io
import json
import os
import re
import statistics
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Dict, Tuple

import pytest
import torch
from olmo_core.exceptions import OLMoConfigurationError
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from olmo_optim_ext import bench, list_optimizers, optimizer_info
from olmo_optim_ext.bench import (
    EXT_MUON,
    FOREACH,
    FUSED,
    TORCH_MUON,
    BenchResult,
    Quartiles,
    limit_seconds,
    ratios,
    run_bench,
    to_json,
    to_table,
)
from olmo_optim_ext.linalg.polar import newton_schulz_flops

TINY: Dict[str, Any] = dict(
    model="olmo2_1M", n_layers=1, vocab_size=64, rounds=2, warmup=1, min_side=12, probe_bytes=4096
)

BARE: Dict[str, Any] = dict(
    matrices="16x24,24x16:2", rounds=2, warmup=1, min_side=12, probe_bytes=4096, compile=False
)


@pytest.fixture(scope="module")
def result() -> BenchResult:
    return run_bench(["ext_adamw", "muon"], compile=False, **TINY)


@pytest.fixture(scope="module")
def bare() -> BenchResult:
    """Two optimizers with fields and one without, on matrices alone."""
    return run_bench([DION, NOISE, "muon_orthonoise"], **BARE)


DION = "ext_dion:rank_fraction=0.25,orthonormalization=qr"
NOISE = "muon_orthonoise:rank_threshold=null,alpha=2e-2,adamw_betas=[0.8,0.9]"


# Arithmetic


def test_ratios_are_taken_within_a_round():
    # The ratio of the medians would be 1; and 1 too, were rounds paired in another order.
    assert ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == Quartiles(2, 2, 2)
    assert ratios([1.0, 6.0, 5.0, 2.0, 12.0], [1.0, 2.0, 1.0, 1.0, 3.0]) == Quartiles(2, 3, 4)


def test_ratios_of_different_rounds_are_refused():
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        ratios([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_limit_is_memory_and_then_products():
    assert limit_seconds(600, 0.0, [100.0, 200.0], [1.0, 1.0]) == [6.0, 3.0]
    assert limit_seconds(600, 80.0, [100.0, 200.0], [10.0, 20.0]) == [14.0, 7.0]


# Result


def test_every_contestant_has_a_row(result: BenchResult):
    rows = [(row.name, row.mode, set(row.versus)) for row in result.steps]
    assert rows == [
        ("ext_adamw", "eager", {FUSED, FOREACH}),
        ("ext_muon", "eager", {FUSED, TORCH_MUON}),
        (FUSED, "", {TORCH_MUON, EXT_MUON}),
        (FOREACH, "", {FUSED}),
        (TORCH_MUON, "", {FUSED, EXT_MUON}),
    ]
    for row in result.steps:
        assert len(row.times) == TINY["rounds"]
        assert row.seconds.median == pytest.approx(statistics.median(row.times))
        assert 0 < row.share_of_limit.lower <= row.share_of_limit.upper
    assert result.settings["rounds"] == 2 and result.machine["torch"] == torch.__version__


def test_ratios_are_those_of_the_recorded_times(result: BenchResult):
    # Torch's rows of the last optimizer share its rounds.
    rows = {row.name: row for row in result.steps}
    assert rows["ext_muon"].versus[TORCH_MUON] == ratios(
        rows["ext_muon"].times, rows[TORCH_MUON].times
    )


def test_bytes_and_flops_follow_from_the_model(result: BenchResult):
    rows = {row.name: row for row in result.steps}
    n = result.model["parameters"]
    assert sum(_numel(s) * k for s, k in result.model["shapes"].items()) == n
    tensors = result.model["tensors"]
    # AdamW reads p, g, m, v and writes p, m, v; step counters and the gate are small change.
    assert rows[FOREACH].bytes_moved == 7 * 4 * n + 2 * 4 * tensors
    assert 0 <= rows["ext_adamw"].bytes_moved - rows[FOREACH].bytes_moved <= 2**15
    matrices = {s: k for s, k in result.model["shapes"].items() if "x" in s and "64" not in s}
    sides = [(*map(int, s.split("x")), k) for s, k in matrices.items()]
    flops = sum(newton_schulz_flops(n_rows, n_cols) * k for n_rows, n_cols, k in sides)
    assert flops > 0
    assert rows["ext_muon"].flops == rows[TORCH_MUON].flops == flops
    assert rows["ext_adamw"].flops == rows[FUSED].flops == 0
    # One buffer for a matrix instead of two, and no counter.
    saved = 2 * 4 * sum((_numel(s) + 1) * k for s, k in matrices.items())
    assert rows[TORCH_MUON].bytes_moved == rows[FOREACH].bytes_moved - saved


def _numel(shape: str) -> int:
    return int(torch.Size(map(int, shape.split("x"))).numel())


def test_shares_are_the_least_time_over_the_time(monkeypatch):
    def seconds(contestant: Any, device: torch.device) -> float:
        contestant.prepare()
        contestant.run()
        return {bench._Bandwidth: 1.0, bench._Gemm: 2.0, bench._Steps: 4.0}.get(
            type(contestant), 8.0
        )

    monkeypatch.setattr(bench, "_seconds", seconds)
    result = run_bench(["ext_muon"], compile=False, **TINY)
    row, alone = result.steps[0], result.newton_schulz[0]
    bandwidth = 5 * TINY["probe_bytes"]
    rate = 4 * 2 * 1024**3 / 2.0
    assert result.bandwidth.median == bandwidth and result.gemm.median == rate
    assert row.share_of_limit.median == pytest.approx(
        (row.bytes_moved / bandwidth + row.flops / rate) / 4.0
    )
    assert alone.share_of_gemm.median == pytest.approx(alone.flops / 8.0 / rate)


def test_newton_schulz_is_timed_once_for_each_shape_of_a_matrix(result: BenchResult):
    shapes = [(each.rows, each.cols) for each in result.newton_schulz]
    matrices = {s for s in result.model["shapes"] if "x" in s and "64" not in s}
    expected = sorted(tuple(map(int, s.split("x"))) for s in matrices)
    assert shapes == [shape for shape in expected if min(shape) >= TINY["min_side"]] != []
    for each in result.newton_schulz:
        assert each.flops == newton_schulz_flops(each.rows, each.cols)


def test_json_holds_the_whole_result(result: BenchResult):
    assert json.loads(to_json(result)) == _with_lists(asdict(result))


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(each) for key, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, (list, tuple)) else value


def test_the_table_names_everything_in_80_columns(result: BenchResult):
    text = _printed(result)
    for row in result.steps:
        assert any(
            line.startswith(row.name) and f"{row.seconds.median * 1e3:.1f}" in line
            for line in text.splitlines()
        )
    for each in result.newton_schulz:
        assert f"{each.rows}x{each.cols}" in text
    assert "No GPU was measured" in text


def test_the_table_shows_ratios_and_compilations(result: BenchResult):
    row = replace(
        result.steps[0],
        mode="compiled",
        compilations={"update": 1, "sums": 2},
        versus={FUSED: Quartiles(1.25, 1.5, 1.75), FOREACH: Quartiles(0.1, 0.2, 0.3)},
        share_of_limit=Quartiles(0.7, 0.8, 0.9),
        seconds=Quartiles(0.001, 0.002, 0.003),
    )
    line = next(x for x in _printed(replace(result, steps=[row])).splitlines() if "ext" in x)
    assert line.split() == ("ext_adamw compiled 2.0 1.5 1.25-1.75 0.2 0.1-0.3 80% 1+2".split())


def test_the_table_has_room_for_long_names_and_values(bare: BenchResult):
    spread, seconds = Quartiles(0.9812, 0.9851, 0.9944), Quartiles(1.1, 1.2, 1.3)
    versus = {FUSED: Quartiles(7.0, 7.0, 7.0), TORCH_MUON: spread, EXT_MUON: spread}
    steps = [
        replace(row, mode="compiled", versus=versus, seconds=seconds, compilations={"a": 1, "b": 1})
        for row in bare.steps
    ]
    text = _printed(replace(bare, steps=steps))
    assert "…" not in text
    lines = [line.strip() for line in text.splitlines()]
    header = next(line for line in lines if line.startswith("optimizer"))
    # The fused AdamW's are in the JSON.
    assert f"x {FUSED}" not in header
    assert header.index(f"x {EXT_MUON}") < header.index(f"x {TORCH_MUON}")
    figures = "compiled 1200.0 0.99 0.98-0.99 0.99 0.98-0.99".split()
    for name in ("ext_dion", "muon_orthonoise"):
        assert any(line.split()[:7] == [name, *figures] for line in lines)
    for field in ("rank_fraction=0.25", "orthonormalization=qr", "adamw_betas=[0.8,0.9]"):
        assert field in re.sub(r"\s", "", text)


def test_the_title_says_what_was_stepped(result: BenchResult, bare: BenchResult):
    assert _printed(result).startswith("olmo2_1M, 1 layers, 0.0M parameters")
    assert _printed(bare).startswith("1 of 16x24, 2 of 24x16, 0.0M parameters in 3 tensors.")


def test_a_name_in_brackets_is_no_markup(bare: BenchResult):
    name = "ext_muon:group_overrides=[{params: [red], opts: {}}]"
    text = _printed(replace(bare, steps=[replace(bare.steps[0], name=name)]))
    assert "[red]" in re.sub(r"\s", "", text)


def _printed(result: BenchResult) -> str:
    text = io.StringIO()
    Console(width=80, file=text).print(to_table(result))
    return text.getvalue()


@pytest.mark.parametrize(
    "name", [n for n in list_optimizers() if not {*optimizer_info(n).needs} & {*bench._NOT_ALONE}]
)
def test_every_optimizer_of_the_catalogue_runs(name: str):
    rows = run_bench([name], compile=False, **TINY).steps
    assert rows[0].name == name


def test_each_spec_has_a_row_of_its_own(bare: BenchResult):
    rows = [(row.name, row.mode, set(row.versus)) for row in bare.steps]
    everything = {FUSED, TORCH_MUON, EXT_MUON}
    assert rows == [
        (DION, "eager", everything),
        (NOISE, "eager", everything),
        ("muon_orthonoise", "eager", everything),
        (FUSED, "", everything - {FUSED}),
        (TORCH_MUON, "", everything - {TORCH_MUON}),
        (EXT_MUON, "eager", everything - {EXT_MUON}),
    ]
    times = {row.name: row.times for row in bare.steps}
    versus = bare.steps[2].versus[EXT_MUON]  # the last, whose rounds the others' rows show
    assert versus == ratios(times["muon_orthonoise"], times[EXT_MUON])


def test_ext_muon_is_shown_once():
    names = [row.name for row in run_bench(["scion", "muon", "ext_muon"], **BARE).steps]
    assert names == ["scion", EXT_MUON, FUSED, TORCH_MUON]


def test_the_fields_of_a_spec_reach_the_optimizer():
    (noise, dion), _ = bench._specs([NOISE, "dion:skip_step=false,group_overrides=[{params: [a, b],"
                                     " opts: {lr: 0.5, weight_decay: 0}}]"])  # fmt: skip
    config: Any = noise.config
    assert (config.rank_threshold, config.alpha, config.adamw_betas) == (None, 0.02, (0.8, 0.9))
    assert config.skip_step
    assert dion.name.startswith("ext_dion:skip_step=false,") and not dion.config.skip_step
    (override,) = dion.config.group_overrides or []
    assert override.params == ["a", "b"] and override.opts == {"lr": 0.5, "weight_decay": 0}


def test_bare_matrices_have_their_shapes(bare: BenchResult):
    assert bare.model == {
        "parameters": 3 * 16 * 24,
        "tensors": 3,
        "shapes": {"16x24": 1, "24x16": 2},
    }
    assert [(each.rows, each.cols) for each in bare.newton_schulz] == [(16, 24), (24, 16)]
    flops = newton_schulz_flops(16, 24) + 2 * newton_schulz_flops(24, 16)
    rows = {row.name: row for row in bare.steps}
    assert rows[TORCH_MUON].flops == rows[EXT_MUON].flops == flops
    # The outputs of 24x16 and the inputs of 16x24 are orthonormal, in a quarter of the rank.
    assert rows[DION].flops == 3 * (8 * 16 * 24 * 4 + 4 * 24 * 4**2)


def test_bare_matrices_do_for_single_coordinates():
    assert [row.name for row in run_bench(["ext_adamw"], **BARE).steps] == [
        "ext_adamw",
        FUSED,
        FOREACH,
    ]


@pytest.mark.parametrize("side", ["longer", "inputs", "outputs"])
def test_the_flops_of_dion_are_those_of_its_step(side: str):
    (spec, other), _ = bench._specs(
        [
            f"dion:rank_fraction=0.3,orthonormal_side={side},orthonormalization={method}"
            for method in ("qr", "rcqr")
        ]
    )
    model = bench._Model(bench._Matrices(((16, 24), (24, 16))), torch.device("cpu")).copy()
    optim = spec.build(model, compiled=False)
    # The counter knows products, but none in place, and no QR.
    in_place = {torch.ops.aten.addmm_: lambda x, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        optim.step()
    r = 5
    orthonormal = {"longer": 24 + 24, "inputs": 24 + 16, "outputs": 16 + 24}[side]
    flops = spec.flops(model, optim)
    check = 4 * orthonormal * r  # whether P is orthonormal; left out of the limit
    assert flops == counter.get_total_flops() - check + 4 * orthonormal * r**2
    assert (
        other.flops(model, other.build(model, compiled=False)) == flops + 2.5 * orthonormal * r**2
    )


def test_flops_are_those_of_the_blocks_of_a_matrix():
    (whole, halves), _ = bench._specs(
        ["muon", "muon:group_overrides=[{params: ['*'], opts: {row_blocks: 2}}]"]
    )
    model = bench._Model(bench._Matrices(((32, 16),)), torch.device("cpu")).copy()
    assert whole.flops(model, whole.build(model, False)) == newton_schulz_flops(32, 16)
    assert halves.flops(model, halves.build(model, False)) == 2 * newton_schulz_flops(16, 16)


def test_a_compiled_rule_is_compiled_once_for_all_shapes():
    # What the first has compiled must neither serve the second nor count for it.
    for row in run_bench(["ext_adamw", "ext_muon"], **TINY).steps[1:4:2]:
        assert row.mode == "compiled"
        assert row.compilations is not None and list(row.compilations.values()) == [1]


def test_compilations_are_counted_by_function():
    torch._dynamo.reset()
    bench.dynamo_utils.clear_compilation_metrics()

    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    compiled = torch.compile(twice, backend="eager", dynamic=False)
    for n in (3, 4, 4):
        compiled(torch.ones(n))
    assert bench._compilations() == {"twice": 2}


def test_the_gate_is_fed_and_skips_nothing():
    torch.manual_seed(0)
    model = bench._Model(bench._model_config("olmo2_1M", 1, 64), torch.device("cpu"))
    copy = model.copy()
    (spec,), _ = bench._specs(["ext_adamw"])
    steps = bench._Steps(spec.build(copy, compiled=False))
    weight = next(copy.parameters())
    for _ in range(200):  # longer than the window over which spikes are judged
        before = weight.clone()
        steps.prepare()
        steps.run()
        assert not torch.equal(weight, before)


@pytest.mark.parametrize("load,busy", [((2.25, 0.0, 0.0), True), ((0.1, 3.0, 3.0), False)])
def test_a_busy_machine_is_noted(load: Tuple[float, ...], busy: bool, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: load)
    notes = run_bench(["ext_adamw"], compile=False, **TINY).notes
    assert any("a load of 2.2" in note for note in notes) == busy


def test_threads_are_put_back():
    before = torch.get_num_threads()
    result = run_bench(["ext_adamw"], compile=False, threads=before + 1, **TINY)
    assert result.machine["threads"] == before + 1
    assert torch.get_num_threads() == before


# Arguments


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"names": ["sopa"]}, "names: there is no optimizer 'sopa'"),
        ({"rounds": 1}, "rounds: 1 .* >= 2"),
        ({"warmup": 0}, "warmup: 0 .* >= 1"),
        ({"threads": 0}, "threads: 0 .* >= 1"),
        ({"n_layers": 0}, "layers: 0 .* >= 1"),
        ({"model": "olmo9"}, "model: .*'olmo9'"),
        ({"model": "llama_like"}, "model: .*'llama_like'"),
        ({"device": "abacus"}, "device: 'abacus' .*cpu"),
        ({"matrices": "8x8"}, "matrices: '8x8' .* model and layers and vocab_size"),
        ({"names": ["muon:lrr=1"]}, "names: 'ext_muon:lrr=1': lrr: .*mean lr"),
        ({"names": ["muon:lr=x"]}, "names: 'ext_muon:lr=x': lr: 'x' .* a number"),
        ({"names": ["muon:lr=-1"]}, "names: 'ext_muon:lr=-1': .*'lr' is -1.0, allowed"),
        ({"names": ["muon:lr"]}, "names: 'ext_muon:lr': 'lr' .* FIELD=VALUE"),
        ({"names": ["muon:"]}, "names: 'ext_muon:': '' .* FIELD=VALUE"),
        ({"names": ["muon:=1"]}, "names: 'ext_muon:=1': '=1' .* FIELD=VALUE"),
        ({"names": ["adamw:betas=0.9,0.95"]}, "'0.95' .* FIELD=VALUE, with lists in brackets"),
        ({"names": ["adamw:betas=[0.9,lr=1"]}, "betas: .*0.9,lr=1' is no YAML"),
        ({"names": ["muon:lr=${x}"]}, r"lr: '\$\{x\}' is no YAML"),
        ({"names": ["muon:lr=1,lr=2"]}, "'lr' is given twice"),
        ({"names": ["muon:compile=true"]}, "'compile' is the bench's to set"),
        ({"names": ["sopa:lr=1"]}, "names: there is no optimizer 'sopa'"),
        ({"names": ["adamw", "muon:row_blocks=3"]}, "names: 'ext_muon:row_blocks=3': "),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: Dict[str, Any], message: str):
    with pytest.raises(OLMoConfigurationError, match=message):
        run_bench(**{"names": ["ext_adamw"], "compile": False, **TINY, **arguments})


@pytest.mark.parametrize("given", ["model", "n_layers", "vocab_size"])
def test_matrices_take_the_place_of_a_model(given: str):
    name = given.removeprefix("n_")
    with pytest.raises(OLMoConfigurationError, match=f"'16x24.*' is not allowed with {name}, "):
        run_bench(["ext_adamw"], **BARE, **{given: TINY[given]})


@pytest.mark.parametrize("shape", ["", "8", "8x", "8x8x8", "8x8:", "8x8:0", "1x8", "-8x8", "8.0x8"])
def test_shapes_that_are_none_are_named(shape: str):
    with pytest.raises(OLMoConfigurationError, match=f"matrices: '{shape}' .* OUTxIN:COUNT"):
        run_bench(["ext_adamw"], **{**BARE, "matrices": f"16x24,{shape}"})


@pytest.fixture
def needy(monkeypatch):
    """An optimizer that needs a second pass, beside one that does not."""
    adamw = bench.optimizer_info("ext_adamw")
    infos = {"needy": replace(adamw, needs=("second_pass",)), "ext_adamw": adamw}
    monkeypatch.setattr(bench, "optimizer_info", infos.__getitem__)
    monkeypatch.setattr(bench, "list_optimizers", lambda: list(infos))


def test_what_cannot_step_alone_is_left_out(needy):
    result = run_bench(compile=False, **TINY)
    assert [row.name for row in result.steps if row.mode] == ["ext_adamw"]
    assert "needy was left out: it cannot step without its second_pass." in result.notes


def test_an_estimate_of_the_hessian_is_given_and_not_timed():
    result = run_bench(["sophia"], compile=False, **TINY)
    assert "sophia" in [row.name for row in result.steps]
    assert "sophia: a step without its estimates of the Hessian." in result.notes


def test_what_cannot_step_alone_is_refused_by_name(needy):
    with pytest.raises(OLMoConfigurationError, match="names: 'needy' .*second_pass"):
        run_bench(["needy"], **TINY)


@pytest.fixture
def call(call, monkeypatch):
    monkeypatch.setattr(bench, "run_bench", partial(run_bench, probe_bytes=4096))
    return partial(call, "bench")


def test_the_command_prints_and_saves(call, tmp_path):
    output = tmp_path / "new" / "bench.json"
    arguments = "adamw --model olmo2_1M --layers 1 --vocab-size 64 --steps 2 --no-compile"
    code, out, _ = call(*arguments.split(), "--output", str(output))
    assert code == 0
    assert "ext_adamw" in out and str(output) in out.replace("\n", "")
    saved = json.loads(output.read_text())
    assert [row["name"] for row in saved["steps"]] == ["ext_adamw", FUSED, FOREACH]


def test_the_command_takes_fields_and_matrices(call, tmp_path):
    output = tmp_path / "bench.json"
    options = ["--matrices", "16x24:2", "--steps", "2", "--no-compile", "--output", str(output)]
    code, out, _ = call("muon:adamw_betas=[0.8,0.9],lr=1e-3", *options)
    assert code == 0 and "2 of 16x24" in out and "adamw_betas=[0.8,0.9]" in out
    name = json.loads(output.read_text())["steps"][0]["name"]
    assert name == "ext_muon:adamw_betas=[0.8,0.9],lr=1e-3"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["sopa"], "names: there is no optimizer 'sopa'"),
        (["adamw:lrr=1"], "names: 'ext_adamw:lrr=1': lrr: "),
        (["adamw:betas=[0.9"], "names: .*betas: '.0.9' is no YAML"),
        (["adamw", "--matrices", "8x"], "matrices: '8x'"),
        (["adamw", "--matrices", "8x8", "--layers", "2"], "'8x8' is not allowed with layers"),
        (["adamw", "--rounds", "1"], "--rounds"),
        (["adamw", "--model", "olmo9"], "model: .*olmo9"),
        (["adamw", "--device", "abacus"], "device: 'abacus'"),
        (["adamw", "--output", "/proc/nothing/b.json"], "output: /proc/nothing/b.json cannot"),
        (["adamw", "--output", "{tmp}"], "output: .* cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, call, tmp_path):
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "b.json")]
    code, out, err = call(*(each.format(tmp=tmp_path) for each in arguments), *output)
    assert code == 2
    assert re.search(message, out + err)
    assert len((out + err).strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
