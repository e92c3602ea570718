"""A colour for each of many runs: by its name, and never that of another run."""

import colorsys
import hashlib

import matplotlib
from matplotlib.colors import to_hex

from moejax.inspection.figures.style import BLUE, GREEN, ORANGE, PURPLE

FIRST = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#B07C00", "#6A3D9A", "#7A2E2E")
"""Colours that are easiest to distinguish, mostly from Okabe and Ito (2008)."""

GOLDEN = 0.6180339887  # of the circle of hues: each further hue falls into the widest gap
LIGHTNESS = (0.40, 0.55, 0.28)


def nth_color(n: int) -> str:
    """Returns the n-th colour of an endless list without repetition.

    `FIRST`, then hues around the circle.
    """
    if n < len(FIRST):
        return FIRST[n]
    further = n - len(FIRST)
    turns = 0.05 + GOLDEN * further
    hue = turns % 1.0
    lightness = LIGHTNESS[n % len(LIGHTNESS)]
    rgb = colorsys.hls_to_rgb(hue, lightness, 0.65)
    return to_hex(rgb)


def load_colors(num_colors: int) -> list[str]:
    """Returns colours from blue to red through white, for loads from below to above uniform."""
    steps = matplotlib.colormaps["RdBu_r"].resampled(num_colors)
    return [to_hex(rgba) for rgba in steps(range(num_colors))]


class RunColors:
    """Colours that are given once and kept.

    A name always asks for the same one of `FIRST`, so that a run keeps its colour when the server
    is started again; if another run has that colour, it gets the next free one.
    """

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def color_of(self, name: str) -> str:
        """Returns the colour of a run; no two runs have the same."""
        if name not in self._given:
            self._given[name] = self._free(name)
        return self._given[name]

    def _free(self, name: str) -> str:
        """Returns the colour that a name asks for, or the next one that no run has."""
        taken = set(self._given.values())
        encoded = name.encode(errors="surrogateescape")
        first_byte, *_ = hashlib.sha256(encoded).digest()
        wanted = first_byte % len(FIRST)
        preferred = (*FIRST[wanted:], *FIRST[:wanted])
        for color in preferred:
            if color not in taken:
                return color
        n = len(FIRST)
        while nth_color(n) in taken:
            n += 1
        return nth_color(n)
