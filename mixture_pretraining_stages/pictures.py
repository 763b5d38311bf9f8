"""
Pictures drawn by Matplotlib, without a display.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence, Tuple

from .drafts import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "mark_stages", "new_figure", "save_figure"]

DPI = 130


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def mark_stages(panels: Sequence[Any], stages: Sequence[Tuple[str, int]]) -> None:
    """
    Lines where stages end, with their names in the first of panels against tokens.

    :param stages: Name and last token of each.
    """
    for name, last_token in stages:
        for axes in panels:
            axes.axvline(last_token, color="0.5", linestyle=":", linewidth=1)
        panels[0].annotate(
            name,
            (last_token, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
            color="0.4",
        )


def save_figure(figure: "Figure", path: Path, dpi: int = DPI) -> None:
    """Write a PNG."""
    with replacing(path) as draft:
        figure.savefig(draft, dpi=dpi)
