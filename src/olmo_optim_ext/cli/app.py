"""
What all commands of ``olmo-optim`` share: the application, its consoles, and how a config and its
overrides are given.
"""

from pathlib import Path
from typing import List, Optional, Tuple

import typer
from olmo_core.exceptions import OLMoConfigurationError
from rich.console import Console

from mixture_pretraining_stages.reading import load_spec
from mixture_pretraining_stages.training import JolmoModel

from .flags import Flags, check_agreement, translate

__all__ = ["CONFIG_HELP", "app", "console", "errors", "load", "load_with_flags"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretraining optimizers for OLMo-core, and experiments with them.",
)
console = Console()
errors = Console(stderr=True)

CONFIG_HELP = "A YAML file; the quickstart if left out. Then key=value overrides."


def load(arguments: Optional[List[str]]) -> JolmoModel:
    """
    The spec of a command's arguments.

    :param arguments: Perhaps a YAML file, then ``key=value`` overrides.

    :raises OLMoConfigurationError: If it is none.
    """
    path, overrides = split(arguments or [])
    return load_spec(path, overrides)


def load_with_flags(arguments: Optional[List[str]], flags: Flags) -> Tuple[JolmoModel, List[str]]:
    """
    The spec of one run, by a command's arguments and its short flags.

    :param arguments: As for :func:`load`.

    :returns: The spec, and what the flags changed beside what they say.

    :raises OLMoConfigurationError: If it is none, or of many runs, or if a flag and an override
        differ.
    """
    path, overrides = split(arguments or [])
    spec = load_spec(path, overrides)
    if spec.comparison is not None:
        raise OLMoConfigurationError(
            "comparison: this is for many runs, allowed for one is null (comparison=null); all of "
            "them makes olmo-optim compare"
        )
    if flags == Flags():
        return spec, []
    of_file = [each for each in overrides if each.partition("=")[0].split(".")[0] != "optimizer"]
    meaning = translate(flags, spec, load_spec(path, of_file).optimizer)
    changed = load_spec(path, [*meaning.overrides, *overrides])
    check_agreement(flags, changed)
    notes = meaning.notes
    if flags.name is not None and changed.output == spec.output and changed.name != spec.name:
        notes = [
            *notes,
            f"The output stays {spec.output}, as the config does not name it by the run",
        ]
    return changed, notes


def split(arguments: List[str]) -> Tuple[Path, List[str]]:
    """The YAML file, the quickstart's if none is given, and the overrides."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).exists()):
        return Path(arguments[0]), arguments[1:]
    return quickstart(), arguments


def quickstart() -> Path:
    import mixture_pretraining_stages

    package = Path(mixture_pretraining_stages.__file__).parent
    # In a wheel the configs are inside the package; in a checkout they are beside it.
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "quickstart.yaml").exists():
            return folder / "quickstart.yaml"
    raise OLMoConfigurationError("the quickstart's config is not installed, give a config")
