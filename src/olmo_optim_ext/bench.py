"""
How long an optimizer's step takes, against torch's own optimizers and against the limit that the
machine sets.

Machines are noisy, so only ratios are worth reading: every round runs one step of each contestant
in turn, and a ratio is taken within a round. What a step cannot beat is measured in the same
rounds: the bandwidth of memory and the rate of matrix products.
"""

import inspect
import math
import re
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
import torch._dynamo.utils as dynamo_utils
import torch.nn as nn
import yaml
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import SkipStepOptimizer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.optim.optimizer import Optimizer

from mixture_pretraining_stages.decoding import decode_fields

from .bench_report import (
    EXT_MUON,
    FOREACH,
    FUSED,
    TORCH_MUON,
    BenchResult,
    NewtonSchulzRow,
    Quartiles,
    StepRow,
    busy_notes,
    machine_facts,
    notes_on,
    split_outside_brackets,
    to_json,
    to_table,
)
from .catalog import OptimizerInfo, closest, list_optimizers, optimizer_info
from .config import ExtOptimConfig, MatrixOptimConfig
from .elementwise.hessian import HessianOptimizer
from .engine.elementwise import forget_compiled
from .engine.matrix_base import MatrixBase
from .linalg.polar import newton_schulz_flops, polar, uses_gram_form

__all__ = [
    "BenchResult",
    "NewtonSchulzRow",
    "Quartiles",
    "StepRow",
    "check_output",
    "ratios",
    "run_bench",
    "to_json",
    "to_table",
]

_BASELINES = (FUSED, FOREACH, TORCH_MUON, EXT_MUON)

PROBE_BYTES = 512 * 2**20
"""
Size of each of the two arrays of the bandwidth probe: together four times a cache of 256 MiB, as
the STREAM benchmark asks for.
"""

MIN_SIDE = 512
"""Smaller matrices are not timed alone: their products do not reach the machine's rate either."""

_NOT_ALONE = ("second_pass",)
"""Needs, as the catalogue calls them, without which an optimizer cannot step."""

_LEFT_OUT = {"hessian": "its estimates of the Hessian"}
"""What a trainer does for an optimizer that is not timed, by need."""


# Arithmetic


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least two values, by linear interpolation."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(times: Sequence[float], base: Sequence[float]) -> Quartiles:
    """
    The quartiles of ``times[i] / base[i]``, not the ratio of the medians: what slows a round down
    slows both.
    """
    if len(times) != len(base):
        raise ValueError(f"{len(times)} and {len(base)} rounds cannot be compared")
    return quartiles([t / b for t, b in zip(times, base)])


def limit_seconds(
    bytes_moved: int, flops: float, bandwidths: Sequence[float], rates: Sequence[float]
) -> List[float]:
    """
    The least time of a step in each round: what it moves at the measured bandwidth, and then what
    it multiplies at the measured rate.

    :param bandwidths: Bytes a second in each round.
    :param rates: Floating point operations a second in each round.
    """
    return [bytes_moved / b + flops / r for b, r in zip(bandwidths, rates)]


# Contestants


class _Steps:
    """Optimizers that make one step together, and what a trainer does before it."""

    def __init__(self, *optims: Optimizer):
        self.optims = optims
        self._calls = 0

    def prepare(self) -> None:
        self._calls += 1
        # Values that vary, or the gate would take the rounding of their mean for a spike.
        wave = math.sin(self._calls)
        for optim in self.optims:
            for group in optim.param_groups:  # as a schedule does, which must not recompile
                lr = 1e-4 * (1 + 0.1 * wave)
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            if isinstance(optim, SkipStepOptimizer):
                device = optim.param_groups[0]["params"][0].device
                if isinstance(optim, HessianOptimizer) and optim.hessian_updates == 0:
                    optim.update_hessian(tokens=1)
                optim.latest_loss = torch.tensor(3 + 0.01 * wave, device=device)
                optim.latest_grad_norm = torch.tensor(1 + 0.01 * wave, device=device)

    def run(self) -> None:
        for optim in self.optims:
            optim.step()

    def bytes_moved(self) -> int:
        """State that a step does not touch is counted too."""
        total = 0
        for optim in self.optims:
            for group in optim.param_groups:
                for param in group["params"]:
                    state = [s for s in optim.state[param].values() if isinstance(s, torch.Tensor)]
                    total += 3 * param.nbytes + 2 * sum(s.nbytes for s in state)
        return total


class _Probe:
    """A loop without side effects, to be timed."""

    def __init__(self, function: Callable[[], object]):
        self.run = function

    def prepare(self) -> None:
        pass


class _Bandwidth(_Probe):
    """
    Bytes moved by in-place arithmetic: that is how an optimizer writes, whereas a copy also has to
    fetch what it overwrites. It reads three arrays and writes two, AdamW reads four and writes
    three.
    """

    def __init__(self, nbytes: int, device: torch.device):
        a, b = (torch.ones(nbytes // 4, device=device) for _ in range(2))
        self.nbytes = 3 * a.nbytes + 2 * b.nbytes

        def function() -> None:
            a.mul_(0.5)
            a.add_(b, alpha=0.5)

        super().__init__(function)


class _Gemm(_Probe):
    """Square products in the dtype of Newton-Schulz, several to outlast the clock's noise."""

    def __init__(self, device: torch.device):
        side, n = (1024, 4) if device.type == "cpu" else (4096, 16)
        a, b = (torch.randn(side, side, device=device, dtype=_polar_dtype(device)) for _ in "ab")
        self.flops = n * 2 * side**3

        def function() -> None:
            for _ in range(n):
                torch.mm(a, b)

        super().__init__(function)


def _polar_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class _Matrices:
    """A model of nothing but matrices, ``(out, in)``."""

    shapes: Tuple[Tuple[int, int], ...]

    def build(self, init_device: str) -> nn.Module:
        blocks = [
            nn.Linear(n_in, n_out, bias=False, device=init_device) for n_out, n_in in self.shapes
        ]
        return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


class _Model:
    """Copies of a model with gradients in common."""

    def __init__(self, config: Union[TransformerConfig, _Matrices], device: torch.device):
        self._config = config
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        like = list(self.on_meta().parameters())
        self._values = [self._random(param, 0.02) for param in like]
        self._grads = [self._random(param, 1e-2) for param in like]

    def on_meta(self) -> nn.Module:
        return self._config.build(init_device="meta")

    def copy(self) -> nn.Module:
        model = self.on_meta().to_empty(device=self._device)
        for param, value, grad in zip(model.parameters(), self._values, self._grads):
            param.data.copy_(value)
            param.grad = grad
        return model

    def matrix_shapes(self, min_side: int) -> List[Tuple[int, int]]:
        """Distinct shapes of the matrices in blocks, where no side is shorter."""
        named = self.on_meta().named_parameters()
        shapes = {tuple(p.shape) for name, p in named if name.startswith("blocks.")}
        return sorted((s[0], s[1]) for s in shapes if len(s) == 2 and min(s) >= min_side)

    def facts(self) -> Dict[str, Any]:
        shapes: Dict[str, int] = {}
        for value in self._values:
            shape = "x".join(map(str, value.shape))
            shapes[shape] = shapes.get(shape, 0) + 1
        n = sum(value.numel() for value in self._values)
        return {"parameters": n, "tensors": len(self._values), "shapes": shapes}

    def _random(self, like: torch.Tensor, std: float) -> torch.Tensor:
        out = torch.empty(like.shape, device=self._device)
        return out.normal_(std=std, generator=self._generator)


@dataclass(frozen=True)
class _Spec:
    """An optimizer and its fields."""

    name: str
    """Of its row: that of the optimizer, and the fields as they were given."""

    config: ExtOptimConfig

    def build(self, model: nn.Module, compiled: bool) -> Optimizer:
        return replace(self.config, compile=compiled).build(model)

    def matrices(self, model: nn.Module) -> List[str]:
        """The parameters that follow the rule for matrices."""
        rule = self.config.rule_config
        return list(rule.layouts(model)) if isinstance(rule, MatrixOptimConfig) else []

    def flops(self, model: nn.Module, optim: Optimizer) -> float:
        """Of a step, on matrices."""
        rule = self.config.rule_config
        if not isinstance(rule, MatrixOptimConfig):
            return 0.0
        assert isinstance(optim, MatrixBase)
        params = dict(model.named_parameters())
        groups = {id(p): group for group in optim.param_groups for p in group["params"]}
        total = 0.0
        for name, layout in rule.layouts(model).items():
            for block in layout.blocks():
                shape = (block.n_rows, block.n_cols)
                n_out, n_in = shape[::-1] if layout.in_out else shape
                total += optim.flops(groups[id(params[name])], n_out, n_in)
        return total


class _Contestant(NamedTuple):
    name: str

    mode: str
    """As in :class:`StepRow`."""

    steps: _Steps
    flops: float


def _torch_muon(model: nn.Module, matrices: Sequence[str]) -> _Contestant:
    named = dict(model.named_parameters())
    theirs = [named[name] for name in matrices]
    rest = [param for name, param in named.items() if name not in matrices]
    optims: List[Optimizer] = [torch.optim.Muon(theirs)]
    if rest:
        optims.append(torch.optim.AdamW(rest, fused=True))
    flops = sum(newton_schulz_flops(*param.shape) for param in theirs)
    return _Contestant(TORCH_MUON, "", _Steps(*optims), float(flops))


def _ours(spec: _Spec, model: nn.Module, mode: str) -> _Contestant:
    optim = spec.build(model, compiled=mode == "compiled")
    return _Contestant(spec.name, mode, _Steps(optim), spec.flops(model, optim))


def _contestants(spec: _Spec, model: _Model, modes: Sequence[str]) -> List[_Contestant]:
    """One optimizer in its modes, and what it runs against."""
    out = [_ours(spec, model.copy(), mode) for mode in modes]
    fused = torch.optim.AdamW(model.copy().parameters(), fused=True)
    out.append(_Contestant(FUSED, "", _Steps(fused), 0.0))
    matrices = spec.matrices(model.on_meta())
    if not matrices:
        foreach = torch.optim.AdamW(model.copy().parameters(), foreach=True)
        return [*out, _Contestant(FOREACH, "", _Steps(foreach), 0.0)]
    out.append(_torch_muon(model.copy(), matrices))
    if spec.name != EXT_MUON:
        (muon,), _ = _specs([EXT_MUON])
        out.append(_ours(muon, model.copy(), "eager"))
    return out


# Measuring


class _Timed(NamedTuple):
    first: Dict[str, float]
    """Seconds of the first run."""
    times: Dict[str, List[float]]
    """Seconds of each round."""


def _measure(
    contestants: Mapping[str, Any], rounds: int, warmup: int, device: torch.device
) -> _Timed:
    """Run contestants in turn, each round starting with another one."""
    first = {name: _seconds(contestant, device) for name, contestant in contestants.items()}
    for _ in range(warmup - 1):
        for contestant in contestants.values():
            _seconds(contestant, device)
    names = list(contestants)
    times: Dict[str, List[float]] = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_seconds(contestants[name], device))
    return _Timed(first, times)


def _seconds(contestant: Any, device: torch.device) -> float:
    contestant.prepare()
    _synchronize(device)
    start = time.perf_counter()
    contestant.run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compilations() -> Dict[str, int]:
    counts: Dict[str, int] = {}
    for metrics in dynamo_utils.get_compilation_metrics():
        if metrics.graph_op_count:
            name = str(metrics.co_name)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _bench_one(
    spec: _Spec,
    model: _Model,
    probes: Tuple[_Bandwidth, _Gemm],
    modes: Sequence[str],
    rounds: int,
    warmup: int,
    device: torch.device,
) -> Tuple[List[StepRow], _Timed]:
    """
    One optimizer against others, which are measured again: all that takes part in a round is in
    memory at the same time.

    :returns: Rows of its modes, then of the others; and the times of the two probes.
    """
    # What an earlier optimizer compiled must not count for this one.
    torch._dynamo.reset()
    forget_compiled()
    dynamo_utils.clear_compilation_metrics()
    entries = {f"{each.name} {each.mode}": each for each in _contestants(spec, model, modes)}
    bandwidth, gemm = probes
    running = {key: each.steps for key, each in entries.items()}
    timed = _measure({**running, "bandwidth": bandwidth, "gemm": gemm}, rounds, warmup, device)
    times = timed.times
    bandwidths = [bandwidth.nbytes / t for t in times["bandwidth"]]
    rates = [gemm.flops / t for t in times["gemm"]]
    baselines = {
        each.name: key
        for key, each in entries.items()
        if each.name in _BASELINES and each.mode != "compiled"
    }
    rows = []
    for key, each in entries.items():
        bytes_moved = each.steps.bytes_moved()
        limits = limit_seconds(bytes_moved, each.flops, bandwidths, rates)
        rows.append(
            StepRow(
                name=each.name,
                mode=each.mode,
                seconds=quartiles(times[key]),
                versus={
                    other: ratios(times[key], times[its_key])
                    for other, its_key in baselines.items()
                    if its_key != key
                },
                share_of_limit=ratios(limits, times[key]),
                bytes_moved=bytes_moved,
                flops=each.flops,
                first_step_seconds=timed.first[key],
                compilations=_compilations() if each.mode == "compiled" else None,
                times=times[key],
            )
        )
    return rows, timed


def _bench_newton_schulz(
    shape: Tuple[int, int], gemm: _Gemm, rounds: int, device: torch.device
) -> NewtonSchulzRow:
    dtype = _polar_dtype(device)
    x = torch.randn(1, *shape, device=device, dtype=dtype)
    times = _measure({"polar": _Probe(lambda: polar(x)), "gemm": gemm}, rounds, 1, device).times
    flops = newton_schulz_flops(*shape)
    limits = [flops / gemm.flops * t for t in times["gemm"]]
    return NewtonSchulzRow(
        *shape,
        form="gram" if uses_gram_form(*shape, 5, dtype) else "plain",
        flops=flops,
        seconds=quartiles(times["polar"]),
        share_of_gemm=ratios(limits, times["polar"]),
    )


def run_bench(
    names: Optional[Sequence[str]] = None,
    model: Optional[str] = None,
    n_layers: Optional[int] = None,
    vocab_size: Optional[int] = None,
    matrices: Optional[str] = None,
    rounds: int = 10,
    warmup: int = 2,
    compile: bool = True,
    threads: Optional[int] = None,
    device: str = "cpu",
    min_side: int = MIN_SIDE,
    probe_bytes: int = PROBE_BYTES,
    progress: Callable[[str], object] = lambda message: None,
) -> BenchResult:
    """
    Time the steps of optimizers on the parameters of a model, with random gradients and the gate
    on.

    An optimizer with a rule for single coordinates runs against ``torch.optim.AdamW``, fused and
    foreach; one with a rule for matrices against ``torch.optim.Muon`` on the same matrices, with
    fused AdamW for the rest, against fused AdamW, and against our ``ext_muon``. The limit of a
    step is the time to read parameters, gradients and state and write parameters and state at the
    measured bandwidth, plus the time of its matrix products at the measured rate.

    :param names: Of the catalogue, also with fields: ``"ext_dion:rank_fraction=0.25,lr=0.02"``, in
        which values are YAML. Default are all that can step alone.
    :param model: A factory of OLMo-core's ``TransformerConfig``. The default is ``olmo3_100M``,
        which with four layers has 25M parameters, in matrices of 512x512, 512x2048 and 2048x512.
    :param n_layers: Layers, which are all alike; default is 4.
    :param vocab_size: Rows of the embedding and of the head; default is 8192.
    :param matrices: In place of a model, weights of linear maps alone, as out x in and how many of
        them: ``"1024x4096,4096x1024:2"``.
    :param rounds: Measured steps of each contestant, at least 2.
    :param warmup: Steps of each before, at least 1; the first one compiles.
    :param compile: Measure the compiled rules as well.
    :param threads: Of torch; default is torch's choice.
    :param device: ``cpu`` or ``cuda``.
    :param min_side: Matrices with a smaller side are not timed in Newton-Schulz alone.
    :param probe_bytes: Size of each of the two arrays of the bandwidth probe.
    :param progress: Told what is measured next.

    :raises OLMoConfigurationError: Names the argument, the value and what is allowed.
    """
    _check_at_least("rounds", rounds, 2)
    _check_at_least("warmup", warmup, 1)
    if threads is not None:
        _check_at_least("threads", threads, 1)
    specs, notes = _specs(names)
    place = _device(device)
    config, facts = _what_to_step(model, n_layers, vocab_size, matrices)
    parameters = _Model(config, place)
    for spec in specs:
        _check_built(spec, parameters.on_meta())
    modes = ["eager", "compiled"] if compile else ["eager"]
    ours: List[StepRow] = []
    others: Dict[str, StepRow] = {}
    probe_times: Dict[str, List[float]] = {"bandwidth": [], "gemm": []}
    alone = []
    with _threads(threads):
        machine = machine_facts(place)
        probes = (_Bandwidth(probe_bytes, place), _Gemm(place))
        for spec in specs:
            progress(spec.name)
            rows, timed = _bench_one(spec, parameters, probes, modes, rounds, warmup, place)
            ours += rows[: len(modes)]
            # Measured with each of ours, shown once.
            others.update({row.name: row for row in rows[len(modes) :]})
            for key, seconds in probe_times.items():
                seconds += timed.times[key]
        for shape in parameters.matrix_shapes(min_side):
            progress("newton_schulz {}x{}".format(*shape))
            alone.append(_bench_newton_schulz(shape, probes[1], rounds, place))
    asked = {spec.name for spec in specs}
    return BenchResult(
        machine=machine,
        settings={"rounds": rounds, "warmup": warmup, "probe_bytes": probe_bytes},
        model=facts | parameters.facts(),
        bandwidth=quartiles([probes[0].nbytes / t for t in probe_times["bandwidth"]]),
        gemm=quartiles([probes[1].flops / t for t in probe_times["gemm"]]),
        steps=[*ours, *(row for row in others.values() if row.name not in asked)],
        newton_schulz=alone,
        notes=notes + busy_notes(machine["load_average"]) + notes_on(place),
    )


@contextmanager
def _threads(n: Optional[int]) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Arguments


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise OLMoConfigurationError(f"{name}: {value} is not allowed, allowed is >= {least}")


def _specs(names: Optional[Sequence[str]]) -> Tuple[List[_Spec], List[str]]:
    """The optimizers, each spec once, and a note on those that are left out."""
    specs: Dict[str, _Spec] = {}
    notes = []
    for name in names or list_optimizers():
        name, colon, given = name.partition(":")
        try:
            info = optimizer_info(name)
        except OLMoConfigurationError as error:
            raise OLMoConfigurationError(f"names: {error}") from None
        missing = ", ".join(need for need in info.needs if need in _NOT_ALONE)
        if not missing:
            full = f"{info.name}{colon}{given}"
            notes += [
                f"{full}: a step without {_LEFT_OUT[need]}."
                for need in info.needs
                if need in _LEFT_OUT
            ]
            specs[full] = _Spec(full, _config(info, given if colon else None, full))
        elif names:
            raise OLMoConfigurationError(
                f"names: {name!r} cannot step without its {missing}, allowed are others"
            )
        else:
            notes.append(f"{name} was left out: it cannot step without its {missing}.")
    return list(specs.values()), notes


def _config(info: OptimizerInfo, given: Optional[str], full: str) -> ExtOptimConfig:
    """
    The config of an optimizer, with the gate on unless a field says otherwise.

    :param given: ``FIELD=VALUE,FIELD=VALUE``, if any.
    """
    values: Dict[str, Any] = {}
    try:
        for each in [] if given is None else split_outside_brackets(given):
            field, equals, text = each.partition("=")
            if not field or not equals:
                raise OLMoConfigurationError(
                    f"{each!r} is not allowed, allowed is FIELD=VALUE, with lists in brackets"
                )
            if field in values or field == "compile":
                why = "is given twice" if field in values else "is the bench's to set"
                raise OLMoConfigurationError(f"'{field}' {why}, allowed are other fields")
            values[field] = _yaml(field, text)
        return decode_fields(info.config_class, {"skip_step": True, **values}, "")
    except OLMoConfigurationError as error:
        raise OLMoConfigurationError(f"names: {full!r}: {error}") from None


def _yaml(field: str, text: str) -> Any:
    try:  # as the overrides of a spec are read: plain YAML takes 1e-3 for a text
        parsed = OmegaConf.from_dotlist([f"value={text}"])
        plain = OmegaConf.to_container(parsed, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError):
        raise OLMoConfigurationError(f"{field}: {text!r} is no YAML, allowed is a value") from None
    assert isinstance(plain, dict)
    return plain["value"]


def _check_built(spec: _Spec, on_meta: nn.Module) -> None:
    """Refuse what a model shows to be wrong before minutes go into others."""
    try:
        spec.config.build_groups(on_meta)
        spec.matrices(on_meta)
    except OLMoConfigurationError as error:
        raise OLMoConfigurationError(f"names: {spec.name!r}: {error}") from None


def _device(name: str) -> torch.device:
    allowed = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in allowed:
        raise OLMoConfigurationError(
            f"device: {name!r} is not allowed, allowed are {closest(name, allowed)}"
        )
    return torch.device(name)


def _what_to_step(
    model: Optional[str],
    n_layers: Optional[int],
    vocab_size: Optional[int],
    matrices: Optional[str],
) -> Tuple[Union[TransformerConfig, _Matrices], Dict[str, Any]]:
    """What has the parameters, and what to record of it beside them."""
    if matrices is None:
        name = "olmo3_100M" if model is None else model
        n_layers = 4 if n_layers is None else n_layers
        vocab_size = 8192 if vocab_size is None else vocab_size
        facts = {"factory": name, "n_layers": n_layers, "vocab_size": vocab_size}
        return _model_config(name, n_layers, vocab_size), facts
    of_model = {"model": model, "layers": n_layers, "vocab_size": vocab_size}
    given = [key for key, value in of_model.items() if value is not None]
    if given:
        raise OLMoConfigurationError(
            f"matrices: {matrices!r} is not allowed with {' and '.join(given)}, allowed is either"
        )
    return _Matrices(_shapes(matrices)), {}


def _shapes(matrices: str) -> Tuple[Tuple[int, int], ...]:
    shapes: List[Tuple[int, int]] = []
    for each in matrices.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", each.strip())
        n_out, n_in, count = (int(n or 1) for n in match.groups()) if match else (0, 0, 0)
        # What has a side of 1 is a vector to the rules.
        if min(n_out, n_in) < 2 or count < 1:
            raise OLMoConfigurationError(
                f"matrices: {each!r} is not allowed, allowed is OUTxIN, both >= 2, or "
                "OUTxIN:COUNT, such as 1024x4096,4096x1024:2"
            )
        shapes += [(n_out, n_in)] * count
    return tuple(shapes)


def _model_config(name: str, n_layers: int, vocab_size: int) -> TransformerConfig:
    known = [
        factory
        for factory, member in inspect.getmembers(TransformerConfig, inspect.ismethod)
        if "vocab_size" in inspect.signature(member).parameters and not factory.endswith("_like")
    ]
    if name not in known:
        raise OLMoConfigurationError(
            f"model: OLMo-core has no model {name!r}, allowed are {closest(name, known)}"
        )
    _check_at_least("layers", n_layers, 1)
    _check_at_least("vocab_size", vocab_size, 1)
    try:
        return getattr(TransformerConfig, name)(
            vocab_size=vocab_size, n_layers=n_layers, attn_backend=AttentionBackendName.torch
        )
    except Exception as error:  # whatever a factory makes of arguments that others take
        raise OLMoConfigurationError(
            f"model: {name} cannot be built with {n_layers} layers: {error}"
        ) from None


def check_output(path: Path) -> None:
    """
    Make the folder of a file, before minutes go into what it is to hold.

    :raises OLMoConfigurationError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OLMoConfigurationError(
            f"output: {path} cannot be written ({error.strerror}), allowed is a file in a folder "
            "that can"
        ) from None
