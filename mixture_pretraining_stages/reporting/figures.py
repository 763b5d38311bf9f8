"""
What a figure shows, said once: it is drawn in a page by plotly.js (``figures_page``) and as a
picture by Matplotlib (``figures_png``).
"""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

__all__ = ["BASELINE_STYLE", "Bar", "Panel", "Series", "Style", "style_of"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
"""
Of Okabe and Ito (jfly.uni-koeln.de/color), which people with any colour vision tell apart; in place
of their yellow, which is too light for lines, wine from Paul Tol's muted scheme.
"""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")


@dataclass(frozen=True)
class Style:
    """How everything of one arm is drawn."""

    color: str
    """``#rrggbb``."""
    dash: str
    """One of :data:`DASHES`."""
    symbol: str
    """One of :data:`SYMBOLS`, ``star``, ``x`` or ``circle-open``."""


BASELINE_STYLE = Style("#000000", "solid", "circle")


def style_of(index: int) -> Style:
    """
    The style of the arm of an index: 35 have a pair of colour and dash of their own, as their
    numbers have no common divisor, and neighbours differ in both.
    """
    place = index % len(DASHES)
    return Style(COLORS[index % len(COLORS)], DASHES[place], SYMBOLS[place])


@dataclass(frozen=True)
class Series:
    """A curve, or points, of one arm."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style
    low: Optional[Sequence[float]] = None
    """Lower end of a band around a curve, or of the error bars of points."""
    high: Optional[Sequence[float]] = None
    line: bool = True
    points: bool = False
    size: float = 6
    """Of points, in pixels."""
    labelled: bool = True
    """Whether it stands for its arm in a legend."""
    prominent: bool = True
    """If not, a page hides it until it is asked for, and a picture draws it thin and grey."""


@dataclass(frozen=True)
class Bar:
    """A bar for each category of a panel."""

    name: str
    values: Sequence[Optional[float]]
    color: str
    hatch: bool = False
    """For those who do not see the colour."""


@dataclass(frozen=True)
class Panel:
    """A figure: curves, or horizontal bars."""

    key: str
    """Name of its file, and of its place in the page."""
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series] = ()
    bars: Sequence[Bar] = ()
    categories: Sequence[str] = ()
    """Of bars, from top to bottom."""
    stacked: bool = True
    log_x: bool = False
    y_range: Optional[Tuple[float, float]] = None
    caption: str = ""

    @property
    def names(self) -> List[str]:
        """Of what is in it, each once."""
        names = [*(each.name for each in self.series), *(each.name for each in self.bars)]
        return list(dict.fromkeys(names))
