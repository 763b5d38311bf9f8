"""
What a compiled program moves between devices, read from its HLO.
"""

import math
import re
from dataclasses import dataclass
from typing import Dict, List

import jax

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(
    r" = (?P<type>\(.*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all"
    r"|ragged-all-to-all|collective-permute|collective-broadcast|send|recv)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    kind: str

    numbers: int
    """In its result on one device."""

    nbytes: int
    """Of its result on one device."""

    devices: int
    """That exchange something with each other, in a group."""

    groups: int
    """Of devices, each of which does it for itself."""

    times: int
    """How often a run of the program comes to it: what is in a loop counts for each turn."""

    conditional: bool
    """Whether it is in a branch, which need not be taken."""

    @property
    def array(self) -> int:
        """Numbers of the array of which all devices send parts, if each group has another part."""
        whole = self.kind in ("all-gather", "all-reduce")
        return self.numbers * self.groups * (1 if whole else self.devices)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, in a ring."""
        others = self.devices - 1
        share = {
            "all-reduce": 2 * others / self.devices,
            "all-gather": others / self.devices,
            "all-to-all": others / self.devices,
            "reduce-scatter": others,
            "collective-permute": 1,
        }
        return share[self.kind] * self.nbytes


def collectives(compiled: jax.stages.Compiled) -> List[Collective]:
    """Of all computations of a program.

    Raises:
      ValueError: If it has what this cannot count.
    """
    text = compiled.as_text()
    if text is None:
        raise ValueError("the program has no text")
    partitions = re.search(r"^HloModule.*num_partitions=(\d+)", text)
    total = int(partitions[1]) if partitions else 1
    lines: Dict[str, List[str]] = {}
    entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head is not None:
            lines[head[2]] = body = []
            entry = head[2] if head[1] else entry
        elif lines:
            body.append(line)

    def within(computation: str, times: int, conditional: bool) -> List[Collective]:
        found = []
        for line in lines[computation]:
            match = _COLLECTIVE.search(line)
            if match is not None:
                found.append(_collective(line, match, total, times, conditional))
            branches, turns = conditional or " conditional(" in line, times
            if " while(" in line:
                trips = _TRIPS.search(line)
                turns = times * int(trips[1]) if trips else 0
            for names in _CALLED.findall(line):
                for name in re.findall(r"[\w.\-]+", names):
                    called = within(name, turns, branches)
                    if called and not turns:
                        raise ValueError(f"nothing says how often this runs: {line}")
                    found += called
        return found

    return within(entry, 1, False)


def _collective(
    line: str, match: re.Match, total: int, times: int, conditional: bool
) -> Collective:
    if match["start"]:
        raise ValueError(f"the result of what is asynchronous is more than what it moves: {line}")
    numbers = nbytes = 0
    for dtype, shape in _ARRAY.findall(match["type"]):
        size = math.prod(int(axis) for axis in shape.split(",") if axis)
        numbers += size
        nbytes += size * BYTES[dtype]
    devices = _devices(line) or total
    groups = total // devices
    return Collective(match["kind"], numbers, nbytes, devices, groups, times, conditional)


def _devices(line: str) -> int:
    """Of a group, in each of the forms that XLA prints; 0 for all, as where pairs are named."""
    if "source_target_pairs=" in line or "replica_groups={}" in line:
        return 0
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed is not None:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if iota is not None:
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}", line)
    if mesh is None:
        raise ValueError(f"the devices cannot be read: {line}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # A part of an axis is 'name':(size of what is left of it)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[name]) for name, part in axes)
