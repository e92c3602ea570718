"""Several runs on one page: what is drawn against what, and mistakes of the command line."""

import json
import os
import re
import xml.dom.minidom

import numpy as np
import pytest

from cases.pages import Page
from moejax.cli import main
from moejax.inspection.figures import comparison as figures
from moejax.inspection.report.comparison_page import render_comparison, write_comparison
from moejax.inspection.report.comparison_tables import MINUS
from moejax.inspection.runs.comparison import compare
from moejax.inspection.runs.run import RunError, open_run
from moejax.inspection.runs.seed_pairs import difference
from moejax.training.run_directory.routing_log import RoutingLog


def make_run(
    workdir,
    *,
    num_experts=4,
    layers=(0, 1),
    active=1000,
    learning_rate=0.1,
    tokens=100,
    loss=7.5,
    **config,
):
    moe = {"num_experts": num_experts, "top_k": 2}
    facts = {
        "config": {"moe": moe, "optimizer": {"learning_rate": learning_rate}} | config,
        "versions": {}, "git_commit": None, "device": "cpu", "command": "moejax train",
        "parameters": {"total": 4000, "active": active},
    }  # fmt: skip
    lines = [
        {"step": step, "tokens": tokens * step, "loss/lm": 9.0 - step / 10} for step in (10, 20)
    ]
    lines.append({"step": 15, "eval/loss": loss, "eval/bits_per_byte": loss / 2})
    if num_experts:
        lines[1]["moe/max_violation"] = 0.5
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(facts))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if num_experts:
        counts = np.arange(1, len(layers) * num_experts + 1).reshape(len(layers), num_experts)
        log = RoutingLog(workdir, layers, num_experts)
        log.append(20, counts, np.full(counts.shape, 0.25, np.float32))
    return workdir


def texts(drawing):
    return drawing.svg.decode()


def test_a_metric_is_placed_by_steps_tokens_flops_or_time(tmp_path):
    run = open_run(make_run(tmp_path / "run"))
    flops = run.flops_per_token
    assert flops > 1000  # of attention and logits, too
    for name, schedule, is_known in (
        ("constant", "constant", True),
        ("annealed", "step:0.5:0.5", False),
    ):
        of_four = make_run(
            tmp_path / name,
            num_experts=8,
            moe={"num_experts": 8, "top_k": 4},
            schedule={"top_k": schedule},
        )
        assert (open_run(of_four).flops_per_token is not None) == is_known
    for against, x in (
        ("steps", [10, 20]),
        ("tokens", [1000, 2000]),
        ("compute", [1000 * flops, 2000 * flops]),
    ):
        found, values = figures.series_against(run, "loss/lm", against)
        assert (found.tolist(), values.tolist()) == (x, [8, 7])
    assert figures.series_against(run, "eval/loss", "tokens")[0].tolist() == [
        1500
    ]  # between two logged steps
    (run.workdir / "metrics.jsonl").write_text('{"step": 3, "loss/lm": 1.0}\n')
    assert figures.series_against(run.reload(), "loss/lm", "tokens")[0].size == 0
    speeds = [
        {"step": step, "tokens": 100 * step, "perf/tokens_per_s": 50, "loss/lm": 1}
        for step in (3, 9)
    ]
    for seconds, minutes in (
        ({}, [0.1, 0.3]),
        ({"perf/seconds": 30}, [0.5, 1]),
    ):  # the latter says it itself
        (run.workdir / "metrics.jsonl").write_text(
            "".join(json.dumps(line | seconds) + "\n" for line in speeds)
        )
        assert figures.series_against(run.reload(), "loss/lm", "time")[0].tolist() == pytest.approx(
            minutes
        )


def test_each_run_keeps_its_own_line_style_in_all_figures(tmp_path):
    runs = {
        name: open_run(make_run(tmp_path / name, num_experts=n))
        for name, n in (("dense", 0), ("moe", 4))
    }
    drawing = figures.draw_runs(runs, "loss/lm", "nats", against="compute")
    lines = drawing.figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["dense", "moe"]
    assert lines[1].get_xdata().tolist() == [
        1000 * runs["moe"].flops_per_token,
        2000 * runs["moe"].flops_per_token,
    ]
    assert "training FLOPs" in texts(drawing)
    assert ">moe<" in texts(drawing)
    (line,) = figures.draw_runs(runs, "moe/max_violation", "MaxVio").figure.axes[0].lines
    assert line.get_color() == lines[1].get_color()  # though it is the first that is drawn
    assert figures.draw_runs(runs, "none", "") is None
    sixteen = figures.line_styles([str(i) for i in range(figures.MAX_RUNS)])
    assert len({(style.color, style.dash) for style in sixteen.values()}) == 16


def test_no_name_of_a_run_breaks_a_legend(tmp_path):
    runs = {
        name: open_run(make_run(tmp_path / f"{i}"))
        for i, name in enumerate(("_base", "a\x01b", "c\ud800"))
    }
    drawing = figures.draw_runs(runs, "loss/lm", "nats")
    xml.dom.minidom.parseString(drawing.svg)
    assert [text.get_text() for text in drawing.figure.legends[0].get_texts()] == [
        "./_base",
        "a\ufffdb",
        "c\ufffd",
    ]


def test_loads_are_drawn_from_the_busiest_expert_over_the_share_of_experts():
    drawing = figures.draw_sorted_load(
        {"a": np.array([1, 5, 2, 0]), "dense": np.zeros(0, int), "b": np.array([3, 1])}
    )
    steps = [patch.get_data() for patch in drawing.figure.axes[0].patches]
    assert steps[0].values.tolist() == [2.5, 1, 0.5, 0]
    assert steps[0].edges.tolist() == [
        0,
        0.25,
        0.5,
        0.75,
        1,
    ]
    assert steps[1].values.tolist() == [1.5, 0.5]
    assert drawing.figure.axes[0].patches[1].get_edgecolor()[:3] == pytest.approx(
        (0, 0x9E / 255, 0x73 / 255)
    )


def test_the_page_has_every_section_and_obeys_nothing_from_the_runs(tmp_path):
    hostile = "<b>run'&"
    make_run(tmp_path / hostile, learning_rate="<script>x</script>")
    make_run(tmp_path / "dense", num_experts=0)
    html = render_comparison(compare([tmp_path / hostile, tmp_path / "dense"]))
    for anchor in ("runs", "differences", "losses", "routing", "load"):
        assert f'<section id="{anchor}">' in html
        assert f'href="#{anchor}"' in html
    assert "<b>" not in html
    assert "<script" not in html
    assert "&lt;b&gt;run" in html
    assert "optimizer.learning_rate" in html
    assert "&lt;script&gt;" in html
    assert (
        html.count("Validation loss over") == 6
    )  # three figures, each named in its heading and its alt
    assert "Layer 1" in html
    assert "default-src" in html


def test_evaluations_have_their_ticks_where_they_were(tmp_path):
    run = open_run(make_run(tmp_path / "run"))
    lines = [{"step": step, "eval/loss": 1.0} for step in range(7, 80, 7)]
    (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawing = figures.draw_runs({"run": run}, "eval/loss", "nats")
    assert drawing.figure.axes[0].get_xticks().tolist() == [14, 35, 56, 77]


def test_two_runs_have_a_column_with_their_difference(tmp_path):
    folders = [
        make_run(tmp_path / name, loss=loss, num_experts=n)
        for name, loss, n in (("a", 8.0, 0), ("b", 7.0, 4))
    ]
    text = Page(render_comparison(compare(folders))).text
    assert "a and b Side by side" in text
    assert "difference: b minus a" in text
    assert f"Validation loss, nats per token 8 7 {MINUS}1 ({MINUS}12.5%)" in text
    assert f"Bits per byte 4 3.5 {MINUS}0.5 ({MINUS}12.5%)" in text
    assert (
        "The same throughout in the runs that log it: MaxVio 0.5 (1 of 2)." in text
    )  # for a chart of one number
    assert "No two settings share two seeds" in text
    many = Page(render_comparison(compare([*folders, make_run(tmp_path / "c", loss=8.0)]))).text
    assert "Below a value: its difference to a." in many
    assert f"Bits per byte 4 3.5 {MINUS}0.5 ({MINUS}12.5%) 4 " in many
    as_rows = [make_run(tmp_path / name, loss=8.0) for name in ("d", "e", "f", "g")]
    text = Page(render_comparison(compare([*folders, *as_rows]))).text
    assert f"b 20 4k 1k 7 {MINUS}1 ({MINUS}12.5%) " in text


def end_at(folder, step, loss, before=9.0):
    """Gives a run these evaluations: one at step 50, and one at `step`."""
    lines = [{"step": 50, "eval/loss": before}, {"step": step, "eval/loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("step", "loss", "left_out"),
    [(100, 4.0, ""), (60, 4.0, "two_2"), (100, None, "two_2"), (50, 4.0, "two_2")],
    ids=["whole", "not at its end", "not finite", "not logged"],
)
def test_runs_without_a_value_at_their_end_are_left_out_and_named(tmp_path, step, loss, left_out):
    folders = []
    for name, offset in (("one", 0.0), ("two", 1.0)):
        for seed in range(3):
            train = {"seed": seed, "num_steps": 100}
            folder = make_run(
                tmp_path / f"{name}_{seed}", num_experts=0, learning_rate=offset, train=train
            )
            is_odd = (name, seed) == ("two", 2)
            last = (step, loss) if is_odd else (100, 1.0 + offset + seed)
            folders.append(end_at(folder, *last))
    folders.append(
        end_at(
            make_run(tmp_path / "single", num_experts=0, train={"seed": 0, "num_steps": 100}),
            100,
            1.0,
        )
    )
    text = Page(render_comparison(compare(folders))).text
    said = re.search(r"Left out, for they have no finite value at their last step: (\S+)\.", text)
    assert (said[1] if said else "") == left_out
    row = (
        "2 3 +1 ± 0 3 told apart from noise"
        if not left_out
        else "1.5 2.5 +1 ± 0 2 none: seeds are left out"
    )
    assert f"Validation loss, nats per token {row}" in text
    assert "Not compared, for fewer than two seeds in common with one_0 (3 seeds): single." in text


def test_settings_are_compared_seed_by_seed(tmp_path):
    losses = {
        "one": [1.0, 3.0, 5.0],
        "two": [2.0, 4.5, 5.5],
    }  # the seed moves both: differences 1, 1.5, 0.5
    num_experts = {"one": 4, "two": 8}
    folders = []
    for name in losses:
        for seed, loss in enumerate(losses[name]):
            folder = make_run(
                tmp_path / f"{name}_{seed}",
                loss=loss,
                num_experts=num_experts[name],
                train={"seed": seed},
            )
            folders.append(folder)
    text = Page(render_comparison(compare(folders))).text
    error = 0.5 / 3**0.5
    assert (
        f"Validation loss, nats per token 3 4 +1 ± {error:.2g} 3 may be noise" in text
    )  # t is 3.5; 4.3 is clear
    assert difference({0: 1.0, 1: 2.0}, {0: 2.0, 2: 9.0}, 1).num_seeds == 1
    clear = difference({0: 1.0, 1: 3.0, 2: 5.0}, {0: 2.0, 1: 4.25, 2: 5.75}, 1)
    assert clear.is_told_apart
    assert clear.mean == 1
    alone = Page(render_comparison(compare(folders[:3]))).text
    assert "The runs are one setting with 3 seeds." in alone
    assert "Validation loss, nats per token 3 2" in alone


def test_losses_of_other_tokens_are_not_compared(tmp_path):
    data = {"source": "synthetic", "tokenizer": "bytes", "vocab_size": 512}
    folders = [
        make_run(tmp_path / "bytes", data=data, train={"seed": 0}),
        make_run(tmp_path / "pieces", data=data | {"tokenizer": "bpe"}, train={"seed": 0}),
    ]
    text = Page(render_comparison(compare(folders))).text
    assert "They differ in data.tokenizer, so in what a token is" in text
    assert "Bits per byte over steps" in text
    assert "Validation loss" not in text
    assert "Training loss" not in text


def test_dense_runs_alone_have_no_routing(tmp_path):
    runs = [make_run(tmp_path / name, num_experts=0) for name in "ab"]
    html = render_comparison(compare(runs))
    assert 'id="losses"' in html
    assert 'id="routing"' not in html
    assert "The configurations are the same" in html


def test_a_comparison_of_many_wide_runs_stays_under_the_size_limit(tmp_path, monkeypatch):
    for name in range(16):
        make_run(tmp_path / f"run {name}", num_experts=2, layers=range(61), learning_rate=name)
    # The largest figures there are, by the next test.
    monkeypatch.setattr(
        "moejax.inspection.report.comparison_page.draw_runs", lambda *_, **__: "x" * 120_000
    )
    monkeypatch.setattr(
        "moejax.inspection.report.comparison_page.draw_sorted_load", lambda *_, **__: "x" * 150_000
    )
    html = render_comparison(compare(sorted(tmp_path.iterdir())))
    assert "12 of 61 layers are shown" in html
    assert 3_000_000 < len(html.encode()) < 5_000_000


def test_figures_of_sixteen_large_runs_are_smaller_than_the_page_counts_on(tmp_path):
    rng = np.random.default_rng(0)
    runs = {}
    for name in range(16):
        run = open_run(make_run(tmp_path / str(name)))
        lines = [{"step": step, "loss/lm": float(x)} for step, x in enumerate(rng.random(1000))]
        (run.workdir / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        runs[str(name)] = run
    assert 60_000 < len(figures.draw_runs(runs, "loss/lm", "nats", legend=False)) < 120_000
    counts = {str(name): rng.integers(0, 10**6, 256) for name in range(16)}
    assert 60_000 < len(figures.draw_sorted_load(counts, legend=False)) < 150_000


def test_the_command_writes_next_to_the_first_run_or_to_its_output(tmp_path, capsys, monkeypatch):
    first, second = make_run(tmp_path / "runs/a"), make_run(tmp_path / "other/b")
    monkeypatch.setattr(
        "moejax.inspection.report.comparison_page.render_comparison",
        lambda comparison: repr(comparison.runs),
    )
    assert main(["report", str(first), str(second)]) == 0
    path = tmp_path / "runs/comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert list(compare([first, second]).runs) == ["a", "b"]
    assert "'a'" in path.read_text()
    assert main(["report", str(second), str(first), f"--output={tmp_path / 'page.html'}"]) == 0
    assert (tmp_path / "page.html").read_text().index("'b'") < (
        tmp_path / "page.html"
    ).read_text().index("'a'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "a"], "is given twice"),
        (["a", "nowhere"], "nowhere is not a folder"),
        (["nowhere"], "--workdir=nowhere is not a folder"),
        (["a", "--workdir=a"], "name run directories one way"),
        (["a", "--output=x.html"], "--output=x.html is for comparisons"),
        (["a", "b", "--output=none/x.html"], "none is not a folder; make it first"),
        (["a", "b", "--output=pipe"], "pipe must be a file, and is something else"),
        (["a"] * 17, "17 runs were given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_one_run_is_no_comparison(tmp_path):
    with pytest.raises(RunError, match="1 runs were given; a comparison takes 2 to 16"):
        write_comparison([tmp_path])
