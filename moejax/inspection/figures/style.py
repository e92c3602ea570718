"""How every figure looks.

Each figure is small (a phone's width) with type that stays readable there; a page sets several side
by side where there is room. Matplotlib is used through its objects alone: no pyplot, no global
state left behind. Colours are those of Okabe and Ito (2008), told apart by colour-blind readers;
lines also differ in dash, points in shape, bars in hatch.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.inspection.html import FORBIDDEN

WIDTH = 4.0  # inches; at 96 px each, a phone shows the figure in its natural size
PNG_DPI = 200
MAX_TICKS = 16  # of names below one another
MEASURED_TICKS = 5  # at most, of evaluations on an x axis
RATIO_TICKS = ((-2, "¼"), (-1, "½"), (0, "1"), (1, "2"), (2, "4"))
COLORS = 41  # of a heat map: odd, so that a ratio of 1 is white; few, so that it compresses
BLUE, ORANGE, GREEN, PURPLE, GREY, DEAD = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#6b7280",
    "#111111",
)
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


class DrawingError(ValueError):
    """A figure cannot be written so."""


class Drawing(str):
    """A finished figure: as text an SVG data URI, ready for a page; in a notebook it shows itself.

    Attributes:
      figure: matplotlib's, to look into or to change and draw again.
    """

    figure: Figure

    @classmethod
    def from_figure(cls, figure: Figure) -> "Drawing":
        """Draws the figure; the same one gives the same text."""
        drawing = cls(f"data:image/svg+xml;base64,{base64.b64encode(svg_bytes(figure)).decode()}")
        drawing.figure = figure
        return drawing

    @property
    def svg(self) -> bytes:
        """The SVG file, on a transparent ground."""
        return base64.b64decode(self.partition(",")[2])

    @property
    def png(self) -> bytes:
        """A PNG file of `PNG_DPI` dots per inch, on white."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            FigureCanvasAgg(self.figure)
            self.figure.savefig(
                buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None}
            )
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Writes the figure.

        Args:
          path: ends in `.svg`, for a vector graphic, or in `.png`.

        Raises:
          DrawingError: another ending.
        """
        path = Path(path)
        if path.suffix not in (".svg", ".png"):
            raise DrawingError(
                f"{path} must end in .svg or .png; no other kind of figure is written"
            )
        path.write_bytes(self.svg if path.suffix == ".svg" else self.png)
        return path

    def _repr_html_(self) -> str:
        return f'<img src="{self}" alt="figure" style="max-width:100%;background:#fff">'


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


def short_number(x: float) -> str:
    """Three significant digits and a unit: 950, 12.5k, 3.4M, 1.2B."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= 0.9995 * size:
            return f"{float(f'{x / size:.3g}'):g}{unit}"
    return f"{float(f'{x:.3g}'):g}"


def legend_name(name: str) -> str:
    """The name of a run or a domain as matplotlib and SVG can show it; labels that begin with _ it would leave out."""
    name = name.translate(dict.fromkeys(FORBIDDEN, 0xFFFD))
    return f"./{name}" if name.startswith("_") else name


def label_steps(axes: Axes, xlabel: str = "training step") -> None:
    """An x axis of training, long numbers in short."""
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=xlabel == "training step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_number(x)))


def tick_at(axes: Axes, places: np.ndarray) -> None:
    """Ticks of the x axis where something was measured: at all of the places, or at every nth up to the last."""
    known = np.unique(places[np.isfinite(places)]).astype(float)
    stride = max(1, math.ceil(known.size / MEASURED_TICKS))
    if known.size:
        axes.set_xticks(np.sort(known[::-1][::stride]))


def heat_map(axes: Axes, values: np.ndarray, edges: np.ndarray | None = None, **look: Any) -> Any:
    """Cells, the first row on top; masked where they are not finite.

    Args:
      axes: to draw on.
      values: [rows, columns].
      edges: of the columns; None: each is as wide as 1, around its index.
      look: for `pcolormesh`.
    """
    rows, columns = values.shape
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5 if edges is None else edges, np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(values), rasterized=True, antialiased=False, **look,
    )  # fmt: skip
    axes.grid(False)
    axes.invert_yaxis()
    return mesh


def color_bar(figure: Figure, axes: Axes, mesh: Any, label: str, **more: Any) -> Colorbar:
    """The scale of a heat map."""
    bar = figure.colorbar(mesh, ax=axes, aspect=24, pad=0.02, **more)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return bar


def ratio_bar(figure: Figure, axes: Axes, mesh: Any, label: str) -> None:
    """The scale of a heat map whose values are base-2 logarithms of ratios."""
    bar = color_bar(figure, axes, mesh, label, extend="both", extendfrac=0.04)
    bar.set_ticks([tick for tick, _ in RATIO_TICKS], labels=[tick for _, tick in RATIO_TICKS])


def name_rows(axes: Axes, names: Any) -> None:
    """Names the rows of a heat map, evenly spaced ones if there are many."""
    shown = range(0, len(names), -(-len(names) // MAX_TICKS))
    axes.set_yticks(shown, labels=[str(names[i]) for i in shown])
