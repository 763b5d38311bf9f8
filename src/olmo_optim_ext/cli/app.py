"""
What all commands of ``olmo-optim`` share: the application, its consoles, and how a config and its
overrides are given.
"""

from pathlib import Path
from typing import List, Optional, Tuple

import typer
from olmo_core.exceptions import OLMoConfigurationError
from rich.console import Console

from mixture_pretraining_stages.training import JolmoModel, load_spec

__all__ = ["CONFIG_HELP", "app", "console", "errors", "load"]

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
