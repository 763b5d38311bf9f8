import gc
import sys
from typing import Callable, Tuple

import pytest

from olmo_optim_ext import cli
from olmo_optim_ext.cli.app import console, errors

Call = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch, capsys) -> Call:
    """``olmo-optim`` with some arguments: its exit code, output and errors."""

    def run(*arguments: object) -> Tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["olmo-optim", *map(str, arguments)])
        for each in (console, errors):  # whatever COLUMNS was at the import
            monkeypatch.setattr(each, "_width", 200)
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True, scope="session")
def little_garbage() -> None:
    # OLMo-core collects garbage when it loads checkpoints and trains, and modules are most of what
    # it looks at.
    gc.collect()
    gc.freeze()
