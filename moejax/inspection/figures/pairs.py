"""Figures of pairs of experts that the same tokens visit, in one layer or in successive ones."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from moejax.inspection.analysis.expert_profile import coactivation_ratio
from moejax.inspection.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    Drawing,
    heat_map,
    log_ratio,
    new_figure,
    ratio_bar,
    ratio_colors,
)

MAX_EXPERTS = 64  # of a heat map: those with the strongest pairs
MAX_FLOWS = 40  # between two layers
MAX_BLOCKS = 64  # with gaps between them; of more experts, a column is one block
MIN_Z = 3.0  # standard deviations above independence
FLOW_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#8c6d1f", GREY)
GAP = 0.25  # all gaps of a column together; the blocks have a height of 1
NODE = 0.05  # half a column's width
RECTANGLE = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY]
CURVE = [Outline.CURVE4] * 3
BAND = [Outline.MOVETO, *CURVE, Outline.LINETO, *CURVE, Outline.CLOSEPOLY]


def draw_coactivation(coactivation_EE: Int[np.ndarray, "E E"]) -> Drawing:
    """Draws which experts of a layer the same tokens visit, over what loads alone would give.

    White is chance, red more, blue less often together, black never; grey is the diagonal, and
    pairs that are too rare. The scale is logarithmic. Of more than `MAX_EXPERTS` experts, those
    with the pairs furthest above chance are drawn.

    Args:
      coactivation_EE: tokens that visit both, from `evaluations.read()["coactivation"]`
        of one layer.
    """
    ratio_EE = coactivation_ratio(coactivation_EE)
    shown = _strongest_experts(ratio_EE, coactivation_EE)
    shown_ratio_ee = ratio_EE[np.ix_(shown, shown)]
    log_ee = log_ratio(shown_ratio_ee)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.0)
        mesh = heat_map(axes, log_ee, cmap=ratio_colors(), norm=Normalize(-2, 2))
        axes.set_aspect("equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
            if len(shown) < len(coactivation_EE):
                axis.set_major_formatter(lambda x, _: _name_of(shown, x))
        axes.set_xlabel("and expert")
        axes.set_ylabel("expert")
        ratio_bar(figure, axes, mesh, "tokens of both / chance")
        return Drawing.from_figure(figure)


def _name_of(experts: np.ndarray, place: float) -> str:
    """Returns the expert at a place of an axis; matplotlib may ask beyond its ends."""
    if not 0 <= place < len(experts):
        return ""
    return str(experts[int(place)])


def _strongest_experts(ratio_EE: np.ndarray, coactivation_EE: np.ndarray) -> Int[np.ndarray, "e"]:
    """Returns the experts whose strongest pair has the most evidence, in increasing order."""
    num_experts = len(ratio_EE)
    if num_experts <= MAX_EXPERTS:
        return np.arange(num_experts)
    is_known_EE = np.nan_to_num(ratio_EE) > 0
    safe_ratio_EE = np.where(is_known_EE, ratio_EE, 1.0)
    evidence_EE = coactivation_EE * np.log(safe_ratio_EE)
    evidence_EE = np.nan_to_num(evidence_EE)
    strongest_E = evidence_EE.max(axis=1)
    order_E = np.argsort(-strongest_E, kind="stable")
    return np.sort(order_E[:MAX_EXPERTS])


def strongest_flows(
    counts_EE: Int[np.ndarray, "E E"],
    expected_EE: Float[np.ndarray, "E E"],
    most: int = MAX_FLOWS,
) -> list[tuple[int, int]]:
    """Returns pairs (from, to) of experts with more tokens than independence gives.

    The largest excess comes first.

    Args:
      counts_EE: one step of `token_flow`.
      expected_EE: of the same.
      most: how many at most; pairs less than `MIN_Z` standard deviations above what is expected
        are left out.
    """
    num_experts = len(counts_EE)
    excess_EE = counts_EE - expected_EE
    variance_EE = np.maximum(expected_EE, 1e-9)
    deviation_EE = np.sqrt(variance_EE)
    is_clear_EE = excess_EE > MIN_Z * deviation_EE
    rank_EE = np.where(is_clear_EE, excess_EE, -np.inf)
    order = np.argsort(-rank_EE, axis=None, kind="stable")
    strongest = order[:most].tolist()
    pairs = [divmod(cell, num_experts) for cell in strongest]
    return [pair for pair in pairs if is_clear_EE[pair]]


def draw_flow(
    counts_MEE: Int[np.ndarray, "M E E"],
    expected_MEE: Float[np.ndarray, "M E E"],
    layers: Sequence[int],
) -> Drawing:
    """Draws the paths of tokens through the experts of neighbouring MoE layers.

    A column is a layer, a block an expert, as high as its share of tokens. A band is as wide as the
    share of tokens that go from one expert to the other; drawn are those furthest above
    independence, and below each step is written what share of tokens they hold. Pairs at or below
    chance are left out.

    Args:
      counts_MEE: M steps of `token_flow` with `num_choices=1`, of tokens with an expert in every
        layer; at least one, and five or so fit.
      expected_MEE: of the same.
      layers: model layer of each of the M + 1 columns.
    """
    loads = [counts_EE.sum(axis=1) for counts_EE in counts_MEE]
    loads.append(counts_MEE[-1].sum(axis=0))
    gap = GAP if counts_MEE.shape[1] <= MAX_BLOCKS else 0.0
    columns = [_blocks(load_E, gap) for load_E in loads]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.6)
        shares = []
        for m, counts_EE in enumerate(counts_MEE):
            pairs = strongest_flows(counts_EE, expected_MEE[m])
            total = max(int(counts_EE.sum()), 1)
            share_EE = counts_EE / total
            in_bands = sum(int(counts_EE[pair]) for pair in pairs)
            shares.append(in_bands / total)
            left, right = columns[m : m + 2]
            bands = _bands(pairs, share_EE, left.top_E, right.top_E)
            _draw_bands(axes, m, bands)
        for m, column in enumerate(columns):
            _draw_blocks(axes, m, column)
        axes.set_xlim(-0.22, len(columns) - 0.78)
        axes.set_ylim(1 + gap, 0)
        axes.grid(False)
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        _label_columns(axes, layers, shares)
        axes.set_xlabel("layer, and between two the share of tokens in bands")
        return Drawing.from_figure(figure)


def _label_columns(axes: Axes, layers: Sequence[int], shares: Sequence[float]) -> None:
    """Names layers below their columns, and shares of tokens between them."""
    prefix = "layer " if len(layers) < 4 else ""
    layer_names = [f"{prefix}{layer}" for layer in layers]
    share_names = [f"{share:.0%}" for share in shares]
    layer_places = np.arange(len(layers))
    share_places = np.arange(len(shares)) + 0.5
    places = np.append(layer_places, share_places)
    axes.set_xticks(places, labels=[*layer_names, *share_names])
    axes.tick_params(length=0)


class _Blocks(NamedTuple):
    """The experts of a layer from top to bottom: the loads fill 1 in all, and gaps come on top."""

    top_E: np.ndarray
    bottom_E: np.ndarray


def _blocks(load_E: Int[np.ndarray, "E"], gap: float) -> _Blocks:
    """Returns blocks as high as the experts' loads; all gaps together have the height `gap`."""
    total = max(int(load_E.sum()), 1)
    share_E = load_E / total
    num_gaps = max(len(load_E) - 1, 1)
    height_with_gap_E = share_E + gap / num_gaps
    bottom_with_gap_E = np.cumsum(height_with_gap_E)
    top_E = np.append(0.0, bottom_with_gap_E[:-1])
    return _Blocks(top_E, top_E + share_E)


def _draw_blocks(axes: Axes, m: int, blocks: _Blocks) -> None:
    """Draws one path for all experts of a layer, and their numbers where there is room.

    Many experts are one block.
    """
    top_E, bottom_E = blocks
    if len(top_E) > MAX_BLOCKS:
        top_E = top_E[:1]
        bottom_E = bottom_E[-1:]
    left = m - NODE
    right = m + NODE
    corners: list[tuple[float, float]] = []
    for top, bottom in zip(top_E, bottom_E, strict=True):
        corners += _rectangle(left, right, top, bottom)
    num_blocks = len(top_E)
    outline = Outline(corners, RECTANGLE * num_blocks)
    patch = PathPatch(outline, facecolor="#374151", lw=0, zorder=3)
    axes.add_patch(patch)
    if 1 < num_blocks <= 16:
        x = right + 0.02
        middle_E = (top_E + bottom_E) / 2
        for expert, y in enumerate(middle_E):
            axes.text(x, y, str(expert), va="center", ha="left", fontsize=8.5, zorder=4)


def _rectangle(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    """Returns the corners of a rectangle, the first one again at the end."""
    return [
        (left, top),
        (right, top),
        (right, bottom),
        (left, bottom),
        (left, top),
    ]


class _Band(NamedTuple):
    """Tokens that go from one expert to another: the tops of both ends, and the width."""

    expert: int
    start: float
    end: float
    width: float


def _bands(
    pairs: Sequence[tuple[int, int]],
    share_EE: Float[np.ndarray, "E E"],
    left_top_E: np.ndarray,
    right_top_E: np.ndarray,
) -> list[_Band]:
    """Stacks bands at both of their ends, in the order of `pairs`.

    They leave a block in the order of where they go, and arrive in that of where they come from.
    """
    leaving_E = left_top_E.copy()
    arriving_E = right_top_E.copy()
    starts = {}
    ends = {}
    for pair in sorted(pairs):
        source, _ = pair
        starts[pair] = leaving_E[source]
        leaving_E[source] += share_EE[pair]
    for pair in sorted(pairs, key=lambda pair: pair[::-1]):
        _, target = pair
        ends[pair] = arriving_E[target]
        arriving_E[target] += share_EE[pair]
    bands = []
    for pair in pairs:
        source, _ = pair
        bands.append(_Band(source, starts[pair], ends[pair], share_EE[pair]))
    return bands


def _draw_bands(axes: Axes, m: int, bands: Sequence[_Band]) -> None:
    """Draws bands from column m to the next one, the strongest on top."""
    left = m + NODE
    right = m + 1 - NODE
    num_colors = len(FLOW_COLORS)
    for band in reversed(bands):
        color = FLOW_COLORS[band.expert % num_colors]
        outline = _outline(band, left, right)
        patch = PathPatch(outline, facecolor=color, alpha=0.55, lw=0, zorder=2)
        axes.add_patch(patch)


def _outline(band: _Band, left: float, right: float) -> Outline:
    """Returns a band between two places of the x axis.

    Each edge is a Bézier curve that begins and ends horizontally.
    """
    middle = (left + right) / 2
    upper = [
        (left, band.start),
        (middle, band.start),
        (middle, band.end),
        (right, band.end),
    ]
    lower = [(x, y + band.width) for x, y in reversed(upper)]
    return Outline([*upper, *lower, upper[0]], BAND)
