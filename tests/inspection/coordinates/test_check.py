"""Coordinate checks: sizes that are flat with `mup`, and grow without."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moejax.cli import main
from moejax.config import ConfigError, resolve
from moejax.data import prepare
from moejax.inspection.coordinates import check as module
from moejax.inspection.coordinates.check import (
    Line,
    check_coordinates,
    variants_of,
    with_width,
)
from moejax.inspection.figures.coordinates import draw_coordinates

TINY = {
    "model": {"num_layers": 2, "d_model": 64, "d_ff": 128, "remat": False},
    "attention": {"num_heads": 4, "num_kv_heads": 4},
    "moe": {"num_experts": 4, "top_k": 2, "d_expert": 64},
    "data": {"source": "synthetic", "tokenizer": "bytes", "seq_len": 64},
    "train": {"batch_size": 4},
    "optimizer": {"learning_rate": 0.005},
}
MUP = {"base_width": 64, "base_depth": 2, "base_top_k": 2}
AXES = {"width": 5, "experts": 3, "top_k": 3}


def config_of(**sections):
    return resolve(TINY | sections)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    data = TINY["data"] | {"directory": str(tmp_path_factory.mktemp("rows"))}
    return prepare(config_of(data=data).data)


@pytest.fixture(scope="module")
def in_mup(corpus):
    return check_coordinates(config_of(mup=MUP), corpus, num_steps=4, num_seeds=1)


def test_with_mup_activations_and_updates_are_flat_along_every_axis(in_mup):
    assert {line.axis: len(line.sizes) for line in in_mup} == AXES
    places = {(line.axis, line.place, line.what) for line in in_mup}
    assert len(places) == len(in_mup) == 3 * 6 * 2
    for line in in_mup:
        assert line.is_flat or not line.is_judged, line
    (logits,) = [line for line in in_mup if line.axis == "width" and not line.is_judged]
    assert -0.6 < logits.slope < -0.2  # they shrink as the root of the width, before the first step


@pytest.mark.parametrize("factors", [(1.0, 4.0)])
def test_in_the_usual_parametrisation_updates_grow_with_the_width(corpus, monkeypatch, factors):
    monkeypatch.setattr(module, "WIDTH_FACTORS", factors)
    monkeypatch.setattr(module, "EXPERT_FACTORS", (1,))
    monkeypatch.setattr(module, "TOP_K_FACTORS", (1,))
    lines = check_coordinates(config_of(), corpus, num_steps=4, num_seeds=1)
    grown = {line.place for line in lines if line.axis == "width" and line.slope > 0.4}
    assert {"attention", "feed_forward", "residual"} <= grown


def test_models_along_an_axis_differ_in_it_alone_and_in_what_is_in_proportion():
    found = variants_of(config_of(mup=MUP))
    assert list(found["width"]) == [32, 64, 128, 256, 512]
    for width, variant in found["width"].items():
        assert variant.model.d_model == width and variant.head_dim == 16
        assert variant.model.d_ff == 2 * width and variant.moe.d_expert == width
    assert [c.moe.num_experts for c in found["experts"].values()] == [4, 8, 16]
    assert {c.moe.d_expert for c in found["experts"].values()} == {64}
    assert [c.moe.top_k for c in found["top_k"].values()] == [2, 4, 8]
    assert {(c.moe.num_experts, c.moe.d_expert) for c in found["top_k"].values()} == {(16, 64)}
    assert list(variants_of(config_of(moe={"num_experts": 0}))) == ["width"]
    assert list(variants_of(config_of())["width"]) == [32, 64, 128, 256, 512]


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"d_model=24 needs attention.num_heads=1.5; give"):
        with_width(config_of(), 24)


def test_slopes_are_those_of_the_logarithms():
    line = Line("width", "residual", "update", (32, 64, 128), (1.0, 2.0, 4.0))
    assert line.slope == pytest.approx(1.0) and not line.is_flat
    assert Line("width", "residual", "update", (32, 64), (3.0, 3.0)).is_flat
    for values in ((1.0, math.nan), (1.0, math.inf), (0.0, 1.0)):
        broken = Line("width", "residual", "update", (32, 64), values)
        assert math.isnan(broken.slope) and not broken.is_flat
        assert broken.to_json()["slope"] is None


def test_the_figure_shows_all_axes(in_mup):
    drawing = draw_coordinates(in_mup)
    text = drawing.svg.decode()
    for words in ("experts per token", "change by the steps", "feed forward", "512"):
        assert words in text, words


def test_the_command_prints_slopes_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "WIDTH_FACTORS", (0.5, 1.0))
    monkeypatch.setattr(module, "EXPERT_FACTORS", (1, 2))
    monkeypatch.setattr(module, "TOP_K_FACTORS", (1,))
    recipe = tmp_path / "tiny.py"
    recipe.write_text(f"def get_config():\n    return {TINY | {'mup': MUP}!r}\n")
    base = ["coordcheck", f"--config={recipe}", "--steps=2", "--seeds=1"]
    assert main([*base, "--json", "--figure=check.svg"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path("check.svg").stat().st_size > 1000
    assert found["flat"] + found["not flat"] == len([x for x in found["lines"] if x["is_judged"]])
    assert {line["axis"] for line in found["lines"]} == set(AXES)
    assert all(np.isfinite(line["values"]).all() for line in found["lines"])
    for argument, message in (
        ("--seeds=0", "--seeds=0 must be at least 1"),
        ("--figure=x.pdf", "--figure=x.pdf must end in .svg or .png"),
    ):
        assert main([*base[:3], argument]) == 2
        assert message in capsys.readouterr().err
