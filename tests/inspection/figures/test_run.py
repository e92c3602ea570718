"""Figures of a run: drawn as measured, small, readable on a phone, the same every time."""

import base64
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from moejax.inspection.figures import load
from moejax.inspection.figures import run as figures
from moejax.inspection.figures.columns import sum_columns
from moejax.inspection.figures.run import (
    Chart,
    Curve,
    draw_chart,
    draw_curves,
    draw_final_load,
    draw_load_over_time,
)
from moejax.inspection.figures.style import short_number


def svg_of(uri):
    kind, data = uri.split(",", 1)
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def texts(uri):
    root = ElementTree.fromstring(svg_of(uri))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def falling(n=50):
    return np.arange(1, n + 1), np.linspace(8, 3, n)


def test_a_chart_names_its_axes_and_curves():
    uri = draw_curves(
        [Curve("training", *falling()), Curve("validation", *falling(3), points=True)], "nats"
    )
    assert {"training step", "nats", "training", "validation"} <= set(texts(uri))


def test_type_is_large_enough_for_a_phone():
    uri = draw_curves([Curve("training", *falling())], "nats", reference=(4.0, "level"))
    svg = svg_of(uri)
    points = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg).group(1))
    width = points * 96 / 72  # CSS pixels
    # In points of the drawing.
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    on_phone = [size * 96 / 72 * 358 / width for size in sizes]  # 390 less the page's margins
    assert min(on_phone) >= 11


def test_the_same_figure_is_the_same_text():
    first, second = (draw_curves([Curve("a", *falling())], "nats") for _ in range(2))
    assert first == second


def test_drawing_leaves_no_global_state():
    before = dict(matplotlib.rcParams)
    draw_final_load(np.array([1, 2, 3]))
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_no_pyplot():
    code = """
import sys
import numpy as np
from moejax.inspection.figures import run as figures
figures.draw_load_over_time(np.array([1, 2]), np.ones((2, 3), int))
figures.draw_curves([figures.Curve("a", np.arange(3), np.ones(3))], "y", reference=(1.0, "level"))
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


@pytest.mark.parametrize(
    "values", [[np.nan, np.nan], [1.0, np.nan], [np.inf, 1.0], [0.0, 0.0], [2.0]]
)
def test_values_that_are_not_finite_or_alone_are_drawn_without_a_warning(values):
    draw_curves(
        [Curve("a", np.arange(1, len(values) + 1), np.array(values))], "nats", from_zero=True
    )


def test_counts_are_labelled_with_whole_numbers_and_large_values_with_units():
    nothing = draw_curves(
        [Curve("dead", np.arange(3), np.array([0.0, np.nan, 0.0]))], "experts", from_zero=True
    )
    assert nothing.figure.axes[0].get_ylim() == (0, 1)
    counts = draw_curves(
        [Curve("dead", np.arange(3), np.array([2.0, np.nan, 1.0]))], "experts", from_zero=True
    )
    assert not any("." in text for text in texts(counts))
    speeds = draw_curves(
        [Curve("speed", np.arange(2), np.array([40_000.5, np.inf]))], "tokens/s", from_zero=True
    )
    assert "40k" in texts(speeds)


def test_a_chart_without_values_is_no_figure():
    empty = np.array([], np.int64), np.array([])
    chart = Chart("Loss", (("a", "A"), ("b", "B")), "nats", "")
    assert draw_chart(chart, lambda key: empty) is None
    assert draw_chart(chart, lambda key: falling() if key == "b" else empty) is not None


def test_every_documented_metric_has_a_chart():
    charts = (*figures.LOSS_CHARTS, *figures.SPEED_CHARTS, *figures.routing_charts(8))
    keys = {key for chart in charts for key, _ in chart.keys}
    assert keys >= {
        "loss/lm",
        "loss/balance",
        "loss/z",
        "loss/total",
        "loss/balance_weighted",
        "loss/z_weighted",
    }
    assert keys >= {
        "eval/loss",
        "learning_rate",
        "grad_norm",
        "perf/tokens_per_s",
        "moe/max_violation",
    }
    assert keys >= {"moe/dead_experts", "moe/dropped", "moe/entropy", "moe/load_entropy"}


def test_long_curves_are_downsampled_but_keep_their_spikes():
    steps, values = np.arange(100_000), np.ones(100_000)
    values[54_321], values[77_777], values[10] = 9, -9, np.nan
    kept_steps, kept = figures.downsample(steps, values)
    assert len(kept) <= figures.MAX_POINTS
    assert {54_321, 77_777} <= set(kept_steps)
    assert (np.diff(kept_steps) > 0).all()


def test_load_is_measured_against_a_uniform_load():
    # 4 assignments to 4 experts: 1 each is uniform.
    ratios = figures.load_ratio(np.array([[1, 1, 2, 0], [0, 0, 0, 0]]))
    assert ratios.tolist() == [[1, 1, 2, 0], [0, 0, 0, 0]]


def test_columns_of_a_heat_map_end_at_the_logged_steps():
    edges, counts = sum_columns(np.array([20, 40, 60]), np.arange(6).reshape(3, 2), 200)
    assert edges.tolist() == [0, 20, 40, 60]
    assert counts.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert sum_columns(np.array([7]), np.ones((1, 2), int), 200)[0].tolist() == [0, 7]
    assert sum_columns(np.array([0]), np.ones((1, 2), int), 200)[0].tolist() == [-1, 0]


def test_a_long_history_is_summed_into_columns_and_loses_no_count():
    steps = np.arange(1, 1001) * 20
    counts = np.random.default_rng(0).integers(0, 9, (1000, 4))
    edges, columns = sum_columns(steps, counts, load.max_columns(4))
    assert len(columns) == figures.MAX_COLUMNS == len(edges) - 1
    assert load.max_columns(256) == load.MAX_CELLS // 256
    assert len(sum_columns(steps, np.ones((1000, 256), int), load.max_columns(256))[1]) == 31
    assert edges[-1] == 20_000
    assert (np.diff(edges) > 0).all()
    assert columns.sum(axis=0).tolist() == counts.sum(axis=0).tolist()


def test_loads_are_white_at_uniform_red_above_blue_below_black_at_none():
    counts = np.array([[10, 40, 5, 0, 1, 4]])  # mean 10: ratios 1, 4, 1/2, 0, 0.1, 0.4
    drawing = draw_load_over_time(np.array([10]), counts)
    mesh = drawing.figure.axes[0].collections[0]
    colors = mesh.to_rgba(mesh.get_array()).reshape(-1, 4)[:, :3]
    white, red, blue, black, dark_blue, _ = colors
    assert white.min() > 0.95
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.2
    assert black.max() < 0.1
    assert dark_blue[2] > 0.3


@pytest.mark.parametrize(("S", "E"), [(60, 64), (60, 256), (2000, 256)])
def test_figures_of_many_experts_stay_small_even_for_noise(S, E):
    counts = np.random.default_rng(0).integers(0, 99, (S, E))
    assert len(draw_load_over_time(np.arange(1, S + 1) * 20, counts)) < 95_000
    assert len(draw_final_load(counts[0])) < 50_000


def test_an_expert_without_load_is_marked():
    axes = draw_final_load(np.array([3, 0, 3, 0])).figure.axes[0]
    heights, edges, _ = axes.patches[0].get_data()
    assert heights.tolist() == [2, 0, 0, 0, 2, 0, 0]  # a gap between any two bars
    assert edges.tolist() == pytest.approx([-0.4, 0.4, 0.6, 1.4, 1.6, 2.4, 2.6, 3.4])
    assert axes.lines[1].get_xdata().tolist() == [1, 3]  # the crosses


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (12_345, "12.3k"),
        (999_900, "1M"),
        (3_400_000, "3.4M"),
        (1.2e9, "1.2B"),
    ],
)
def test_numbers_are_shortened_to_three_digits(number, text):
    assert short_number(float(number)) == text
