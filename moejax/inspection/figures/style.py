"""How every figure looks.

Each figure is small (a phone's width) with type that stays readable there; a page sets several side
by side where there is room. Matplotlib is used only through its objects: no pyplot, no global
state. Colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish; lines
also differ in dash, points in shape, bars in hatch.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moejax.inspection.html import FORBIDDEN

WIDTH = 4.0  # inches; at 96 px each, a phone shows the figure in its natural size
PNG_DPI = 200
MAX_TICKS = 16  # names in a column
MEASURED_TICKS = 5  # at most, of evaluations on an x axis
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
RATIO_TICKS = ((-2, "¼"), (-1, "½"), (0, "1"), (1, "2"), (2, "4"))
COLORS = 41  # of a heat map: odd, so that a ratio of 1 is white; few, so that it compresses
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY, DEAD = "#6b7280", "#111111"
NO_VALUE = "#9ca3af"  # of a heat map's cell
BAR_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
HATCHES = ("", "///", "\\\\\\", "xx")  # one for each colour of bars
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
    """A figure cannot be written in the kind of file that was asked for."""


class Drawing(str):
    """A finished figure: as text an SVG data URI, ready for a page; in a notebook it shows itself.

    Attributes:
      figure: matplotlib's, to look into or to change and draw again.
    """

    figure: Figure

    @classmethod
    def from_figure(cls, figure: Figure) -> "Drawing":
        """Draws the figure; the same one gives the same text."""
        encoded = base64.b64encode(svg_bytes(figure)).decode()
        drawing = cls(f"data:image/svg+xml;base64,{encoded}")
        drawing.figure = figure
        return drawing

    @property
    def svg(self) -> bytes:
        """The SVG file, on a transparent ground."""
        _, _, encoded = self.partition(",")
        return base64.b64decode(encoded)

    @property
    def png(self) -> bytes:
        """A PNG file of `PNG_DPI` dots per inch, on white."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            FigureCanvasAgg(self.figure)
            self.figure.savefig(
                buffer,
                format="png",
                dpi=PNG_DPI,
                facecolor="white",
                metadata={"Software": None},
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
    """Returns an empty chart as wide as a phone; draw it under `STYLE`."""
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
    figure = Figure(figsize=(WIDTH, height), dpi=144, facecolor="none", layout=layout)
    axes = figure.add_subplot()
    return figure, axes


def svg_bytes(figure: Figure) -> bytes:
    """Returns the SVG of a finished figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def short_number(x: float) -> str:
    """Returns a number with three significant digits and a unit: 950, 12.5k, 3.4M, 1.2B."""
    for size, unit in UNITS:
        if abs(x) >= 0.9995 * size:  # so that 999,900 is 1M rather than 1000k
            return f"{_three_digits(x / size)}{unit}"
    return _three_digits(x)


def _three_digits(x: float) -> str:
    """Returns a number with three significant digits, without zeros at the end."""
    rounded = float(f"{x:.3g}")
    return f"{rounded:g}"


def log_axis(axis: Axis, ticks: Sequence[float] = ()) -> None:
    """Makes an axis logarithmic, with plain numbers at it.

    Args:
      axis: `axes.xaxis` or `axes.yaxis`, once all is drawn.
      ticks: where to write numbers; without any, at about four places of what is shown.
    """
    axes = axis.axes
    if axis is axes.xaxis:
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    if not len(ticks):
        low, high = axis.get_view_interval()
        ticks = np.geomspace(low, high, 6)[1:-1].tolist()
    labels = [short_number(tick) for tick in ticks]
    axis.set_ticks(list(ticks), labels=labels)
    axis.set_minor_locator(NullLocator())


def legend_name(name: str) -> str:
    """Returns the name of a run or a domain as matplotlib and SVG can show it.

    Matplotlib leaves labels that begin with _ out of a legend.
    """
    name = name.translate(dict.fromkeys(FORBIDDEN, 0xFFFD))
    if name.startswith("_"):
        return f"./{name}"
    return name


def label_steps(axes: Axes, xlabel: str = "training step") -> None:
    """Labels an x axis of training, with long numbers in short."""
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=xlabel == "training step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_number(x)))


def tick_at(axes: Axes, places: np.ndarray) -> None:
    """Puts ticks of the x axis where something was measured.

    At all of the places, or at every nth up to the last.
    """
    finite = places[np.isfinite(places)]
    known = np.unique(finite).astype(float)
    if not known.size:
        return
    stride = max(1, math.ceil(known.size / MEASURED_TICKS))
    from_last = known[::-1]
    ticks = from_last[::stride]
    axes.set_xticks(np.sort(ticks))


def heat_map(
    axes: Axes,
    values: np.ndarray,
    edges: np.ndarray | None = None,
    **options: Any,
) -> Any:
    """Draws cells, the first row on top; masked where they are not finite.

    Args:
      axes: to draw on.
      values: [rows, columns].
      edges: of the columns; None: each is as wide as 1, around its index.
      options: for `pcolormesh`.
    """
    num_rows, num_columns = values.shape
    row_edges = np.arange(num_rows + 1) - 0.5
    if edges is None:
        edges = np.arange(num_columns + 1) - 0.5
    mesh = axes.pcolormesh(
        edges,
        row_edges,
        np.ma.masked_invalid(values),
        rasterized=True,
        antialiased=False,
        **options,
    )
    axes.grid(False)
    axes.invert_yaxis()
    return mesh


def write_in_cell(axes: Axes, row: int, column: int, text: str, *, is_dark: bool) -> None:
    """Writes a text into a cell of a heat map, in white where the cell is dark."""
    color = "white" if is_dark else "#111111"
    axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=color)


def color_bar(figure: Figure, axes: Axes, mesh: Any, label: str, **more: Any) -> Colorbar:
    """Draws the scale of a heat map."""
    bar = figure.colorbar(mesh, ax=axes, aspect=24, pad=0.02, **more)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return bar


def ratio_colors() -> Colormap:
    """Returns colours of `log_ratio`: red above 1, blue below, black for 0, grey for NaN."""
    return heat_colors("RdBu_r", bad=NO_VALUE, under=DEAD)


def heat_colors(name: str, **extremes: str) -> Colormap:
    """Returns the colours of a heat map: those of matplotlib's name, and of cells without value."""
    colors = matplotlib.colormaps[name].resampled(COLORS)
    return colors.with_extremes(**extremes)


def log_ratio(ratio: np.ndarray) -> np.ndarray:
    """Returns base-2 logarithms of ratios, clipped to [-2, 2]; -99, below the scale, for 0."""
    is_positive = ratio > 0
    log = np.full_like(ratio, np.nan)
    np.log2(ratio, out=log, where=is_positive)
    clipped = np.clip(log, -2, 2)
    is_zero = ratio == 0
    return np.where(is_zero, -99.0, clipped)


def ratio_bar(figure: Figure, axes: Axes, mesh: Any, label: str) -> None:
    """Draws the scale of a heat map whose values are base-2 logarithms of ratios."""
    bar = color_bar(figure, axes, mesh, label, extend="both", extendfrac=0.04)
    places = [place for place, _ in RATIO_TICKS]
    labels = [label for _, label in RATIO_TICKS]
    bar.set_ticks(places, labels=labels)


def name_rows(axes: Axes, names: Any) -> None:
    """Names the rows of a heat map, evenly spaced ones if there are many."""
    places = every_nth(len(names), MAX_TICKS)
    labels = [str(names[place]) for place in places]
    axes.set_yticks(places, labels=labels)


def every_nth(number: int, most: int) -> range:
    """Returns evenly spaced indices below `number`, at most `most` of them, from 0 on."""
    stride = math.ceil(number / most)
    return range(0, number, stride)
