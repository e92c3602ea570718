"""Figures of layers, pairs of experts, paths and specialisation: drawn as counted."""

import numpy as np
import pytest

from moejax.inspection.analysis.expert_profile import coactivation_ratio, expected_coactivation
from moejax.inspection.analysis.information import Information
from moejax.inspection.figures import layers as layer_figures
from moejax.inspection.figures import pairs as pair_figures
from moejax.inspection.figures import specialisation as special
from moejax.inspection.figures.style import DrawingError


def cells(drawing, *shape):
    mesh = drawing.figure.axes[0].collections[0]
    return np.ma.masked_invalid(np.ma.asarray(mesh.get_array()).reshape(shape)), mesh


def labels(axis):
    return [label.get_text() for label in axis]


def test_a_figure_is_saved_as_vector_or_raster_and_shows_itself(tmp_path):
    drawing = layer_figures.draw_layers(np.array([1, 2]), np.ones((2, 1)), [0], "y")
    assert drawing.save(tmp_path / "x.svg").read_bytes() == drawing.svg
    assert b"<svg" in drawing.svg
    png = drawing.save(tmp_path / "x.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20]) == 800  # 4 inches of 200 dots
    assert drawing._repr_html_().startswith(f'<img src="{drawing}"')
    with pytest.raises(DrawingError, match=r"x.jpg must end in .svg or .png"):
        drawing.save(tmp_path / "x.jpg")


def test_few_layers_are_lines_and_the_worst_at_the_end_is_thick_and_named():
    values_SN = np.array([[9.0, 1.0, 1.0], [np.nan, 0.4, 0.3], [0.1, 0.5, 0.2]])
    drawing = layer_figures.draw_layers(
        np.array([5, 10, 15]), values_SN, [0, 3, 6], "MaxVio", worst=np.nanmax
    )
    lines = drawing.figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["layer 0", "layer 3, worst", "layer 6"]
    np.testing.assert_array_equal(lines[0].get_ydata(), [9, np.nan, 0.1])
    assert [line.get_linewidth() > 2 for line in lines] == [False, True, False]
    assert layer_figures.worst_layer(values_SN, np.nanmin) == 0
    ends_with_nan_SN = values_SN[:2]
    assert layer_figures.worst_layer(ends_with_nan_SN, np.nanmin) == 0
    never_finite_S2 = np.array([[np.nan, 2.0]])
    assert layer_figures.worst_layer(never_finite_S2, np.nanmin) == 1
    assert layer_figures.worst_layer(np.full((2, 2), np.nan), np.nanmax) is None


def test_many_layers_are_a_heat_map_of_means():
    values_SN = np.arange(18.0).reshape(2, 9)
    values_SN[0, 2] = np.nan
    drawing = layer_figures.draw_layers(np.array([5, 10]), values_SN, list(range(9)), "MaxVio")
    drawn, _ = cells(drawing, 9, 2)
    np.testing.assert_array_equal(drawn.filled(-1), np.nan_to_num(values_SN.T, nan=-1))


def test_long_histories_of_layers_become_means_of_what_is_finite():
    values_SN = np.array([[1.0], [3.0], [np.nan], [5.0]])
    edges, means = layer_figures.mean_columns(np.array([10, 20, 30, 40]), values_SN, num_columns=2)
    assert edges.tolist() == [0, 20, 40]
    assert means.ravel().tolist() == [2, 5]


@pytest.mark.parametrize("num_layers", [8, 61])
def test_figures_of_layers_stay_small_even_for_noise(num_layers):
    noise_SN = np.random.default_rng(0).random((2000, num_layers))
    assert (
        len(layer_figures.draw_layers(np.arange(2000), noise_SN, range(num_layers), "MaxVio"))
        < 130_000
    )


def test_expected_pairs_have_the_loads_of_the_counts_and_factors_of_experts():
    factors_E = np.array([1.0, 2.0, 4.0, 5.0])
    counts_EE = np.outer(factors_E, factors_E).round().astype(int)
    np.testing.assert_allclose(
        np.nan_to_num(expected_coactivation(counts_EE), nan=-1),
        counts_EE * (1 - np.eye(4)) - np.eye(4), rtol=1e-6,
    )  # fmt: skip
    upper_EE = np.triu(np.random.default_rng(0).integers(0, 50, (9, 9)), 1)
    pairs_EE = upper_EE + upper_EE.T
    expected_EE = expected_coactivation(pairs_EE)
    np.testing.assert_allclose(np.nansum(expected_EE, axis=1), pairs_EE.sum(axis=1), rtol=1e-6)
    assert np.isnan(np.diag(expected_EE)).all()
    assert np.nansum(expected_coactivation(np.zeros((3, 3), int))) == 0


def test_pairs_are_white_at_chance_red_above_black_never_grey_if_rare():
    pairs_EE = np.zeros((5, 5), int)
    for i, j, tokens in ((0, 1, 400), (2, 3, 400), (0, 2, 100), (1, 3, 100)):
        pairs_EE[i, j] = pairs_EE[j, i] = tokens
    # 500 pairs for each of four experts, so by chance a third of them with each other one.
    ratio_EE = coactivation_ratio(pairs_EE)
    nan = np.nan
    rows = [
        [nan, 2.4, 0.6, 0, nan],
        [2.4, nan, 0, 0.6, nan],
        [0.6, 0, nan, 2.4, nan],
        [0, 0.6, 2.4, nan, nan],
    ]
    np.testing.assert_allclose(ratio_EE, [*rows, [nan] * 5], rtol=1e-6)
    drawn, mesh = cells(pair_figures.draw_coactivation(pairs_EE), 5, 5)
    assert drawn.mask.tolist() == np.isnan(ratio_EE).tolist()
    assert drawn[0, 1] == pytest.approx(np.log2(2.4))
    red, blue, black, white = mesh.to_rgba([drawn[0, 1], drawn[0, 2], drawn[0, 3], 0.0])[:, :3]
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.1
    assert black.max() < 0.1
    assert white.min() > 0.95


def test_of_many_experts_those_with_the_strongest_pairs_are_drawn():
    E = 80
    pairs_EE = np.full((E, E), 20)
    for i in range(70, 80, 2):
        pairs_EE[i, i + 1] = pairs_EE[i + 1, i] = 500
    drawing = pair_figures.draw_coactivation(pairs_EE)
    drawn, _ = cells(drawing, 64, 64)
    assert (drawn[54:] > 1).sum() == 10  # the ten experts are the last of 64
    assert len(drawing) < 95_000


def test_flows_above_independence_are_found_the_largest_excess_first():
    counts_EE = np.array([[90, 10, 10], [10, 50, 10], [10, 10, 30]])
    expected_EE = np.outer(counts_EE.sum(1), counts_EE.sum(0)) / counts_EE.sum()
    assert pair_figures.strongest_flows(counts_EE, expected_EE) == [(0, 0), (1, 1), (2, 2)]
    assert pair_figures.strongest_flows(counts_EE, expected_EE, most=1) == [(0, 0)]
    assert pair_figures.strongest_flows(np.full((3, 3), 50), np.full((3, 3), 50.0)) == []


def test_bands_are_as_wide_as_their_share_and_what_they_hold_is_written():
    counts_MEE = np.array([[[60, 0], [20, 20]]])
    # Row sums are 60 and 40, column sums 80 and 20.
    expected_MEE = np.array([[[48.0, 12.0], [32.0, 8.0]]])
    drawing = pair_figures.draw_flow(counts_MEE, expected_MEE, [1, 3])
    axes = drawing.figure.axes[0]
    band, *blocks = axes.patches  # 60 is 1.7 standard deviations above 48, 20 is 4.2 above 8
    heights = band.get_path().vertices[[0, -2], 1]
    assert np.ptp(heights) == pytest.approx(0.2)
    assert len(blocks) == 2
    assert labels(axes.get_xticklabels()) == ["layer 1", "layer 3", "20%"]


def test_paths_of_many_experts_stay_small():
    experts_NT = np.random.default_rng(0).integers(0, 256, (4, 20_000))
    counts_MEE = np.zeros((3, 256, 256), int)
    for m in range(3):
        np.add.at(counts_MEE[m], (experts_NT[m], experts_NT[m + 1]), 1)
    drawing = pair_figures.draw_flow(counts_MEE, np.full((3, 256, 256), 0.1), [0, 1, 2, 3])
    assert 20_000 < len(drawing) < 100_000


def information(name, told_N, chance_N, entropy=2.0, **more):
    told_N, chance_N = np.array(told_N), np.array(chance_N)
    ones_N = np.ones(len(told_N))
    values = {"given": None, "over": "tokens"} | more
    return Information(
        name,
        values["given"],
        values["over"],
        told_N,
        chance_N,
        ones_N,
        entropy * ones_N,
        2 * ones_N,
    )


RESULTS = [
    information("token", [1.0, 0.6], [0.2, 0.2]),
    information("domain", [0.1, 0.1], [0.1, 0.1], given="token"),
]


def test_bars_of_attributes_are_shares_of_the_entropy_with_chance_in_them():
    axes = special.draw_information(RESULTS).figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.4, 0.05, 0.1, 0.05])
    assert labels(axes.get_yticklabels()) == ["token", "domain | token"]
    assert axes.lines[0].get_xdata().tolist() == [0.5, 0.3]  # the layers


def test_cells_of_attributes_are_shares_above_chance_by_layer():
    drawing = special.draw_information_by_layer(RESULTS, [2, 5])
    drawn, _ = cells(drawing, 2, 2)
    np.testing.assert_allclose(drawn, [[0.4, 0.2], [0, 0]])
    axes = drawing.figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["40%", "20%", "0%", "0%"]
    assert labels(axes.get_xticklabels()) == ["2", "5"]


def test_domains_are_white_at_the_uniform_level():
    drawing = special.draw_domains(
        np.array([[0.25, 0.5], [0.0, np.nan]]), 0.25, ["prose", "a very long name of verse"]
    )
    drawn, mesh = cells(drawing, 2, 2)
    assert drawn[0].tolist() == [0, 1]
    assert drawn.mask[1].tolist() == [False, True]
    white, red, black = mesh.to_rgba([drawn[0, 0], drawn[0, 1], drawn[1, 0]])[:, :3]
    assert white.min() > 0.95
    assert red[0] > red[2]
    assert black.max() < 0.1
    assert labels(drawing.figure.axes[0].get_yticklabels()) == ["prose", "a very long name …"]
