"""
The picture of a learning-rate range test.
"""

from pathlib import Path
from typing import Sequence

import numpy as np

from olmo_optim_ext.training import LRSuggestion
from olmo_optim_ext.training.lr_curve import fit, highest

__all__ = ["draw_range_test"]


def draw_range_test(
    rates: Sequence[float],
    losses: Sequence[float],
    suggestion: LRSuggestion,
    title: str,
    path: Path,
) -> None:
    """
    Loss against learning rate, on a logarithmic axis, with the line through it that the suggestion
    is from.

    :param losses: Those that are not finite, and what is far above the start, are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x, y = np.asarray(rates), np.asarray(losses)
    good = np.isfinite(y)
    if good.any():
        axes.plot(x[good], y[good], ".", color="0.65", label="loss of a batch")
    if good.sum() > 2:
        axes.plot(x[good], fit(x[good], y[good]).losses, color="tab:blue", label="fit")
        bottom, top = y[good].min(), min(highest(y[good]), y[good].max())
        margin = 0.05 * (top - bottom) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
    marks = (
        (suggestion.lr, "tab:green", "-", "suggestion"),
        (suggestion.minimum, "tab:orange", "--", "lowest loss"),
        (suggestion.diverged_at, "tab:red", "--", "diverged"),
    )
    for rate, color, style, label in marks:
        if rate is not None:
            axes.axvline(rate, color=color, linestyle=style, label=f"{label}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss after the step (nats per token)")
    axes.set_title(title if suggestion.lr is not None else f"{title}: no suggestion")
    axes.grid(alpha=0.3)
    axes.legend()
    draft = path.with_suffix(".tmp.png")
    figure.savefig(draft, dpi=130)
    draft.replace(path)
