"""Figures of pairs of experts that the same tokens visit: in one layer, and in one layer after another."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from moejax.inspection.figures.style import (
    BLUE,
    COLORS,
    DEAD,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    Drawing,
    heat_map,
    new_figure,
    ratio_bar,
)

MAX_EXPERTS = 64  # of a heat map: those with the strongest pairs
MIN_EXPECTED = 5.0  # tokens, below which a ratio is noise
MAX_FLOWS = 40  # between two layers
MAX_BLOCKS = 64  # set apart by gaps; of more experts, a column is one block
MIN_Z = 3.0  # standard deviations above independence
FLOW_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#8c6d1f", GREY)
GAP, NODE = 0.25, 0.05  # of a column's height, all gaps together; half a column's width
NO_VALUE = "#9ca3af"
ITERATIONS = 300


def expected_coactivation(coactivation_EE: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Tokens that would visit both experts of a pair, if who goes together depended on each expert's load alone.

    Quasi-independence: m_ij = a_i a_j for i != j, with the row sums of the counts; found by
    iterative proportional fitting (Bishop, Fienberg and Holland 1975, Discrete Multivariate
    Analysis, chapter 5). The plain product of loads would not do, for no token visits an
    expert twice.

    Args:
      coactivation_EE: symmetric; the diagonal is not used.

    Returns:
      The expected counts, NaN on the diagonal.
    """
    counts_EE = coactivation_EE.astype(np.float64)
    np.fill_diagonal(counts_EE, 0.0)
    pairs_E = counts_EE.sum(axis=1)
    factors_E = np.sqrt(pairs_E / np.sqrt(max(pairs_E.sum(), 1.0)))
    for _ in range(ITERATIONS):
        rest_E = factors_E.sum() - factors_E
        wanted_E = np.divide(pairs_E, rest_E, out=np.zeros_like(pairs_E), where=rest_E > 0)
        factors_E = np.sqrt(factors_E * wanted_E)  # half a step for both ends of a pair
    expected_EE = factors_E[:, None] * factors_E[None, :]
    np.fill_diagonal(expected_EE, np.nan)
    return expected_EE


def coactivation_ratio(coactivation_EE: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Counts over those expected from loads alone; NaN on the diagonal and where too few are expected to tell."""
    expected_EE = expected_coactivation(coactivation_EE)
    enough_EE = np.nan_to_num(expected_EE) >= MIN_EXPECTED
    return np.divide(
        coactivation_EE, expected_EE, out=np.full(expected_EE.shape, np.nan), where=enough_EE
    )


def draw_coactivation(coactivation_EE: Int[np.ndarray, "E E"]) -> Drawing:
    """Draws which experts of a layer the same tokens visit, over what their loads alone would give.

    White is chance, red more, blue less often together, black never; grey is the diagonal, and
    pairs too rare to tell. The scale is logarithmic. Of more than `MAX_EXPERTS` experts, those with
    the pairs furthest above chance are drawn.

    Args:
      coactivation_EE: tokens that visit both, from `evaluations.read()["coactivation"]`
        of one layer.
    """
    ratio_EE = coactivation_ratio(coactivation_EE)
    shown = _strongest_experts(ratio_EE, coactivation_EE)
    ratio_EE = ratio_EE[np.ix_(shown, shown)]
    log_EE = np.log2(ratio_EE, out=np.full_like(ratio_EE, np.nan), where=ratio_EE > 0)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.0)
        colors = (
            matplotlib.colormaps["RdBu_r"].resampled(COLORS).with_extremes(bad=NO_VALUE, under=DEAD)
        )
        log_EE[ratio_EE == 0] = -99.0  # under the scale
        mesh = heat_map(
            axes,
            np.where(ratio_EE > 0, np.clip(log_EE, -2, 2), log_EE),
            cmap=colors,
            norm=Normalize(-2, 2),
        )
        axes.set_aspect("equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
            if len(shown) < len(coactivation_EE):
                axis.set_major_formatter(
                    lambda x, _: str(shown[int(x)]) if 0 <= x < len(shown) else ""
                )
        axes.set_xlabel("and expert")
        axes.set_ylabel("expert")
        ratio_bar(figure, axes, mesh, "tokens of both / chance")
        return Drawing.from_figure(figure)


def _strongest_experts(ratio_EE: np.ndarray, coactivation_EE: np.ndarray) -> Int[np.ndarray, "e"]:
    """Increasing experts, those whose strongest pair has the most evidence."""
    if len(ratio_EE) <= MAX_EXPERTS:
        return np.arange(len(ratio_EE))
    evidence_EE = coactivation_EE * np.log(np.where(np.nan_to_num(ratio_EE) > 0, ratio_EE, 1.0))
    order_E = np.argsort(-np.nan_to_num(evidence_EE).max(axis=1), kind="stable")
    return np.sort(order_E[:MAX_EXPERTS])


def strongest_flows(
    counts_EE: Int[np.ndarray, "E E"], expected_EE: Float[np.ndarray, "E E"], most: int = MAX_FLOWS
) -> list[tuple[int, int]]:
    """Pairs (from, to) of experts with more tokens than independence gives, the largest excess first.

    Args:
      counts_EE: tokens on their way, one step of `token_flow`.
      expected_EE: of the same.
      most: how many at most; pairs less than `MIN_Z` standard deviations above what is expected
        are left out.
    """
    excess_EE = counts_EE - expected_EE
    clear_EE = excess_EE > MIN_Z * np.sqrt(np.maximum(expected_EE, 1e-9))
    order = np.argsort(-np.where(clear_EE, excess_EE, -np.inf), axis=None, kind="stable")[:most]
    pairs = [divmod(int(cell), len(counts_EE)) for cell in order]
    return [pair for pair in pairs if clear_EE[pair]]


def draw_flow(
    counts_MEE: Int[np.ndarray, "M E E"],
    expected_MEE: Float[np.ndarray, "M E E"],
    layers: Sequence[int],
) -> Drawing:
    """Draws the paths of tokens through the experts of neighbouring MoE layers.

    A column is a layer, a block an expert, as high as its share of tokens. A band is as wide as the
    share of tokens that go from one expert to the other; drawn are those furthest above
    independence, and below each step is written what share of tokens they hold. The rest, at or
    below chance, is left out.

    Args:
      counts_MEE: M steps of `token_flow` with `num_choices=1`, of tokens with an expert in every
        layer; at least one, and five or so fit.
      expected_MEE: of the same.
      layers: model layer of each of the M + 1 columns.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.6)
        loads = [counts_EE.sum(axis=1) for counts_EE in counts_MEE] + [counts_MEE[-1].sum(axis=0)]
        gap = GAP if counts_MEE.shape[1] <= MAX_BLOCKS else 0.0
        columns = [_blocks(load_E, gap) for load_E in loads]
        shares = []
        for m, counts_EE in enumerate(counts_MEE):
            pairs = strongest_flows(counts_EE, expected_MEE[m])
            total = max(int(counts_EE.sum()), 1)
            shares.append(sum(int(counts_EE[pair]) for pair in pairs) / total)
            _draw_bands(axes, m, pairs, counts_EE / total, columns[m], columns[m + 1])
        for m, (low_E, high_E) in enumerate(columns):
            _draw_blocks(axes, m, low_E, high_E)
        axes.set_xlim(-0.22, len(columns) - 0.78)
        axes.set_ylim(1 + gap, 0)
        axes.grid(False)
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        ticks = [
            (float(m), f"layer {layer}" if len(layers) < 4 else str(layer))
            for m, layer in enumerate(layers)
        ]
        ticks += [(m + 0.5, f"{share:.0%}") for m, share in enumerate(shares)]
        axes.set_xticks([x for x, _ in ticks], labels=[name for _, name in ticks])
        axes.tick_params(length=0)
        axes.set_xlabel("layer, and between two the share of tokens in bands")
        return Drawing.from_figure(figure)


def _blocks(load_E: Int[np.ndarray, "E"], gap: float) -> tuple[np.ndarray, np.ndarray]:
    """The top and the bottom of each expert's block; the loads fill 1 and the gaps `gap`."""
    share_E = load_E / max(int(load_E.sum()), 1)
    top_E = np.append(0.0, np.cumsum(share_E + gap / max(len(load_E) - 1, 1)))[:-1]
    return top_E, top_E + share_E


def _draw_blocks(axes: Axes, m: int, top_E: np.ndarray, bottom_E: np.ndarray) -> None:
    """One path for all experts of a layer, or for many one block; and their numbers where there is room."""
    if len(top_E) > MAX_BLOCKS:
        top_E, bottom_E = top_E[:1], bottom_E[-1:]
    corners, codes = [], []
    for top, bottom in zip(top_E, bottom_E, strict=True):
        corners += [
            (m - NODE, top),
            (m + NODE, top),
            (m + NODE, bottom),
            (m - NODE, bottom),
            (m - NODE, top),
        ]
        codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    axes.add_patch(PathPatch(Outline(corners, codes), facecolor="#374151", lw=0, zorder=3))
    if 1 < len(top_E) <= 16:
        for expert, middle in enumerate((top_E + bottom_E) / 2):
            axes.text(
                m + NODE + 0.02, middle, str(expert), va="center", ha="left", fontsize=8.5, zorder=4
            )


def _draw_bands(
    axes: Axes,
    m: int,
    pairs: Sequence[tuple[int, int]],
    share_EE: Float[np.ndarray, "E E"],
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
) -> None:
    """Bands leave a block in the order of where they go, and arrive in that of where they come from."""
    leaving_E, arriving_E = left[0].copy(), right[0].copy()
    starts, ends = {}, {}
    for pair in sorted(pairs):
        starts[pair] = leaving_E[pair[0]]
        leaving_E[pair[0]] += share_EE[pair]
    for pair in sorted(pairs, key=lambda pair: pair[::-1]):
        ends[pair] = arriving_E[pair[1]]
        arriving_E[pair[1]] += share_EE[pair]
    for pair in reversed(pairs):
        x, z, width = m + NODE, m + 1 - NODE, share_EE[pair]
        middle, y, t = (x + z) / 2, starts[pair], ends[pair]
        corners = [
            (x, y), (middle, y), (middle, t), (z, t),
            (z, t + width), (middle, t + width), (middle, y + width), (x, y + width), (x, y),
        ]  # fmt: skip
        curve = [Outline.CURVE4] * 3
        codes = [Outline.MOVETO, *curve, Outline.LINETO, *curve, Outline.CLOSEPOLY]
        color = FLOW_COLORS[pair[0] % len(FLOW_COLORS)]
        axes.add_patch(
            PathPatch(Outline(corners, codes), facecolor=color, alpha=0.55, lw=0, zorder=2)
        )
