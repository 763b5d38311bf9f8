"""
What the bench found out, and how it is shown.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = [
    "BenchResult",
    "NewtonSchulzRow",
    "Quartiles",
    "StepRow",
    "busy_notes",
    "machine_facts",
    "notes_on",
    "split_outside_brackets",
    "to_json",
    "to_table",
]

FUSED = "fused AdamW"
FOREACH = "foreach AdamW"
TORCH_MUON = "torch Muon"
EXT_MUON = "ext_muon"


class Quartiles(NamedTuple):
    """Of the rounds."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class StepRow:
    """One contestant."""

    name: str
    """
    Name in the catalogue and the fields that were asked for, or the name of one of torch's
    optimizers.
    """

    mode: str
    """``eager`` or ``compiled``; empty for torch's own."""

    seconds: Quartiles
    """Of a step."""

    versus: Dict[str, Quartiles]
    """
    Time of a step over that of another optimizer in the same round, below 1 is faster: torch's, and
    for those with a rule for matrices our ``ext_muon``, eager and with its default fields.
    """

    share_of_limit: Quartiles
    """The least time that the machine allows over the time of the step."""

    bytes_moved: int
    """Reads of parameters, gradients and state, writes of parameters and state."""

    flops: float
    """Of the rule for matrices; nearly all are of matrix products."""

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
    """Its factory, unless it is bare matrices; parameters, and how many of them have each shape."""

    bandwidth: Quartiles
    """Bytes a second of in-place arithmetic on arrays far larger than the caches."""

    gemm: Quartiles
    """Floating point operations a second of a square matrix product."""

    steps: List[StepRow]
    newton_schulz: List[NewtonSchulzRow]

    notes: List[str]
    """What the figures do not say."""


# What the figures are to be read with


def machine_facts(device: torch.device) -> Dict[str, Any]:
    """What the machine is, and how busy it is."""
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


def busy_notes(load_average: Optional[Sequence[float]]) -> List[str]:
    """A note if the machine was busy."""
    if load_average is None or load_average[0] < 0.5:
        return []
    return [
        f"The machine was busy before this began: a load of {load_average[0]:.1f} over a minute."
    ]


def notes_on(device: torch.device) -> List[str]:
    """What holds for all figures."""
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
        "too, ours there in float32. The ext_muon to compare with is eager, with default fields.",
        "Ratios are medians and quartiles over rounds. limit: the least time of a step at the "
        "measured rates, over its time. builds: compilations of each function, for all shapes.",
        "A step that finds its state in a cache can beat the limit, which is that of memory.",
    ]


# Showing


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
    for baselines in ((FUSED, FOREACH), (EXT_MUON, TORCH_MUON)):
        rows = _measured_with(baselines[1], result)
        if rows:
            parts += ["", _steps_table(rows, baselines)]
    if result.newton_schulz:
        alone = _table("Newton-Schulz", "form", "ms", "of product rate")
        for each in result.newton_schulz:
            ms = f"{each.seconds.median * 1e3:.1f}"
            share = _spread(each.share_of_gemm)
            alone.add_row(f"{each.rows}x{each.cols}", each.form, ms, share)
        parts += ["", alone]
    return Group(*parts, "", *result.notes)


def _steps_table(rows: Sequence[StepRow], baselines: Sequence[str]) -> Table:
    # What fits into 80 columns; the rest is in the JSON.
    table = _table("optimizer", "", "ms", *(f"x {name}" for name in baselines), "limit", "builds")
    table.columns[0].no_wrap = False
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(
            Text(_one_field_a_line(row.name)),  # a list in a string would be taken for markup
            row.mode,
            f"{row.seconds.median * 1e3:.1f}",
            *(_spread(row.versus.get(name)) for name in baselines),
            f"{row.share_of_limit.median:.0%}",
            "+".join(map(str, (row.compilations or {}).values())),
        )
    return table


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="right" if table.columns[1:] else "left", no_wrap=True)
    return table


def _one_field_a_line(name: str) -> str:
    optimizer, _, fields = name.partition(":")
    return "\n ".join([optimizer, *split_outside_brackets(fields)]) if fields else optimizer


def split_outside_brackets(text: str) -> List[str]:
    """The parts between commas, but for those in brackets or braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _measured_with(baseline: str, result: BenchResult) -> List[StepRow]:
    """Our rows that were measured together with one of torch's, and torch's; empty if none was."""
    rows = [row for row in result.steps if row.mode and baseline in row.versus]
    torchs = [row for row in result.steps if row.name in (FUSED, baseline)]
    return rows + torchs if rows else []


def _title(result: BenchResult) -> str:
    machine, model = result.machine, result.model
    if "factory" in model:
        what = f"{model['factory']}, {model['n_layers']} layers"
    else:
        what = ", ".join(f"{n} of {shape}" for shape, n in model["shapes"].items())
    return (
        f"{what}, {model['parameters'] / 1e6:.1f}M parameters in {model['tensors']} tensors. "
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, memory {result.bandwidth.median / 1e9:.1f} GB/s, products "
        f"{result.gemm.median / 1e9:.0f} GFLOP/s."
    )


def _spread(ratio: Optional[Quartiles]) -> str:
    if ratio is None:
        return ""
    return f"{_short(ratio.median)} {_short(ratio.lower)}-{_short(ratio.upper)}"


def _short(x: float) -> str:
    return f"{x:.2g}" if x < 0.1 else f"{round(x, 2):.3g}"
