"""
What there is: ``olmo-optim list`` and ``show``.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from typing import Dict, Type

import typer
from rich.table import Table

from ..catalog import OptimizerInfo, list_optimizers, markdown_table, optimizer_info
from ..config import ExtOptimConfig
from .app import app, console

__all__ = ["field_docs"]


@app.command("list")
def list_(
    markdown: bool = typer.Option(False, "--markdown", help="Print a Markdown table."),
) -> None:
    """
    List the optimizers.

    [bold]Example:[/bold] olmo-optim list
    """
    if markdown:
        sys.stdout.write(markdown_table())
        return
    table = Table("name", "family", "summary", "state bytes/param", "paper", box=None)
    for name in list_optimizers():
        info = optimizer_info(name)
        table.add_row(
            name, info.family, info.summary, f"{info.state_bytes_per_param:g}", info.paper
        )
    console.print(table)


@app.command()
def show(name: str = typer.Argument(help="A name of `olmo-optim list`.")) -> None:
    """
    Show an optimizer's fields with their defaults, tuned presets and its cost.

    [bold]Example:[/bold] olmo-optim show muon
    """
    info = optimizer_info(name)
    console.print(f"[bold]{info.name}[/bold]: {info.summary}. {info.paper}", highlight=False)
    factors = f", and of each matrix {info.factors}" if info.factors else ""
    console.print(
        f"State: {info.state_bytes_per_param:g} bytes per parameter{factors}. "
        f"Sent per step and rank: {info.exchange}.",
        highlight=False,
    )
    if info.needs:
        console.print(f"Needs: {', '.join(info.needs)}.")
    table = Table("field", "default", "meaning", show_lines=True)
    docs, defaults = field_docs(info.config_class), info.config_class()
    for field in dataclasses.fields(info.config_class):
        if field.name != "fixed_fields":
            default = getattr(defaults, field.name)
            table.add_row(field.name, str(default), docs.get(field.name, ""))
    console.print(table)
    _print_presets(info)


def _print_presets(info: OptimizerInfo) -> None:
    for preset in info.presets:
        values = ", ".join(f"{key}: {_yaml(value)}" for key, value in preset.fields.items())
        console.print(f"[bold]Preset[/bold] {preset.setting}", highlight=False)
        console.print(
            f"  optimizer: {{name: {info.name}, {values}}}", highlight=False, markup=False
        )
        console.print(f"  {preset.source}", highlight=False, markup=False)


def _yaml(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def field_docs(config_class: Type[ExtOptimConfig]) -> Dict[str, str]:
    """The docstring under each field of a config and of its bases."""
    docs: Dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:]):
            if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    text = inspect.cleandoc(str(after.value.value))
                    docs[before.target.id] = " ".join(text.split())
    return docs
