"""
What a step costs here: ``olmo-optim bench``.
"""

from pathlib import Path
from typing import List, Optional

import typer
from rich.markup import escape

from .. import bench as benchmark
from .app import app, console, errors


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
