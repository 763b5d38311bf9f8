"""
Panels as pictures, drawn by Matplotlib.
"""

from pathlib import Path
from typing import Any, Dict, List

from ..pictures import new_figure, save_figure
from .figures import Panel, Series

__all__ = ["draw_png"]

DASHES: Dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1, 1.4)),
    "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (9, 3)),
}
MARKERS = {
    **{"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"},
    **{"star": "*", "x": "x", "circle-open": "o"},
}
GREY = "0.82"


def draw_png(panel: Panel, path: Path) -> None:
    """Draw a panel into a file."""
    rows = len(panel.categories) * (1 if panel.stacked else 1.6)
    height = 1.4 + 0.26 * rows if panel.bars else 4.4
    figure = new_figure(8.5, height)
    axes = figure.subplots()
    for series in sorted(panel.series, key=lambda each: each.prominent):
        _draw(axes, series)
    if panel.bars:
        _draw_bars(axes, panel)
    axes.set(xlabel=_text(panel.x_label), ylabel=_text(panel.y_label))
    axes.set_title(_text(panel.title), fontsize="medium")
    axes.grid(alpha=0.3, axis="x" if panel.bars else "both")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log_x and any(x > 0 for series in panel.series for x in series.x):
        axes.set_xscale("log")
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    _legend(axes, panel)
    save_figure(figure, path, dpi=120)


def _text(name: str) -> str:
    return name.replace("$", r"\$")  # no formulas


def _draw(axes: Any, series: Series) -> None:
    style = series.style
    color = style.color if series.prominent else GREY
    marker = MARKERS[style.symbol] if series.points else ""
    common: Dict[str, Any] = {
        "color": color,
        "marker": marker,
        "markersize": series.size * 0.75,
        "linestyle": DASHES[style.dash] if series.line else "",
        "linewidth": 1.5 if series.prominent else 0.8,
        "markerfacecolor": "none" if style.symbol == "circle-open" else color,
    }
    errors = None
    if series.low is not None and series.high is not None:
        if series.line and series.prominent:
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.13, lw=0)
        elif not series.line:
            below = [y - a for y, a in zip(series.y, series.low)]
            above = [b - y for y, b in zip(series.y, series.high)]
            errors = [below, above]
    axes.errorbar(series.x, series.y, yerr=errors, elinewidth=1, capsize=2, **common)


def _draw_bars(axes: Any, panel: Panel) -> None:
    places = range(len(panel.categories))
    ends = [0.0] * len(panel.categories)
    width = 0.75 if panel.stacked else 0.75 / len(panel.bars)
    for index, bar in enumerate(panel.bars):
        values = [value or 0.0 for value in bar.values]
        shift = 0.0 if panel.stacked else (index - (len(panel.bars) - 1) / 2) * width
        axes.barh(
            [place + shift for place in places],
            values,
            width,
            left=ends if panel.stacked else None,
            color=bar.color,
            hatch="//" if bar.hatch else None,
            edgecolor="white",
            linewidth=0,
            label=_text(bar.name),
        )
        ends = [end + value for end, value in zip(ends, values)]
    axes.set_yticks(places, [_text(name) for name in panel.categories], fontsize="small")
    axes.set_ylim(len(panel.categories) - 0.5, -0.5)


def _legend(axes: Any, panel: Panel) -> None:
    from matplotlib.lines import Line2D

    handles: List[Any] = []
    for name in dict.fromkeys(series.name for series in panel.series):
        labelled = [s for s in panel.series if s.name == name and s.labelled and s.prominent]
        if labelled:
            style = labelled[0].style
            marker = MARKERS[style.symbol] if labelled[0].points else ""
            handles.append(
                Line2D([], [], color=style.color, linestyle=DASHES[style.dash], marker=marker)
            )
            handles[-1].set_label(_text(name))
    hidden = {series.name for series in panel.series if not series.prominent}
    if hidden:
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, label=f"{len(hidden)} others"))
    if panel.bars:
        handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(
            handles=handles,
            fontsize="small",
            frameon=False,
            handlelength=3.2,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )
