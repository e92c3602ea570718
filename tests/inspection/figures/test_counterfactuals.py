"""Figures of counterfactuals: what is drawn is what was found, and noise is marked."""

import base64
import dataclasses
import re

import numpy as np
import pytest

from moejax.inspection.counterfactuals.plan import NOT_SELECTABLE, OUTPUT_ZERO
from moejax.inspection.counterfactuals.result import AS_TRAINED, Counterfactuals, Outcome
from moejax.inspection.figures import counterfactuals as figures

N, E = 2, 4
CELLS = [(n, e) for n in range(N) for e in range(E)]
CHANGES = {(NOT_SELECTABLE, n, e): 0.01 * (n * E + e - 2) for n, e in CELLS}
CHANGES |= {(OUTPUT_ZERO, n, e): -0.04 * (n * E + e - 2) for n, e in CELLS}


def outcome(kind, what, layer=None, experts=(), *, change=0.0, error=0.001, mass=1.0, **values):
    settings = {"setting": None, "dropped": 0.0} | values
    return Outcome(
        kind=kind,
        what=what,
        layer=layer,
        experts=experts,
        loss=2.0 + change,
        change=change,
        standard_error=error,
        gate_mass=mass,
        **settings,
    )


ROWS = (
    outcome(AS_TRAINED, "no change", mass=0.8),
    *(
        outcome("top_k", f"K = {k}", setting=float(k), change=0.1 * (k - 2) ** 2, mass=0.4 * k)
        for k in (1, 2, 3)
    ),
    *(
        outcome("capacity", "", setting=f, change=1 - f / 2, dropped=0.5 - f / 4)
        for f in (2.0, 1.0)
    ),
    *(
        outcome("ablate", way, n + 5, (e,), change=change)
        for (way, n, e), change in CHANGES.items()
    ),
    *(
        outcome("swap", "random pair", 5, change=change, error=error)
        for change, error in ((0.1, 0.02), (0.3, 0.04))
    ),
    *(
        outcome("random", "random experts", layer, change=change)
        for layer, change in ((None, 0.5), (5, 0.2), (6, 0.4))
    ),
)
RESULT = Counterfactuals(ROWS, {}, 7, 8, 99, (5, 6), E, (2, 2))


@pytest.fixture
def drawn(monkeypatch):
    """The axes of what a figure draws."""
    found = []
    monkeypatch.setattr(
        figures.Drawing,
        "from_figure",
        lambda figure: found.append(figure.axes[0]) or figures.Drawing(),
    )
    return found


def all_figures(result):
    return [
        figures.draw_top_k(result),
        figures.draw_capacity(result),
        figures.draw_ablation(result, NOT_SELECTABLE),
        figures.draw_bars(result, ("swap", "merge")),
        figures.draw_bars(result, ("random", "uniform")),
    ]


def test_what_was_not_evaluated_is_no_figure():
    assert all_figures(dataclasses.replace(RESULT, rows=ROWS[:1])) == [None] * 5


def test_the_same_result_is_the_same_figure_readable_on_a_phone():
    assert all_figures(RESULT) == all_figures(RESULT)
    for uri in all_figures(RESULT):
        kind, data = uri.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg).group(1)) * 96 / 72
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert min(sizes) * 96 / 72 * 358 / width >= 10.5


def test_loss_against_k_has_standard_errors_the_trained_k_and_gate_mass(drawn):
    figures.draw_top_k(RESULT)
    (axes,) = drawn
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "1\n0.40",
        "2\n0.80",
        "3\n1.20",
    ]
    (bars,) = axes.containers
    np.testing.assert_allclose(bars.lines[0].get_ydata(orig=False), [0.1, 0, 0.1])
    (segments,) = bars.lines[2]
    np.testing.assert_allclose(
        np.ptp(np.array(segments.get_segments())[:, :, 1], axis=1), 4 * 0.001
    )
    assert [list(line.get_xdata()) for line in axes.lines[1:2]] == [[1, 1]]  # the place of K = 2
    same = [row if row.kind != "top_k" else dataclasses.replace(row, gate_mass=0.8) for row in ROWS]
    figures.draw_top_k(dataclasses.replace(RESULT, rows=tuple(same)))
    assert [label.get_text() for label in drawn[1].get_xticklabels()] == ["1", "2", "3"]


def test_capacity_factors_rise_with_the_dropped_share_below_them(drawn):
    figures.draw_capacity(RESULT)
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == ["1\n25 %", "2\n0 %"]
    np.testing.assert_allclose(drawn[0].containers[0].lines[0].get_ydata(orig=False), [0.5, 0])


def test_maps_of_ablations_are_white_at_no_change_with_one_scale(drawn):
    for way in (NOT_SELECTABLE, OUTPUT_ZERO):
        figures.draw_ablation(RESULT, way)
        mesh = drawn[-1].collections[0]
        expected_NE = [[CHANGES[way, n, e] for e in range(E)] for n in range(N)]
        np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(N, E), expected_NE)
        assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((-0.2, 0.2))
        colors = mesh.to_rgba([0.0, 0.2, -0.2])[:, :3]
        assert colors[0].min() > 0.95
        assert colors[1][0] > colors[1][2]
        assert colors[2][2] > colors[2][0]
        assert [label.get_text() for label in drawn[-1].get_yticklabels()] == ["5", "6"]
    written = [text.get_text() for text in drawn[0].texts]
    assert written == ["-0.02", "-0.01", "+0.00·", "+0.01", "+0.02", "+0.03", "+0.04", "+0.05"]


def test_many_experts_have_dots_for_noise_and_grey_for_no_outcome(drawn):
    rows = [outcome("ablate", OUTPUT_ZERO, 5, (e,), change=0.01 * e) for e in range(1, 12)] + [
        outcome("ablate", OUTPUT_ZERO, 5, (0,), change=0.0015)
    ]
    result = dataclasses.replace(RESULT, rows=(ROWS[0], *rows), num_experts=12)
    figures.draw_ablation(result, OUTPUT_ZERO)
    (dots,) = drawn[0].lines
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist()) == ([0], [0])
    unknown = dataclasses.replace(
        result, rows=tuple(dataclasses.replace(row, standard_error=np.nan) for row in rows)
    )
    figures.draw_ablation(unknown, OUTPUT_ZERO)  # of one row nothing is known
    assert drawn[1].lines[0].get_xdata().tolist() == list(range(12))
    mesh = drawn[0].collections[0]
    assert np.ma.getmaskarray(mesh.get_array()).reshape(2, 12).tolist() == [
        [False] * 12,
        [True] * 12,
    ]
    assert figures.draw_ablation(result, NOT_SELECTABLE) is None


def test_bars_are_by_layer_all_layers_first_and_random_pairs_share_one(drawn):
    figures.draw_bars(RESULT, ("random", "uniform"))
    assert [bar.get_height() for bar in drawn[0].patches] == [0.5, 0.2, 0.4]
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == ["all", "5", "6"]
    figures.draw_bars(RESULT, ("swap", "merge"))
    assert [bar.get_height() for bar in drawn[1].patches] == pytest.approx([0.2])
    error_bars = drawn[1].containers[-1].lines[2][0].get_segments()
    np.testing.assert_allclose(
        [segment[:, 1] for segment in error_bars], [[0.2 - 0.06, 0.2 + 0.06]]
    )
    assert "swap random pair" in texts_of_legend(drawn[1])


def texts_of_legend(axes):
    return [text.get_text() for legend in axes.figure.legends for text in legend.get_texts()]


def test_a_deep_model_shows_evenly_spaced_layers(drawn):
    rows = [outcome("uniform", "all experts alike", layer, change=0.1) for layer in range(40)]
    figures.draw_bars(dataclasses.replace(RESULT, rows=(ROWS[0], *rows)), ("uniform",))
    labels = [int(label.get_text()) for label in drawn[0].get_xticklabels()]
    assert len(labels) == figures.MAX_LAYERS
    assert (labels[0], labels[-1]) == (0, 39)
