"""
What is left of a run to look at: a table and a picture, both made from its metrics.
"""

import textwrap
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from rich.table import Table

from olmo_optim_ext.engine.roles import Role
from olmo_optim_ext.training import matrix_metric

from .callbacks import LEARNING_RATE, LOSS
from .evaluation import EVALUATOR
from .mixture import Share, drawn_tokens
from .pictures import mark_stages, new_figure, save_figure

__all__ = ["draw_curves", "mixture_table", "validation", "validation_table"]

Rows = List[Dict[str, Any]]

MEASURES = ("relative effective rank", "orthogonality error", "update RMS", "noise scale")
"""Of what an optimizer for matrices reports, what has a curve for each role."""


def validation(rows: Rows, source: str, metric: str) -> List[Tuple[int, float]]:
    """``(tokens, value)`` of each evaluation of a source; ``metric`` is ``CE loss`` or ``BPB``."""
    key = f"eval/{EVALUATOR}/{source}/{metric}"
    return [(row["tokens"], row[key]) for row in rows if key in row]


def _last(rows: Rows, stage: str, source: str, metric: str) -> Optional[float]:
    of_stage = [row for row in rows if row.get("stage") == stage]
    values = validation(of_stage, source, metric)
    return values[-1][1] if values else None


def mixture_table(
    rows: Rows, shares: Mapping[str, Sequence[Share]], sources: Sequence[str]
) -> Table:
    """
    The mixture that was drawn in each stage, next to the one that was asked for.

    :param shares: By stage.
    """
    table = Table(title="Mixture")
    table.add_column("stage")
    table.add_column("source")
    for title in ("epochs", "tokens", "asked", "drawn"):
        table.add_column(title, justify="right")
    for stage, its_shares in shares.items():
        drawn = drawn_tokens(rows, stage, sources)
        for share in its_shares:
            tokens, part = drawn[share.source]
            table.add_row(
                stage,
                share.source,
                f"{share.repetitions:.2f}",
                f"{tokens:,.0f}",
                f"{share.asked:.2%}",
                f"{part:.2%}",
            )
        table.add_section()
    return table


def validation_table(rows: Rows, stages: Sequence[str], sources: Sequence[str]) -> Table:
    """Validation loss and bits per byte of each source at the end of each stage."""
    table = Table(title="Validation")
    table.add_column("stage")
    table.add_column("source")
    for title in ("loss", "bits per byte"):
        table.add_column(title, justify="right")
    for stage in stages:
        for source in sources:
            loss = _last(rows, stage, source, "CE loss")
            bpb = _last(rows, stage, source, "BPB")
            table.add_row(
                stage,
                source,
                "-" if loss is None else f"{loss:.4f}",
                "-" if bpb is None else f"{bpb:.4f}",
            )
        table.add_section()
    return table


def _of_roles(rows: Rows, measure: str) -> Dict[str, List[Tuple[int, float]]]:
    """By role, ``(tokens, value)`` of each step in which the optimizer reported a measure."""
    keys = {str(role): matrix_metric(measure, role) for role in Role}
    curves = {
        role: [(row["tokens"], row[key]) for row in rows if key in row]
        for role, key in keys.items()
    }
    return {role: points for role, points in curves.items() if points}


def draw_curves(
    rows: Rows, stages: Sequence[Tuple[str, int]], sources: Sequence[str], title: str, path: Path
) -> None:
    """
    Loss and learning rate against tokens, and what was recorded of the optimizer, by role.

    :param stages: Name and last token of each stage.
    """
    measures = {measure: curves for measure in MEASURES if (curves := _of_roles(rows, measure))}
    figure = new_figure(9, 6 + 1.5 * len(measures))
    panels = figure.subplots(
        2 + len(measures), 1, sharex=True, height_ratios=[3, *[1] * (1 + len(measures))]
    )
    upper, lower = panels[:2]
    train = [(row["tokens"], row[LOSS]) for row in rows if LOSS in row]
    if train:
        upper.plot(*zip(*train), color="0.75", linewidth=1, label="train")
    for source in sources:
        if points := validation(rows, source, "CE loss"):
            upper.plot(*zip(*points), marker="o", markersize=4, label=f"validation: {source}")
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(title)
    if upper.has_data():
        upper.legend()
    rates = [(row["tokens"], row[LEARNING_RATE]) for row in rows if LEARNING_RATE in row]
    if rates:
        lower.plot(*zip(*rates), color="tab:gray")
    lower.set_ylabel("learning rate")
    for axes, (measure, curves) in zip(panels[2:], measures.items()):
        for role, points in curves.items():
            axes.plot(*zip(*points), marker=".", markersize=4, linewidth=1, label=role)
        axes.set_ylabel(textwrap.fill(measure, 14))
        axes.legend(fontsize="small")
    panels[-1].set_xlabel("tokens")
    for axes in panels:
        axes.grid(alpha=0.3)
    mark_stages(panels, stages)
    save_figure(figure, path)
