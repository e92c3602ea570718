"""The figure of `moejax bench layer`: how much longer than a dense layer with the same active FLOPs."""

from collections.abc import Sequence
from typing import Any

import matplotlib

from moejax.inspection.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    new_figure,
    svg_bytes,
)

COLORS = (BLUE, ORANGE, GREEN, PURPLE)
HATCHES = ("", "///", "\\\\\\", "xx")


def draw_layers(rows: Sequence[dict[str, Any]]) -> bytes:
    """An SVG with a bar for each shape and implementation, of forward and backward together if they were measured.

    Args:
      rows: of `bench_layer`; those of the dense layer are the line at 1.
    """
    direction = rows[-1]["direction"]
    bars = [
        row
        for row in rows
        if row["direction"] == direction and row["implementation"] != "dense_layer"
    ]
    names = list(dict.fromkeys(row["implementation"] for row in bars))
    shapes = list(dict.fromkeys(_label(row) for row in bars))
    highest, step = max(row["ratio_to_dense"] for row in bars), 0.8 / len(names)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.9 + 0.22 * len(bars) + 0.2 * len(shapes))
        for i, name in enumerate(names):
            of_name = [row for row in bars if row["implementation"] == name]
            axes.barh(
                [shapes.index(_label(row)) + (i - (len(names) - 1) / 2) * step for row in of_name],
                [row["ratio_to_dense"] for row in of_name],
                height=0.92 * step, color=COLORS[i % 4], hatch=HATCHES[i % 4], edgecolor="white", label=name,
            )  # fmt: skip
            for row in of_name:
                y = shapes.index(_label(row)) + (i - (len(names) - 1) / 2) * step
                axes.text(
                    row["ratio_to_dense"] + 0.01 * highest,
                    y,
                    f"{row['ratio_to_dense']:.2f}",
                    va="center",
                )
        axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(shapes)), labels=shapes)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.12 * highest)
        axes.set_xlabel(f"time / dense layer\n{direction.replace('_', ' and ')}")
        if len(names) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        return svg_bytes(figure)


def _label(row: dict[str, Any]) -> str:
    sizes = f"E {row['num_experts']}, K {row['top_k']}, F {row['d_expert']}"
    return f"{sizes}\n{row['tokens']} tokens, D {row['d_model']}" + (
        ", skewed" if row["skewed"] else ""
    )
