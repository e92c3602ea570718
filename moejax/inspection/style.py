"""How every figure looks.

Each figure is small (a phone's width) with type that stays readable there; a page sets several side by side where
there is room. Matplotlib is used through its objects alone: no pyplot, no global state left behind. Colours are those
of Okabe and Ito (2008), told apart by colour-blind readers; lines also differ in dash, points in shape, bars in hatch.
"""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH = 4.0  # inches; at 96 px each, a phone shows the figure in its natural size
BLUE, ORANGE, GREEN, PURPLE, GREY, DEAD = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b7280", "#111111"
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))
STYLE: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#374151",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.color": "#374151",
    "text.parse_math": False,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.5,
    "savefig.facecolor": "none",  # the page's ground shows through
    "axes.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: a third of the size
    "svg.hashsalt": "moejax",  # the same run gives the same file
}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty chart as wide as a phone; draw it under `STYLE`."""
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
    figure = Figure(figsize=(WIDTH, height), dpi=144, facecolor="none", layout=layout)
    return figure, figure.add_subplot()


def svg_bytes(figure: Figure) -> bytes:
    """The finished figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
