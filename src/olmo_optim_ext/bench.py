"""
How long an optimizer's step takes, against torch's own optimizers and against the limit that the
machine sets.

Machines are noisy, so only ratios are worth reading: every round runs one step of each contestant
in turn, and a ratio is taken within a round. What a step cannot beat is measured in the same
rounds: the bandwidth of memory and the rate of matrix products.
"""

import inspect
import json
import math
import os
import platform
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
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
)

import torch
import torch._dynamo.utils as dynamo_utils
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import SkipStepOptimizer
from rich.console import Group, RenderableType
from rich.table import Table
from torch.optim.optimizer import Optimizer

from .catalog import OptimizerInfo, closest, list_optimizers, optimizer_info
from .engine.elementwise import forget_compiled
from .engine.matrix_base import ALGORITHM, MatrixBase
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

FUSED = "fused AdamW"
FOREACH = "foreach AdamW"
TORCH_MUON = "torch Muon"
_BASELINES = (FUSED, FOREACH, TORCH_MUON)

PROBE_BYTES = 512 * 2**20
"""
Size of each of the two arrays of the bandwidth probe: together four times a cache of 256 MiB, as
the STREAM benchmark asks for.
"""

MIN_SIDE = 512
"""Smaller matrices are not timed alone: their products do not reach the machine's rate either."""

_NOT_ALONE = ("hessian", "second_pass")
"""Needs, as the catalogue calls them, without which an optimizer cannot step."""


class Quartiles(NamedTuple):
    """Of the rounds."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class StepRow:
    """One contestant."""

    name: str
    """Name in the catalogue, or of one of torch's optimizers."""

    mode: str
    """``eager`` or ``compiled``; empty for torch's own."""

    seconds: Quartiles
    """Of a step."""

    versus: Dict[str, Quartiles]
    """Time of a step over that of a torch optimizer in the same round: below 1 is faster."""

    share_of_limit: Quartiles
    """The least time that the machine allows over the time of the step."""

    bytes_moved: int
    """Reads of parameters, gradients and state, writes of parameters and state."""

    flops: float
    """Of matrix products, in the form that needs fewest."""

    first_step_seconds: float
    """Of the first step, compilation included."""

    compilations: Optional[Dict[str, int]]
    """How often each compiled function was compiled, for all shapes and learning rates."""

    times: List[float]
    """Seconds of each round."""


@dataclass(frozen=True)
class NewtonSchulzRow:
    """The Newton-Schulz iteration alone, on matrices of one shape."""

    rows: int
    cols: int

    form: str
    """``plain`` or ``gram``."""

    flops: int

    seconds: Quartiles

    share_of_gemm: Quartiles
    """Its rate over that of one large square matrix product."""


@dataclass(frozen=True)
class BenchResult:
    """What :func:`run_bench` measured."""

    machine: Dict[str, Any]
    settings: Dict[str, Any]

    model: Dict[str, Any]
    """Factory, parameters, and how many of them have each shape."""

    bandwidth: Quartiles
    """Bytes a second of in-place arithmetic on arrays far larger than the caches."""

    gemm: Quartiles
    """Floating point operations a second of a square matrix product."""

    steps: List[StepRow]
    newton_schulz: List[NewtonSchulzRow]

    notes: List[str]
    """What the figures do not say."""


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


class _Model:
    """Copies of a model with gradients in common."""

    def __init__(self, config: TransformerConfig, device: torch.device):
        self._config = config
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        like = list(config.build(init_device="meta").parameters())
        self._values = [self._random(param, 0.02) for param in like]
        self._grads = [self._random(param, 1e-2) for param in like]

    def copy(self) -> nn.Module:
        model = self._config.build(init_device="meta").to_empty(device=self._device)
        for param, value, grad in zip(model.parameters(), self._values, self._grads):
            param.data.copy_(value)
            param.grad = grad
        return model

    def matrix_shapes(self, min_side: int) -> List[Tuple[int, int]]:
        """Distinct shapes of the matrices in blocks, where no side is shorter."""
        named = self._config.build(init_device="meta").named_parameters()
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


def _ours(info: OptimizerInfo, model: nn.Module, compiled: bool) -> Optimizer:
    values: Dict[str, Any] = {"compile": compiled, "skip_step": True}
    known = {field.name for field in fields(info.config_class)}
    return info.config_class(**{k: v for k, v in values.items() if k in known}).build(model)


def _matrix_names(model: nn.Module, optim: Optimizer) -> List[str]:
    """The parameters that follow the matrix rule."""
    if not isinstance(optim, MatrixBase):
        return []
    groups = [g for g in optim.param_groups if g[ALGORITHM] == optim.algorithm]
    ids = {id(param) for group in groups for param in group["params"]}
    return [name for name, param in model.named_parameters() if id(param) in ids]


def _matrix_flops(model: nn.Module, optim: Optimizer) -> float:
    if not isinstance(optim, MatrixBase):
        return 0.0
    params = dict(model.named_parameters())
    return float(sum(optim.cost(*params[n].shape) for n in _matrix_names(model, optim)))


def _torch_muon(model: nn.Module, matrices: Sequence[str]) -> _Steps:
    named = dict(model.named_parameters())
    rest = [param for name, param in named.items() if name not in matrices]
    return _Steps(
        torch.optim.Muon([named[name] for name in matrices]),
        torch.optim.AdamW(rest, fused=True),
    )


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
    info: OptimizerInfo,
    model: _Model,
    probes: Tuple[_Bandwidth, _Gemm],
    modes: Sequence[str],
    rounds: int,
    warmup: int,
    device: torch.device,
) -> Tuple[List[StepRow], _Timed]:
    """
    One optimizer against torch's, which are measured again: all that takes part in a round is in
    memory at the same time.

    :returns: Rows of ours, then of torch's; and the times of the two probes.
    """
    # What an earlier optimizer compiled must not count for this one.
    torch._dynamo.reset()
    forget_compiled()
    dynamo_utils.clear_compilation_metrics()
    steps: Dict[str, _Steps] = {}
    flops: Dict[str, float] = {}
    matrices: List[str] = []
    for mode in modes:
        copy = model.copy()
        optim = _ours(info, copy, compiled=mode == "compiled")
        matrices = _matrix_names(copy, optim)
        steps[mode] = _Steps(optim)
        flops[mode] = _matrix_flops(copy, optim)
    steps[FUSED] = _Steps(torch.optim.AdamW(model.copy().parameters(), fused=True))
    if matrices:
        steps[TORCH_MUON] = _torch_muon(model.copy(), matrices)
        flops[TORCH_MUON] = flops[modes[0]]
    else:
        steps[FOREACH] = _Steps(torch.optim.AdamW(model.copy().parameters(), foreach=True))

    bandwidth, gemm = probes
    contestants = {**steps, "bandwidth": bandwidth, "gemm": gemm}
    timed = _measure(contestants, rounds, warmup, device)
    times = timed.times
    bandwidths = [bandwidth.nbytes / t for t in times["bandwidth"]]
    rates = [gemm.flops / t for t in times["gemm"]]
    rows = []
    for key, contestant in steps.items():
        ours = key in modes
        bytes_moved = contestant.bytes_moved()
        limits = limit_seconds(bytes_moved, flops.get(key, 0.0), bandwidths, rates)
        rows.append(
            StepRow(
                name=info.name if ours else key,
                mode=key if ours else "",
                seconds=quartiles(times[key]),
                versus={
                    other: ratios(times[key], times[other])
                    for other in _BASELINES
                    if other in steps and other != key
                },
                share_of_limit=ratios(limits, times[key]),
                bytes_moved=bytes_moved,
                flops=flops.get(key, 0.0),
                first_step_seconds=timed.first[key],
                compilations=_compilations() if key == "compiled" else None,
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
    model: str = "olmo3_100M",
    n_layers: int = 4,
    vocab_size: int = 8192,
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
    fused AdamW for the rest, and against fused AdamW. The limit of a step is the time to read
    parameters, gradients and state and write parameters and state at the measured bandwidth,
    plus the time of its matrix products at the measured rate.

    :param names: Of the catalogue; default are all that can step alone.
    :param model: A factory of OLMo-core's ``TransformerConfig``. The default has 25M parameters in
        four layers, with matrices of 512x512, 512x2048 and 2048x512.
    :param n_layers: Layers, which are all alike.
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
    infos, notes = _infos(names)
    place = _device(device)
    parameters = _Model(_model_config(model, n_layers, vocab_size), place)
    modes = ["eager", "compiled"] if compile else ["eager"]
    ours: List[StepRow] = []
    torchs: Dict[str, StepRow] = {}
    probe_times: Dict[str, List[float]] = {"bandwidth": [], "gemm": []}
    alone = []
    with _threads(threads):
        machine = _machine(place)
        probes = (_Bandwidth(probe_bytes, place), _Gemm(place))
        for info in infos:
            progress(info.name)
            rows, timed = _bench_one(info, parameters, probes, modes, rounds, warmup, place)
            ours += [row for row in rows if row.mode]
            # Measured with each of ours, shown once.
            torchs.update({row.name: row for row in rows if not row.mode})
            for key, seconds in probe_times.items():
                seconds += timed.times[key]
        for shape in parameters.matrix_shapes(min_side):
            progress("newton_schulz {}x{}".format(*shape))
            alone.append(_bench_newton_schulz(shape, probes[1], rounds, place))
    return BenchResult(
        machine=machine,
        settings={"rounds": rounds, "warmup": warmup, "probe_bytes": probe_bytes},
        model={"factory": model, "n_layers": n_layers, "vocab_size": vocab_size}
        | parameters.facts(),
        bandwidth=quartiles([probes[0].nbytes / t for t in probe_times["bandwidth"]]),
        gemm=quartiles([probes[1].flops / t for t in probe_times["gemm"]]),
        steps=[*ours, *torchs.values()],
        newton_schulz=alone,
        notes=notes + _busy(machine["load_average"]) + _notes(place),
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


def _infos(names: Optional[Sequence[str]]) -> Tuple[List[OptimizerInfo], List[str]]:
    """The optimizers, and a note on those that are left out."""
    infos, notes = [], []
    for name in names or list_optimizers():
        try:
            info = optimizer_info(name)
        except OLMoConfigurationError as error:
            raise OLMoConfigurationError(f"names: {error}") from None
        missing = ", ".join(need for need in info.needs if need in _NOT_ALONE)
        if not missing:
            if info not in infos:
                infos.append(info)
        elif names:
            raise OLMoConfigurationError(
                f"names: {name!r} cannot step without its {missing}, allowed are others"
            )
        else:
            notes.append(f"{name} was left out: it cannot step without its {missing}.")
    return infos, notes


def _device(name: str) -> torch.device:
    allowed = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in allowed:
        raise OLMoConfigurationError(
            f"device: {name!r} is not allowed, allowed are {closest(name, allowed)}"
        )
    return torch.device(name)


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


# Reporting


def _machine(device: torch.device) -> Dict[str, Any]:
    return {
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": _last_level_cache(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ai2-olmo-core": version("ai2-olmo-core"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _last_level_cache() -> Optional[str]:
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return caches[-1].read_text().strip() if caches else None


def _busy(load_average: Optional[Sequence[float]]) -> List[str]:
    if load_average is None or load_average[0] < 0.5:
        return []
    return [
        f"The machine was busy before this began: a load of {load_average[0]:.1f} over a minute."
    ]


def _notes(device: torch.device) -> List[str]:
    if device.type == "cuda":
        where = (
            "On CUDA this bench was only reasoned about, with synchronisation around each timing: "
            "check its figures."
        )
    else:
        where = "No GPU was measured."
    return [
        "Steps of one process on parameters in memory: no exchange between ranks, no forward and "
        "backward pass, no data.",
        where,
        "Ours run with the gate on; torch's have none. torch Muon multiplies in bfloat16, on CPUs "
        "too, ours there in float32.",
        "Ratios are medians and quartiles over rounds. limit: the least time of a step at the "
        "measured rates, over its time. builds: compilations of each function, for all shapes.",
        "A step that finds its state in a cache can beat the limit, which is that of memory.",
    ]


def to_json(result: BenchResult) -> str:
    """All of the result. Quartiles are lists of lower, median and upper."""
    return json.dumps(asdict(result), indent=1) + "\n"


def to_table(result: BenchResult) -> RenderableType:
    """
    What to read: medians, and for ratios the quartiles behind; ``limit`` is the share of the limit,
    ``builds`` how often each function of a rule was compiled. Rules for single coordinates and
    rules for matrices have a table each.
    """
    parts: List[RenderableType] = [_title(result)]
    for baseline, rows in _by_baseline(result).items():
        # What fits into 80 columns; the rest is in the JSON.
        table = _table("optimizer", "", "ms", f"x {FUSED}", f"x {baseline}", "limit", "builds")
        for row in rows:
            table.add_row(
                row.name,
                row.mode,
                f"{row.seconds.median * 1e3:.1f}",
                *(_spread(row.versus.get(name)) for name in (FUSED, baseline)),
                f"{row.share_of_limit.median:.0%}",
                "+".join(map(str, (row.compilations or {}).values())),
            )
        parts += ["", table]
    if result.newton_schulz:
        alone = _table("Newton-Schulz", "form", "ms", "of product rate")
        for each in result.newton_schulz:
            ms = f"{each.seconds.median * 1e3:.1f}"
            share = _spread(each.share_of_gemm)
            alone.add_row(f"{each.rows}x{each.cols}", each.form, ms, share)
        parts += ["", alone]
    return Group(*parts, "", *result.notes)


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="right" if table.columns[1:] else "left", no_wrap=True)
    return table


def _by_baseline(result: BenchResult) -> Dict[str, List[StepRow]]:
    """The rows that were measured together with foreach AdamW, and those with torch's Muon."""
    rows = {
        baseline: [row for row in result.steps if row.mode and baseline in row.versus]
        for baseline in (FOREACH, TORCH_MUON)
    }
    for baseline in rows:
        rows[baseline] += [row for row in result.steps if row.name in (FUSED, baseline)]
    return {baseline: each for baseline, each in rows.items() if any(row.mode for row in each)}


def _title(result: BenchResult) -> str:
    machine, model = result.machine, result.model
    return (
        f"{model['factory']}, {model['n_layers']} layers, {model['parameters'] / 1e6:.1f}M "
        f"parameters in {model['tensors']} tensors. {machine['gpu'] or machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, memory "
        f"{result.bandwidth.median / 1e9:.1f} GB/s, products {result.gemm.median / 1e9:.0f} "
        "GFLOP/s."
    )


def _spread(ratio: Optional[Quartiles]) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.3g} {ratio.lower:.3g}-{ratio.upper:.3g}"
