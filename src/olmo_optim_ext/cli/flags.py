"""
The short flags of an experiment, and the overrides of its spec that they stand for.
"""

import dataclasses
import functools
import inspect
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Callable, Dict, List, Mapping, Optional, Sequence

import typer
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig

from mixture_pretraining_stages.plans import plan_stages
from mixture_pretraining_stages.training import JolmoModel

from ..matrix.muon_family import MuonFamilyConfig
from ..matrix.noise import AlphaAnnealing, NoisyMuonConfig

__all__ = [
    "Flags",
    "Translation",
    "check_agreement",
    "scale_tokens",
    "takes_flags",
    "translate",
]

SPELLINGS = {
    "orthonoise": "muon_orthonoise",
    "isotropic": "muon_isotropic",
    "nolah": "muon_nolah",
}
"""Flags that stand for an optimizer."""

ALPHA = 1e-3
"""Strength of the noise where nothing else is asked for."""

ANNEALED = 0.1
"""By what the strength is multiplied at the end; as in the author's code (NoisyMuonConfig)."""


@dataclass(frozen=True)
class Flags:
    """The flags as they were given."""

    optimizer: Annotated[
        Optional[str],
        typer.Option("--optimizer", metavar="NAME", help="In place of the config's optimizer."),
    ] = None
    orthonoise: Annotated[
        bool, typer.Option("--orthonoise", help="--optimizer muon_orthonoise")
    ] = False
    isotropic: Annotated[bool, typer.Option("--isotropic", help="--optimizer muon_isotropic")] = (
        False
    )
    nolah: Annotated[bool, typer.Option("--nolah", help="--optimizer muon_nolah")] = False
    alpha: Annotated[
        Optional[float],
        typer.Option("--alpha", help="Strength of the noise; 1e-3 unless the config has one."),
    ] = None
    anneal: Annotated[
        bool, typer.Option("--anneal", help="Let the noise fall to a tenth over the run.")
    ] = False
    steps: Annotated[
        Optional[int],
        typer.Option("--steps", min=1, help="Of the whole run; stages keep their proportions."),
    ] = None
    seed: Annotated[Optional[int], typer.Option("--seed", help="Of weights, data and order.")] = (
        None
    )
    name: Annotated[
        Optional[str],
        typer.Option("--name", metavar="RUN", help="Of the run, and of its folder by ${name}."),
    ] = None

    def arguments(self) -> List[str]:
        """What to type for them."""
        out: List[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is True:
                out.append(f"--{field.name}")
            elif value is not None and value is not False:
                out += [f"--{field.name}", str(value)]
        return out

    def asked_optimizer(self) -> Optional[str]:
        """
        The optimizer that the flags name.

        :raises OLMoConfigurationError: If they name two.
        """
        asked = {f"--{flag}": name for flag, name in SPELLINGS.items() if getattr(self, flag)}
        if self.optimizer is not None:
            asked[f"--optimizer {self.optimizer}"] = self.optimizer
        if len(set(asked.values())) > 1:
            raise OLMoConfigurationError(
                f"{' and '.join(asked)} name several optimizers, allowed is one of them"
            )
        return next(iter(asked.values()), None)


def takes_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the short flags as options; its parameter ``flags`` gets them."""
    shared = dataclasses.fields(Flags)

    @functools.wraps(command)
    def with_flags(**options: Any) -> None:
        flags = Flags(**{field.name: options.pop(field.name) for field in shared})
        command(**options, flags=flags)

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]
    parameters = [
        *own,
        *(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in shared
        ),
    ]
    # What Typer makes options of.
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_flags


@dataclass(frozen=True)
class Translation:
    """What flags stand for in a spec."""

    overrides: List[str]
    """``key=value``, to be applied before those of the command line."""
    notes: List[str]
    """What they changed beside what they say, for people."""


def translate(flags: Flags, spec: JolmoModel, written: Mapping[str, Any]) -> Translation:
    """
    The overrides that flags stand for.

    Muon and its variants (but NorMuon, whose rate is of another scale) keep the fields that both
    have when one takes the place of another, as they mean the same there. Any other optimizer
    begins with its own defaults, a learning rate above all, but for a decoupled weight decay.
    Noise, where the flags choose or tune it, has an ``alpha`` of 1e-3 and no annealing unless the
    config or the command line says otherwise.

    :param spec: With the overrides of the command line.
    :param written: ``optimizer`` without them.

    :raises OLMoConfigurationError: If flags contradict each other, or the optimizer.
    """
    if flags.alpha is not None and not 0 <= flags.alpha < math.inf:
        raise OLMoConfigurationError(
            f"--alpha: {flags.alpha} is not allowed, allowed is a finite number >= 0"
        )
    values: Dict[str, Any] = {}
    notes: List[str] = []
    if flags.name is not None:
        values["name"] = flags.name
    if flags.seed is not None:
        values["seed"] = flags.seed
    steps = _steps(spec)
    if flags.steps is not None:
        steps = flags.steps
        tokens = [stage.tokens for stage in spec.stages]
        for index, scaled in enumerate(scale_tokens(tokens, _batches(spec), steps)):
            values[f"stages.{index}.tokens"] = scaled
    name = flags.asked_optimizer()
    if name is not None or flags.alpha is not None or flags.anneal:
        notes += _stages_of_their_own(spec)
        overridden = {k: v for k, v in spec.optimizer.items() if written.get(k, ...) != v}
        target = _config(spec, {"name": name or spec.optimizer.get("name")})
        kept = dict(written)
        if name is not None:
            kept = _carried(_config(spec, written), target, written, name)
        noise = _noise(flags, target, name or str(spec.optimizer["name"]), kept, overridden, steps)
        if name is None:
            values.update({f"optimizer.{key}": value for key, value in noise.items()})
        elif (optimizer := {**kept, **noise}) != written:
            values["optimizer"] = optimizer
            notes.append(_describe(written, kept, noise, overridden, target))
    return Translation([f"{key}={json.dumps(value)}" for key, value in values.items()], notes)


def check_agreement(flags: Flags, spec: JolmoModel) -> None:
    """
    Check that a spec is what the flags say: overrides of the command line come after them.

    :raises OLMoConfigurationError: Names the flag and the key that differ.
    """
    asked, optimizer = flags.asked_optimizer(), spec.optimizer
    if asked is not None and type(_config(spec, {"name": asked})) is not type(
        _config(spec, {"name": optimizer.get("name")})
    ):
        _differ(f"the optimizer {asked}", "optimizer.name", optimizer.get("name"))
    if flags.alpha is not None and optimizer.get("alpha") != flags.alpha:
        _differ(f"--alpha {flags.alpha}", "optimizer.alpha", optimizer.get("alpha"))
    if flags.anneal and optimizer.get("annealing") in (None, AlphaAnnealing.none):
        _differ("--anneal", "optimizer.annealing", optimizer.get("annealing"))
    for key in ("seed", "name"):
        value = getattr(flags, key)
        if value is not None and getattr(spec, key) != value:
            _differ(f"--{key} {value}", key, getattr(spec, key))
    if flags.steps is not None and _steps(spec) != flags.steps:
        tokens = [stage.tokens for stage in spec.stages]
        _differ(f"--steps {flags.steps}", "the tokens of stages", tokens)


def scale_tokens(tokens: Sequence[int], batches: Sequence[int], steps: int) -> List[int]:
    """
    Tokens of stages in the proportions of ``tokens``, as whole batches, ``steps`` altogether and at
    least one in each stage.

    :param tokens: Of each stage.
    :param batches: Tokens of a batch, of each stage.

    :raises OLMoConfigurationError: If there are fewer steps than stages.
    """
    if steps < len(tokens):
        raise OLMoConfigurationError(
            f"--steps: {steps} is not allowed, allowed is at least one for each of the "
            f"{len(tokens)} stages"
        )
    share = [count / batch for count, batch in zip(tokens, batches)]
    ideal = [steps * each / sum(share) for each in share]
    whole = [max(1, math.floor(each)) for each in ideal]
    stages = range(len(whole))
    while (missing := steps - sum(whole)) != 0:
        if missing > 0:
            whole[max(stages, key=lambda i: ideal[i] - whole[i])] += 1
        else:
            whole[max((i for i in stages if whole[i] > 1), key=lambda i: whole[i] - ideal[i])] -= 1
    return [count * batch for count, batch in zip(whole, batches)]


def _batches(spec: JolmoModel) -> List[int]:
    return [spec.sizes(stage).global_batch_size for stage in spec.stages]


def _steps(spec: JolmoModel) -> int:
    return plan_stages(spec)[-1].last_step


def _stages_of_their_own(spec: JolmoModel) -> List[str]:
    """For people: which stages have no use for the run's optimizer."""
    own = [stage.name for stage in spec.stages if stage.optimizer is not None]
    if len(own) == len(spec.stages):
        raise OLMoConfigurationError(
            "--optimizer, --alpha and --anneal: they are for the optimizer of the run, but each "
            "stage has its own, allowed is stages.0.optimizer="
        )
    return [f"Stages with their own optimizer keep it: {', '.join(own)}"] if own else []


def _config(spec: JolmoModel, optimizer: Mapping[str, Any]) -> OptimConfig:
    return dataclasses.replace(spec, optimizer=dict(optimizer)).optimizer_config()


def _carried(
    old: OptimConfig, new: OptimConfig, written: Mapping[str, Any], name: str
) -> Dict[str, Any]:
    """The name, and the fields of the config's optimizer that stay."""
    if type(old) is type(new):
        return dict(written)
    known = {field.name for field in dataclasses.fields(new)}
    if not _are_of_muons_family(old, new):
        known &= {"weight_decay"} if _decouples(old) and _decouples(new) else set()
    return {"name": name, **{key: value for key, value in written.items() if key in known}}


def _are_of_muons_family(old: OptimConfig, new: OptimConfig) -> bool:
    """Whether the fields that both have mean the same."""
    if not (isinstance(old, MuonFamilyConfig) and isinstance(new, MuonFamilyConfig)):
        return False
    # NorMuon's rate is of another scale, as are its defaults.
    return type(old)().lr_scaling == type(new)().lr_scaling


def _decouples(config: OptimConfig) -> bool:
    # Without the field, decay is decoupled: a step multiplies by 1 - lr * weight_decay.
    return getattr(config, "decoupled_weight_decay", True)


def _noise(
    flags: Flags,
    target: OptimConfig,
    name: str,
    kept: Mapping[str, Any],
    overridden: Mapping[str, Any],
    steps: int,
) -> Dict[str, Any]:
    """The fields of noise that the flags set, or that go without saying."""
    if not isinstance(target, NoisyMuonConfig):
        flag = f"--alpha {flags.alpha}" if flags.alpha is not None else "--anneal"
        if flags.alpha is None and not flags.anneal:
            return {}
        raise OLMoConfigurationError(
            f"{flag}: the optimizer {name!r} has no noise, allowed are muon_orthonoise and "
            "muon_isotropic; another optimizer's own alpha is set by optimizer.alpha="
        )
    known = {**kept, **overridden}
    alpha = known.get("alpha", ALPHA) if flags.alpha is None else flags.alpha
    out = {"alpha": alpha, "annealing": known.get("annealing", "none")}
    if flags.anneal:
        if out["annealing"] == AlphaAnnealing.none and "annealing" not in overridden:
            out["annealing"] = "exponential"
        out["alpha_end"] = known.get("alpha_end", ANNEALED * alpha)
        out["anneal_steps"] = known.get("anneal_steps", steps)
    return out


def _describe(
    written: Mapping[str, Any],
    kept: Mapping[str, Any],
    noise: Mapping[str, Any],
    overridden: Mapping[str, Any],
    target: OptimConfig,
) -> str:
    def fields(of: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={value}" for key, value in of.items() if key != "name")

    name, before = kept["name"], written["name"]
    parts = [f"Optimizer {name}" + (f" in place of {before}" if before != name else "")]
    said = {**noise, **overridden}  # the command line says the latter
    if stay := fields({key: value for key, value in kept.items() if key not in said}):
        parts.append(f"{stay} of the config")
    if noise:
        parts.append(fields(noise))
    if "lr" not in {**kept, **overridden}:
        rule = getattr(target, "rule_config", target)
        parts.append(f"lr={rule.lr}, its own" if hasattr(rule, "lr") else "its own lr")
    if dropped := fields({key: value for key, value in written.items() if key not in kept}):
        parts.append(f"not {dropped}")
    return "; ".join(parts)


def _differ(flag: str, key: str, value: Any) -> None:
    raise OLMoConfigurationError(f"{flag} and {key}={value} differ, allowed is one of them")
