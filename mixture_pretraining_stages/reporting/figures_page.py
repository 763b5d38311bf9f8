"""
Panels as what plotly.js draws in a page: plain data, so that names from users need escaping once.
"""

import html
import math
from typing import Any, Dict, List, Sequence

from .figures import Bar, Panel, Series

__all__ = ["to_plotly"]

FONT = {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12}
GRID = "#e6e6e6"


def to_plotly(panel: Panel) -> Dict[str, Any]:
    """``data`` and ``layout`` of a figure. The traces of an arm have its name as ``meta``."""
    data: List[Dict[str, Any]] = []
    for series in panel.series:
        if series.low is not None and series.line:
            data.append(_band(series))
        data.append(_trace(series))
    data += [_bar(bar, panel) for bar in panel.bars]
    return {"data": data, "layout": _layout(panel)}


def _text(name: str) -> str:
    # plotly.js takes some HTML in texts.
    return html.escape(name, quote=False)


def _numbers(values: Sequence[Any]) -> List[Any]:
    """JSON has no numbers that are not finite."""
    return [x if x is not None and math.isfinite(x) else None for x in values]


def _common(series: Series) -> Dict[str, Any]:
    return {
        "type": "scatter",
        "name": _text(series.name),
        "meta": series.name,
        "visible": series.prominent,
        "showlegend": False,
    }


def _trace(series: Series) -> Dict[str, Any]:
    style = series.style
    modes = [
        mode for mode, wanted in (("lines", series.line), ("markers", series.points)) if wanted
    ]
    trace = {
        **_common(series),
        "x": _numbers(series.x),
        "y": _numbers(series.y),
        "mode": "+".join(modes),
        "line": {"color": style.color, "dash": style.dash, "width": 1.8},
        "marker": {
            "color": style.color,
            "symbol": {"x": "x-thin"}.get(style.symbol, style.symbol),
            "size": series.size,
            "line": {
                "color": style.color,
                "width": 2 if style.symbol in ("x", "circle-open") else 0,
            },
        },
    }
    if series.low is not None and series.high is not None and not series.line:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": _numbers([b - y for y, b in zip(series.y, series.high)]),
            "arrayminus": _numbers([y - a for y, a in zip(series.y, series.low)]),
            "color": style.color,
            "thickness": 1.2,
            "width": 3,
        }
    return trace


def _band(series: Series) -> Dict[str, Any]:
    assert series.low is not None and series.high is not None
    red, green, blue = (int(series.style.color[i : i + 2], 16) for i in (1, 3, 5))
    return {
        **_common(series),
        "x": _numbers([*series.x, *reversed(series.x)]),
        "y": _numbers([*series.high, *reversed(series.low)]),
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.13)",
        "hoverinfo": "skip",
    }


def _bar(bar: Bar, panel: Panel) -> Dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": _text(bar.name),
        "x": _numbers(bar.values),
        "y": list(range(len(panel.categories))),
        "text": [_text(name) for name in panel.categories],
        "textposition": "none",
        "hovertemplate": "%{text}: %{x}",
        "marker": {"color": bar.color, "pattern": {"shape": "/" if bar.hatch else ""}},
    }


def _layout(panel: Panel) -> Dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True, "linecolor": "#999"}
    layout: Dict[str, Any] = {
        "font": FONT,
        "height": 340,
        "margin": {"l": 56, "r": 12, "t": 10, "b": 48},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "hovermode": "closest",
        "xaxis": {**axis, "title": {"text": _text(panel.x_label)}},
        "yaxis": {**axis, "title": {"text": _text(panel.y_label)}},
    }
    if panel.log_x:
        layout["xaxis"].update(type="log", exponentformat="e")
        if _decades(panel) <= 1:  # or there would be one number
            layout["xaxis"]["dtick"] = "D2"
    if panel.y_range is not None:
        layout["yaxis"]["range"] = list(panel.y_range)
    if panel.bars:
        layout["yaxis"].update(
            tickmode="array",
            tickvals=list(range(len(panel.categories))),
            ticktext=[_text(_short(name)) for name in panel.categories],
            range=[len(panel.categories) - 0.5, -0.5],
        )
        layout["height"] = 110 + 22 * len(panel.categories) * (1 if panel.stacked else 1.6)
        layout["barmode"] = "stack" if panel.stacked else "group"
        layout["legend"] = {
            **{"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        }
        layout["margin"]["t"] = 34
    return layout


def _decades(panel: Panel) -> float:
    x = [value for series in panel.series for value in series.x if value > 0]
    return math.log10(max(x) / min(x)) if x else 0.0


def _short(name: str) -> str:
    """A name that leaves room for the bars."""
    return name if len(name) <= 28 else f"{name[:25]}..."
