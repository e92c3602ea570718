"""Comparisons of runs: what they logged, where they differ, names that differ, escaped text."""

import json
import math

import numpy as np
import pytest

from cases.pages import Page
from moejax.inspection import compare, open_run


def write(workdir, *lines, total=1000, active=400, **config):
    """A run directory with these metric lines."""
    workdir.mkdir(parents=True)
    facts = {"config": config, "versions": {}, "git_commit": "", "device": "", "command": ""}
    (workdir / "config.json").write_text(
        json.dumps(facts | {"parameters": {"total": total, "active": active}})
    )
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def training_line(step, tokens, speed, loss):
    return {"step": step, "loss/lm": loss, "tokens": tokens, "perf/tokens_per_s": speed}


@pytest.fixture
def folders(tmp_path):
    """A MoE run whose evaluation loss rose at the end, and a dense one that was evaluated once."""
    moe = write(
        tmp_path / "moe",
        training_line(10, 100, 10, loss=3.5) | {"moe/dropped": 0},
        training_line(20, 200, 30, loss=3.25) | {"moe/max_violation": 0.5},
        {"step": 20, "eval/loss": 3.0, "eval/bits_per_byte": 1.5},
        training_line(30, 300, 20, loss=None) | {"moe/max_violation": 0.25},
        {"step": 30, "eval/loss": 3.125, "eval/bits_per_byte": 1.75},
        moe={"num_experts": 8, "top_k": 2},
        train={"seed": 0, "batch_size": 8},
    )
    dense = write(
        tmp_path / "dense",
        training_line(15, 150, 50, loss=4.0) | {"eval/loss": 3.75},
        total=400,
        moe={"num_experts": 0, "top_k": 2},
        train={"seed": 0},
        extra={"leaf": [1]},
    )
    return moe, dense


def test_the_table_has_what_each_run_logged(folders):
    table = compare([folders[0], open_run(folders[1])]).table
    assert table.index.tolist() == ["moe", "dense"]
    assert table.loc["moe"].to_dict() == {
        "steps": 30,
        "parameters": 1000,
        "active": 400,
        "eval_loss": 3.125,
        "best_eval_loss": 3.0,
        "bits_per_byte": 1.75,
        "train_loss": math.inf,
        "tokens": 300,
        "tokens_per_s": 20,
        "max_violation": 0.25,
        "dropped": 0,
    }
    dense = table.loc["dense"]
    columns = ["steps", "parameters", "eval_loss", "tokens_per_s"]
    assert dense[columns].tolist() == [15, 400, 3.75, 50]
    assert math.isnan(dense["bits_per_byte"])
    assert math.isnan(dense["max_violation"])
    assert "entropy" not in table  # no run logged it


def test_differences_are_the_leaves_that_are_not_the_same_everywhere(folders):
    differences = compare(folders).differences
    assert differences.index.tolist() == ["moe.num_experts", "train.batch_size", "extra.leaf"]
    assert differences["moe"].tolist() == [8, 8, None]
    assert differences["dense"].tolist() == [
        0,
        None,
        [1],
    ]
    assert compare(folders[:1]).differences.shape == (0, 1)


def test_a_metric_of_all_runs_stands_in_one_table(folders):
    series = compare(folders).series("loss/lm")
    assert series.columns.tolist() == ["moe", "dense"]
    assert series.index.name == "step"
    assert series.index.tolist() == [10, 15, 20, 30]
    nan = math.nan
    np.testing.assert_array_equal(series, [[3.5, nan], [nan, 4], [3.25, nan], [nan, nan]])
    assert compare(folders).series("moe/dropped")["dense"].isna().all()
    with pytest.raises(
        ValueError, match=r"no run logged 'loss'; use one of eval/bits_per_byte, eval/loss, loss/lm"
    ):
        compare(folders).series("loss")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write(tmp_path / path) for path in ("a/x/run", "b/x/run", "b/y/run", "other")]
    assert list(compare(folders).runs) == ["a/x/run", "b/x/run", "y/run", "other"]


def test_comparing_reads_no_metrics_before_they_are_asked_for(folders):
    (folders[0] / "metrics.jsonl").unlink()
    comparison = compare(folders)
    assert len(comparison.differences) == 3
    with pytest.raises(ValueError, match=r"metrics.jsonl is missing"):
        _ = comparison.table


@pytest.mark.parametrize(
    "pick", [lambda moe: [], lambda moe: str(moe), lambda moe: [moe, moe.parent / "dense/../moe"]]
)
def test_no_runs_and_one_given_twice_are_refused(folders, pick):
    with pytest.raises(
        ValueError, match=r"must be a list of at least one|moe is given twice; leave one out"
    ):
        compare(pick(folders[0]))


def test_a_comparison_shows_itself_as_text_and_as_tables(folders):
    comparison = compare(folders)
    assert repr(comparison).startswith("2 runs, which differ in 3 leaves of their configurations\n")
    assert "eval_loss" in repr(comparison)
    assert "3.125" in repr(comparison)
    assert max(map(len, repr(comparison).splitlines())) <= 100
    page = Page(comparison._repr_html_())
    assert "dense 15 400 400 3.75 3.75 4 150 50" in page.text  # nothing where it logged nothing
    assert "moe.num_experts 8 0" in page.text
    assert "nan" not in page.text
    assert "differ:" not in compare(folders[:1])._repr_html_()


def test_what_runs_are_called_and_hold_is_escaped(tmp_path):
    folders = [
        write(tmp_path / f"<script>{i}", **{"<img src=x>": {"leaf": f"<b>{i}\x00"}})
        for i in range(2)
    ]
    page = Page(html := compare(folders)._repr_html_())
    assert not {"script", "img", "b"} & {tag for tag, _ in page.elements}
    assert "\x00" not in html
    assert "<script>1" in page.text
    assert "<img src=x>.leaf <b>0" in page.text
