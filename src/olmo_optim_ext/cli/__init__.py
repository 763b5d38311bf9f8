"""
The command ``olmo-optim``: a file for each group of commands.
"""

import typer
from olmo_core.exceptions import OLMoConfigurationError

from . import bench, catalog, compare, experiments, lr_find, report, schedule, submit
from .app import app, errors

__all__ = ["app", "main"]

COMMANDS = (bench, catalog, compare, experiments, lr_find, report, schedule, submit)
"""Importing them adds their commands to the application."""


def _complain(message: str) -> None:
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def main() -> int:
    """
    Run the command line.

    :returns: 0, 1 if a run failed, 2 for bad input.
    """
    try:
        code = app(standalone_mode=False)
    except OLMoConfigurationError as error:
        _complain(str(error))
        return 2
    except typer.TyperException as error:  # bad options and arguments
        _complain(error.format_message())
        return 2
    return code if isinstance(code, int) else 0
