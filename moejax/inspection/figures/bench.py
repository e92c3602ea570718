"""The figure of `moejax bench layer`: time over that of a dense layer with equal active FLOPs."""

from collections.abc import Sequence
from typing import Any

import matplotlib

from moejax.inspection.figures.style import (
    BAR_COLORS,
    GREY,
    HATCHES,
    STYLE,
    new_figure,
    svg_bytes,
)


def draw_layers(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draws a bar for each shape and implementation.

    Of forward and backward together if they were measured.

    Args:
      rows: of `bench_layer`; those of the dense layer are the line at 1.

    Returns:
      An SVG file.
    """
    direction = rows[-1]["direction"]
    bars = [row for row in rows if _is_bar(row, direction)]
    names = list(dict.fromkeys(row["implementation"] for row in bars))
    shapes = list(dict.fromkeys(_label(row) for row in bars))
    num_names = len(names)
    longest = max(row["ratio_to_dense"] for row in bars)
    height = 0.9 + 0.22 * len(bars) + 0.2 * len(shapes)
    step = 0.8 / num_names  # between the bars of a shape
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(height)
        for i, name in enumerate(names):
            offset = (i - (num_names - 1) / 2) * step
            of_name = [row for row in bars if row["implementation"] == name]
            places = [shapes.index(_label(row)) + offset for row in of_name]
            ratios = [row["ratio_to_dense"] for row in of_name]
            axes.barh(
                places,
                ratios,
                height=0.92 * step,
                color=BAR_COLORS[i % 4],
                hatch=HATCHES[i % 4],
                edgecolor="white",
                label=name,
            )
            for place, ratio in zip(places, ratios, strict=True):
                x = ratio + 0.01 * longest
                axes.text(x, place, f"{ratio:.2f}", va="center")
        axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(shapes)), labels=shapes)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.12 * longest)
        direction_name = direction.replace("_", " and ")
        axes.set_xlabel(f"time / dense layer\n{direction_name}")
        if num_names > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        return svg_bytes(figure)


def _is_bar(row: dict[str, Any], direction: str) -> bool:
    """Whether a row is drawn: of this direction, and not of the dense layer."""
    return row["direction"] == direction and row["implementation"] != "dense_layer"


def _label(row: dict[str, Any]) -> str:
    """Returns the shape of a layer, in two lines."""
    experts = "E {num_experts}, K {top_k}, F {d_expert}".format_map(row)
    inputs = "{tokens} tokens, D {d_model}".format_map(row)
    if row["skewed"]:
        inputs += ", skewed"
    return f"{experts}\n{inputs}"
