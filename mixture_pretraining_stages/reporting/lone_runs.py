"""
Names for runs that are compared although no comparison made them: the optimizer, and what differs.
"""

from collections import Counter
from collections.abc import Container
from dataclasses import replace
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Sequence, Set, Tuple

if TYPE_CHECKING:
    from .results import RunResult

__all__ = ["differing_keys", "name_arms", "unlike"]

NOT_OF_THE_ARM = frozenset(
    {
        *("name", "output", "cache", "seed", "wandb", "comet", "optimizer.name", "optimizer.lr"),
        *("rank_microbatch_size", "compile", "activation_checkpointing", "optimizer_metrics"),
    }
)
"""Keys of a config that say nothing of what is compared, or that have a column of their own."""

IGNORED_PARTS = ("checkpoint.", "parallelism.", "wandb.", "comet.", "optimizer_metrics.")


def name_arms(runs: Sequence["RunResult"], taken: Set[str]) -> List["RunResult"]:
    """
    Give each run an arm: the optimizer's name and the keys of its config that differ, of the
    optimizer among runs with the same one, of all else among all runs. Where two runs then have the
    same arm, rate and seed, also the name of the folder, and a number if that is the same, too.

    :param taken: Names that others have.
    """
    unnamed = [run for run in runs if not run.arm]
    others = differing_keys([run.config for run in unnamed], lambda key: key[:10] != "optimizer.")
    named: List["RunResult"] = []
    for run in runs:
        arm = run.arm
        if not arm:
            same = [each.config for each in unnamed if each.optimizer == run.optimizer]
            own = differing_keys(same, lambda key: key[:10] == "optimizer.")
            flat = dict(_flat(run.config))
            told = [f"{key.removeprefix('optimizer.')}={flat.get(key)}" for key in own + others]
            arm = " ".join([run.optimizer or run.folder.name, *told])
        named.append(replace(run, arm=arm))
    like = Counter((run.arm, run.lr, run.seed) for run in named)
    out: List["RunResult"] = []
    for run in named:
        if like[run.arm, run.lr, run.seed] > 1 or run.arm in taken:
            known = {*taken, *(each.arm for each in (*named, *out))}
            run = replace(run, arm=unlike(f"{run.arm} ({run.folder.name})", known))
        out.append(run)
    return out


def unlike(name: str, others: Container[str]) -> str:
    """The name, or else the first of ``name 2``, ``name 3``, ... that no other has."""
    numbered = (f"{name} {number}" for number in count(2))
    return next(each for each in chain([name], numbered) if each not in others)


def differing_keys(
    configs: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]
) -> List[str]:
    """
    Dotted keys whose values are not the same in all configs that there are, but for those that say
    nothing of what is compared.

    :param wanted: Whether a key is looked at.
    """
    flat: List[Dict[str, Any]] = [dict(_flat(config)) for config in configs if config]
    keys = dict.fromkeys(key for each in flat for key in each)
    return [
        key
        for key in keys
        if key not in NOT_OF_THE_ARM
        and not key.startswith(IGNORED_PARTS)
        and wanted(key)
        and any(each.get(key) != flat[0].get(key) for each in flat)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            yield from _flat({str(i): each for i, each in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
