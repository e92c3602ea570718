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
    longest = max(row["ratio_to_dense"] for row in bars)
    step = 0.8 / len(names)  # between the bars of a shape
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.9 + 0.22 * len(bars) + 0.2 * len(shapes))
        for i, name in enumerate(names):
            offset = (i - (len(names) - 1) / 2) * step
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
                axes.text(ratio + 0.01 * longest, place, f"{ratio:.2f}", va="center")
        axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(shapes)), labels=shapes)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.12 * longest)
        axes.set_xlabel(f"time / dense layer\n{direction.replace('_', ' and ')}")
        if len(names) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        return svg_bytes(figure)


def _is_bar(row: dict[str, Any], direction: str) -> bool:
    return row["direction"] == direction and row["implementation"] != "dense_layer"


def _label(row: dict[str, Any]) -> str:
    """Returns the shape of a layer, in two lines."""
    experts = f"E {row['num_experts']}, K {row['top_k']}, F {row['d_expert']}"
    inputs = f"{row['tokens']} tokens, D {row['d_model']}"
    if row["skewed"]:
        inputs += ", skewed"
    return f"{experts}\n{inputs}"
