"""
The command ``olmo-optim``.
"""

import ast
import dataclasses
import inspect
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Type

import typer
from olmo_core.exceptions import OLMoConfigurationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixture_pretraining_stages import launch
from mixture_pretraining_stages.tokenizers import load_tokenizer
from mixture_pretraining_stages.training import JolmoModel, load_spec

from . import bench as benchmark
from .catalog import OptimizerInfo, list_optimizers, markdown_table, optimizer_info
from .config import ExtOptimConfig
from .role_table import role_table, to_json, to_text

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretraining optimizers for OLMo-core, and experiments with them.",
)
console = Console()
errors = Console(stderr=True)

_CONFIG_HELP = "A YAML file; the quickstart if left out. Then key=value overrides."


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


@app.command()
def roles(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=_CONFIG_HELP
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """
    Print which rule each parameter follows, without training. On one rank: how several ranks share
    the matrices stands in a run's roles.txt.

    [bold]Example:[/bold] olmo-optim roles configs/quickstart.yaml optimizer.muon_on_lm_head=true
    """
    spec = _load(arguments)
    spec.check()
    vocab_size = load_tokenizer(spec.tokenizer).config.vocab_size
    model, optim = spec.build_on_meta(vocab_size)
    rows = role_table(model, spec.optimizer_config(), optim)
    sys.stdout.write(to_json(rows) + "\n" if json else to_text(rows))


@app.command()
def pretrain(
    arguments: Optional[List[str]] = typer.Argument(
        None, metavar="[CONFIG] [KEY=VALUE ...]", help=_CONFIG_HELP
    ),
    nproc: int = typer.Option(
        1, "--nproc", "--ngpus", min=1, help="Ranks to start on this machine."
    ),
) -> None:
    """
    Run an experiment, or continue it: the same command again resumes from the last whole
    checkpoint.

    [bold]Examples:[/bold]

    olmo-optim pretrain

    olmo-optim pretrain configs/quickstart.yaml optimizer.name=adamw output=runs/adamw

    olmo-optim pretrain my.yaml --nproc 2

    torchrun --nproc-per-node 8 -m mixture_pretraining_stages pretrain my.yaml
    """
    spec = _load(arguments)
    command = ["pretrain", *(arguments or [])]
    if nproc > 1 and not launch.launched_by_torchrun():
        spec.check(nproc)  # before ranks start: one message instead of one a rank
        # torchrun would take --nproc for an abbreviation of an option of its own.
        ranks = [*command, "--ngpus", str(nproc)]
        raise typer.Exit(launch.start_ranks(nproc, ranks, Path(spec.output)))
    if nproc > 1:
        command += ["--nproc", str(nproc)]
    start = "torchrun ..." if nproc == 1 and launch.launched_by_torchrun() else "olmo-optim"
    raise typer.Exit(launch.run(spec, console, f"{start} {shlex.join(command)}"))


@app.command()
def bench(
    names: Optional[List[str]] = typer.Argument(
        None,
        metavar="NAME[:FIELD=VALUE,...]",
        help="Names of `olmo-optim list`, also with fields; all if left out.",
    ),
    model: Optional[str] = typer.Option(
        None, help="A factory of OLMo-core's TransformerConfig; olmo3_100M if left out."
    ),
    layers: Optional[int] = typer.Option(
        None, min=1, help="Layers of the model, all alike; 4 if left out."
    ),
    vocab_size: Optional[int] = typer.Option(
        None, min=1, help="Rows of the embedding and of the head; 8192 if left out."
    ),
    matrices: Optional[str] = typer.Option(
        None, metavar="OUTxIN[:COUNT],...", help="Bare matrices in place of a model."
    ),
    rounds: int = typer.Option(10, "--rounds", "--steps", min=2, help="Measured steps of each."),
    warmup: int = typer.Option(2, min=1, help="Steps of each before; the first compiles."),
    threads: Optional[int] = typer.Option(
        None, min=1, help="Of torch; its own choice if left out."
    ),
    compile: bool = typer.Option(
        True, "--compile/--no-compile", help="Measure compiled rules too."
    ),
    device: str = typer.Option(
        "cpu", help="cpu or cuda. On CUDA the bench was only reasoned about, never run."
    ),
    output: Path = typer.Option(Path("runs/bench.json"), help="Where all figures are saved."),
) -> None:
    """
    Time the steps of optimizers against torch's and against what the machine allows, in one process
    and with random gradients: no exchange between ranks, no forward pass and no data take part.
    Leave the machine alone while it runs: on two cores ten seconds to a minute for each optimizer.

    [bold]Examples:[/bold]

    olmo-optim bench ext_adamw muon --rounds 20

    olmo-optim bench ext_dion:rank_fraction=0.25,lr=0.02 --matrices 1024x4096,4096x1024:2
    """
    benchmark.check_output(output)
    with errors.status("measuring") as status:
        result = benchmark.run_bench(
            names,
            model=model,
            n_layers=layers,
            vocab_size=vocab_size,
            matrices=matrices,
            rounds=rounds,
            warmup=warmup,
            compile=compile,
            threads=threads,
            device=device,
            progress=lambda what: status.update(f"measuring {escape(what)}"),
        )
    output.write_text(benchmark.to_json(result))
    console.print(benchmark.to_table(result), highlight=False)
    console.print(f"All figures: {output}", highlight=False)


def _load(arguments: Optional[List[str]]) -> JolmoModel:
    path, overrides = _split(arguments or [])
    return load_spec(path, overrides)


def _split(arguments: List[str]) -> Tuple[Path, List[str]]:
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).exists()):
        return Path(arguments[0]), arguments[1:]
    return _quickstart(), arguments


def _quickstart() -> Path:
    import mixture_pretraining_stages

    package = Path(mixture_pretraining_stages.__file__).parent
    # In a wheel the configs are inside the package; in a checkout they are beside it.
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "quickstart.yaml").exists():
            return folder / "quickstart.yaml"
    raise OLMoConfigurationError("the quickstart's config is not installed, give a config")


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
