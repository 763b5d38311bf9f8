"""
What a learning-rate range test leaves: its figures and a picture.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Mapping, Optional

import numpy as np

from olmo_optim_ext.training import LRSuggestion
from olmo_optim_ext.training.lr_curve import fit, highest

from .drafts import write_whole
from .pictures import new_figure, save_figure

__all__ = ["FoundRates", "write_found"]


@dataclass(frozen=True)
class FoundRates:
    """What a test has found. Rates are in the units of the optimizer's ``lr``."""

    rates: List[float]
    losses: List[float]
    """After the step with each rate; the last one may be infinite or NaN."""
    suggestion: LRSuggestion
    overrides: List[str]
    """``key=value`` that give the spec the rate of the suggestion; empty if there is none."""
    note: Optional[str]
    """What to know of the rate of this optimizer."""


def write_found(found: FoundRates, asked: Mapping[str, Any], folder: Path) -> None:
    """
    Write ``lr_find.json`` and ``lr_find.png``.

    :param asked: What was tested: ``name`` and ``optimizer`` of the spec, ``lr``, ``min_lr``,
        ``max_lr`` and ``steps``.
    """
    result = {
        **asked,
        "suggestion": found.suggestion.lr,
        "reason": found.suggestion.reason,
        "steepest": found.suggestion.steepest,
        "minimum": found.suggestion.minimum,
        "diverged_at": found.suggestion.diverged_at,
        "overrides": found.overrides,
        "note": found.note,
        "rates": found.rates,
        # JSON has no others.
        "losses": [loss if math.isfinite(loss) else None for loss in found.losses],
    }
    write_whole(folder / "lr_find.json", json.dumps(result, indent=1) + "\n")
    title = f"{asked['name']} ({asked['optimizer']['name']})"
    _draw(found, title, folder / "lr_find.png")


def _draw(found: FoundRates, title: str, path: Path) -> None:
    """
    Loss against learning rate, with the line through it that the suggestion is from. Losses that
    are not finite, or far above the start, are left out.
    """
    figure = new_figure(9, 5)
    axes = figure.subplots()
    x, y = np.asarray(found.rates), np.asarray(found.losses)
    good = np.isfinite(y)
    if good.any():
        axes.plot(x[good], y[good], ".", color="0.65", label="loss of a batch")
    if good.sum() > 2:
        axes.plot(x[good], fit(x[good], y[good]).losses, color="tab:blue", label="fit")
        bottom, top = y[good].min(), min(highest(y[good]), y[good].max())
        margin = 0.05 * (top - bottom) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
    suggestion = found.suggestion
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
    save_figure(figure, path)
