"""
The page of a report. Every text is escaped: names come from users.
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, List, Mapping, Sequence

from .criteria import Criterion
from .drawn import Drawn
from .figures import Panel, Style
from .figures_page import to_plotly
from .panels import CURVES
from .statistics import Study
from .tables import ARM, COLUMNS, VERDICT, arm_row, rate_rows, run_rows

__all__ = ["Content", "render"]

FOLDER = Path(__file__).with_name("assets")

LINES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 3 2 3", "longdash": "10 4"}

RATES = ("arm", "rate", "seeds", "mean loss", "standard deviation", "failed or diverged")
RUNS = ("arm", "rate", "seed", "state", "last step", "final loss", "why", "folder")


@dataclass(frozen=True)
class Content:
    """What a page has."""

    title: str
    made: str
    statement: Sequence[str]
    criteria: Sequence[Criterion]
    notes: Sequence[str]
    study: Study
    drawn: Sequence[Drawn]
    panels: Sequence[Panel]
    configs: Mapping[str, str]
    """By name, the text of a YAML file."""
    facts: Sequence[Sequence[str]]
    """Runs, versions, device and ranks, of runs that have them alike."""


FACTS = ("runs", "versions", "device", "ranks", "parameters", "command of the first")


def render(content: Content) -> str:
    """A page of HTML that needs nothing else."""
    from plotly.offline import get_plotlyjs

    figures = {panel.key: to_plotly(panel) for panel in content.panels}
    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',  # or a browser asks for one
            f"<title>{escape(content.title)}</title>",
            f"<style>\n{style}</style></head><body>",
            f"<h1>{escape(content.title)}</h1>",
            f'<p class="made">Made by olmo-optim report, {escape(content.made)}</p>',
            *_sections(content),
            f'<script type="application/json" id="figures">{_json(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{script}</script>",
            "</body></html>\n",
        ]
    )


def _json(value: Any) -> str:
    """That no text in it ends the element it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _sections(content: Content) -> List[str]:
    study = content.study
    return [
        "<h2>What was found</h2>",
        '<div class="found">',
        *(f"<p>{escape(sentence)}</p>" for sentence in content.statement),
        "</div>",
        *_criteria(content.criteria),
        "<h2>All arms</h2>",
        _arms(content),
        _meanings(),
        "<h2>To beware of</h2>",
        _list(content.notes) if content.notes else "<p>Nothing.</p>",
        "<h2>Figures</h2>",
        *_figures(content),
        "<h2>Details</h2>",
        _details("All learning rates", _table(RATES, rate_rows(study), ("arm",))),
        _details("All runs", _table(RUNS, run_rows(study), ("arm", "state", "why", "folder"))),
        _details(
            "Versions and machines",
            _table(FACTS, content.facts, ("versions", "device", "command of the first")),
        ),
        *(
            _details(f"Config: {name}", f"<pre>{escape(text)}</pre>")
            for name, text in content.configs.items()
        ),
    ]


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _criteria(criteria: Sequence[Criterion]) -> List[str]:
    if not criteria:
        return []
    words = {True: ("met", "met"), False: ("unmet", "not met"), None: ("", "not known")}
    rows = []
    for each in criteria:
        kind, word = words[each.met]
        rows.append(
            f'<tr><td class="text">{escape(each.name)}</td><td class="text {kind}">{word}</td>'
            f'<td class="text long">{_list(each.evidence)}</td></tr>'
        )
    head = "".join(f'<th class="text">{each}</th>' for each in ("criterion", "", "evidence"))
    return [
        "<h2>Criteria of success</h2>",
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    ]


def _arms(content: Content) -> str:
    head = "".join(
        f'<th{_class(c.text)} title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in COLUMNS
    )
    rows = []
    for each in content.drawn:
        cells = arm_row(each.arm)
        row = []
        for column in COLUMNS:
            cell = escape(cells[column.title])
            if column is ARM:
                cell = f'<div class="name">{_line(each.style)}<span>{cell}</span></div>'
            claims = column is VERDICT and cell in ("better", "worse")
            row.append(f"<td{_class(column.text, cell if claims else '')}>{cell}</td>")
        rows.append(f"<tr>{''.join(row)}</tr>")
    return (
        f'<div class="scroll"><table class="arms"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _class(text: bool, *others: str) -> str:
    names = [name for name in (("text" if text else ""), *others) if name]
    return f' class="{" ".join(names)}"' if names else ""


def _meanings() -> str:
    rows = "".join(f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in COLUMNS)
    return _details("What the columns mean", f"<dl>{rows}</dl>")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[str]) -> str:
    kinds = [_class(name in texts, "long" if name in ("why", "versions") else "") for name in head]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head))
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{escape(cell)}</td>' for k, cell in zip(kinds, row))}</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _line(style: Style) -> str:
    return (
        '<svg class="line" width="26" height="10" aria-hidden="true"><line x1="0" y1="5" x2="26" '
        f'y2="5" stroke="{style.color}" stroke-width="2.5" stroke-dasharray="{LINES[style.dash]}"/>'
        "</svg>"
    )


def _figures(content: Content) -> List[str]:
    buttons = [
        f'<button type="button" data-arm="{escape(each.arm.name)}" '
        f'aria-pressed="{str(each.prominent).lower()}">{_line(each.style)}'
        f"<span>{escape(each.arm.name)}</span></button>"
        for each in content.drawn
        if any(each.arm.name in panel.names for panel in content.panels if panel.series)
    ]
    if len(buttons) > 1:
        buttons += [
            f'<button type="button" class="all" data-all="{value}">{word}</button>'
            for value, word in (("true", "show all"), ("false", "hide all"))
        ]
    # Bars apart, as they differ in height.
    grids = [
        _grid([panel for panel in content.panels if bool(panel.bars) == bars])
        for bars in (False, True)
    ]
    if not content.panels:
        return ["<p>There is nothing to draw yet.</p>"]
    return [
        f'<p class="caption">{CURVES}</p>',
        '<p class="caption">A click on an arm hides it or shows it in all figures; a figure is '
        "zoomed by dragging, and back by a double click. The same figures are beside this page as "
        "PNG files.</p>",
        "<noscript><p>The figures need JavaScript; the PNG files beside this page do not.</p>"
        "</noscript>",
        f'<div class="legend" role="group" aria-label="arms">{"".join(buttons)}</div>',
        *grids,
    ]


def _grid(panels: Sequence[Panel]) -> str:
    plots = [
        f"<figure><h3>{escape(panel.title)}</h3>"
        f'<div class="plot" id="plot-{escape(panel.key)}"></div>'
        f'<figcaption class="caption">{escape(panel.caption)}</figcaption></figure>'
        for panel in panels
    ]
    return f'<div class="plots">{"".join(plots)}</div>'
