"""The page of runs: what it reads, shows and refuses; in a browser, that it fetches nothing."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.inspection.figures.axes import place
from moejax.inspection.figures.colors import FIRST, RunColors
from moejax.inspection.figures.run import LOSS_CHARTS, MAX_POINTS, Chart
from moejax.inspection.runs.paths import RunPathError, check_folder
from moejax.inspection.runs.run import open_run
from moejax.inspection.viewer import page as view_page
from moejax.inspection.viewer.metrics_reader import MetricsReader
from moejax.inspection.viewer.plots import (
    CurvePlot,
    charts_of,
    columns,
    constant,
    load_plot,
    signature,
)
from moejax.inspection.viewer.run_folder import LiveRun, RunFolder, age, find_runs
from moejax.training.run_directory.routing_log import RoutingLog

REPOSITORY = Path(__file__).parents[3]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PLENTY = 10**6
FACTS = {
    "config": {"moe": {"num_experts": 4, "top_k": 2}, "train": {"num_steps": 100}},
    "versions": {"jax": "0.10.2"},
    "git_commit": "abc123",
    "device": "4 x TPU v5e",
    "command": "moejax train --config=configs/tiny_moe.py",
    "parameters": {"total": 1000, "active": 400},
}


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def write_run(workdir, *values, **facts):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(FACTS | facts))
    (workdir / "metrics.jsonl").write_text(lines(*values))
    return workdir


def append(path, text):
    with path.open("a") as file:
        file.write(text)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def read(reader, key="a", max_bytes=PLENTY):
    reader.read_on(max_bytes)
    return [x.tolist() for x in reader.points(key)]


def test_only_what_was_appended_is_read(file):
    file.write_text(lines(*({"step": step, "a": step} for step in range(1, 1000))))
    reader = MetricsReader(file)
    assert reader.read_on(PLENTY) == file.stat().st_size
    assert reader.read_on(PLENTY) == 0
    more = lines({"step": 1000, "a": 7.5}, {"step": 1000, "eval/loss": 2})
    append(file, more)
    assert reader.read_on(PLENTY) == len(more)
    assert (reader.last("a"), reader.last("eval/loss"), reader.last_step) == (7.5, 2.0, 1000)
    assert len(reader.points("a")[0]) == 1000


def test_a_line_that_is_being_written_is_left_for_the_next_poll(file):
    file.write_text(lines({"step": 1, "a": 1}) + '{"step": 2, "a"')
    reader = MetricsReader(file)
    assert read(reader) == [[1], [1.0]]
    assert reader.read_on(PLENTY) == 0
    append(file, ": 2}\n")
    assert read(reader) == [[1, 2], [1.0, 2.0]]
    assert reader.problem == ""


@pytest.mark.parametrize("in_place", [False, True], ids=["renamed", "in place"])
@pytest.mark.parametrize("num_new", [1, 50], ids=["shorter", "longer"])
def test_a_file_that_was_written_again_is_read_from_its_beginning(file, num_new, in_place):
    old = [{"step": step, "a": 1} for step in range(20)]
    new = [{"step": step, "a": 2} for step in range(num_new)]
    file.write_text(lines(*old))
    reader = MetricsReader(file)
    reader.read_on(PLENTY)
    replacement = file if in_place else file.with_suffix(".tmp")
    replacement.write_text(lines(*new))
    replacement.replace(file)
    assert read(reader) == [list(range(num_new)), [2.0] * num_new]


def test_a_long_file_is_read_in_parts_and_gives_the_series_of_the_run(tmp_path):
    rng = np.random.default_rng(0)
    steps = [*range(40), *range(25, 60)]  # resumed at 25
    values = [{"step": step, "a": float(rng.normal())} for step in steps]
    write_run(tmp_path, *values)
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    num_reads = 0
    while reader.read_on(300):
        num_reads += 1
    assert not reader.is_behind
    assert num_reads > 5
    for mine, theirs in zip(reader.points("a"), open_run(tmp_path).series("a"), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[1]",
        '{"a": 1}',
        '{"step": 3, "a": "x"}',
        '{"step": 1e400, "a": 1}',
        "[" * 100_000,
        "\0\0",
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_read(file, damage):
    before, after = lines({"step": 1, "a": 1}), lines({"step": 4, "a": 4})
    file.write_text(f"{before}{damage}\n{after}")
    reader = MetricsReader(file)
    assert read(reader) == [[1, 4], [1.0, 4.0]]
    assert f"{file}: line 2 is damaged" in reader.problem
    assert "delete that line" in reader.problem


def test_a_curve_is_downsampled_to_its_extremes_and_ends(tmp_path):
    values = np.sin(np.arange(20_000) / 100)
    values[[7_777, 13_131, 0, -1]] = 50, -50, values[30], values[-30]  # the ends are no extremes
    write_run(
        tmp_path, *({"step": i, "a": value, "tokens": 8 * i} for i, value in enumerate(values))
    )
    run = LiveRun(tmp_path)
    run.poll()
    data = columns(run, "a", "tokens")
    assert len(data["x"]) <= MAX_POINTS
    assert {0, 7_777, 13_131, 19_999} <= set(data["step"].tolist())
    assert (data["x"] == 8 * data["step"]).all()
    assert (data["y"] == values[data["step"]]).all()


def test_tokens_are_interpolated_between_logged_steps(file):
    file.write_text(lines({"step": 10, "tokens": 100}, {"step": 20, "tokens": 300}))
    reader = MetricsReader(file)
    reader.read_on(PLENTY)
    assert place("tokens", np.array([5, 10, 15]), reader.points, None).tolist() == [50, 100, 200]


def test_runs_are_found_below_a_folder_and_not_inside_another_run(tmp_path):
    for name in ("b", "a", "sweep/one", "a/inside", ".hidden/x", "d/e/f", "d/e/g/too_deep"):
        write_run(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert list(find_runs(tmp_path)[0]) == ["a", "b", "d/e/f", "sweep/one"]
    assert find_runs(tmp_path / "a") == ({"a": tmp_path / "a"}, [])
    assert find_runs(tmp_path / "none") == ({}, [])


def test_links_out_of_the_folder_are_named_and_not_followed(tmp_path):
    outside = write_run(tmp_path / "outside/secret")
    folder = tmp_path / "runs"
    write_run(folder / "own")
    (folder / "linked").symlink_to(outside)
    (folder / "above").symlink_to(outside.parent)
    (folder / "latest").symlink_to(folder / "own")
    run_folder = RunFolder(folder)
    run_folder.poll()
    assert list(run_folder.runs) == ["latest", "own"]
    assert run_folder.links == ["above", "linked"]
    text = view_page.heading(folder, 2, run_folder.links, is_behind=False)
    assert "links that lead out of this folder: <code>above</code>, <code>linked</code>." in text


def break_file(workdir, name, how):
    """Puts a link to a file elsewhere, a named pipe or a device in the place of a run's file."""
    path = workdir / name
    path.unlink(missing_ok=True)
    if how == "link":
        secret = workdir.parent.parent / "secret"
        secret.write_text(json.dumps(FACTS | {"step": 1, "device": "secret device"}))
        path.symlink_to(secret)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("how", ["link", "pipe", "device"])
def test_files_that_are_not_a_run_are_named_and_not_read(tmp_path, how):
    for name in ("config.json", "metrics.jsonl", "alarms.jsonl", "report.html"):
        workdir = write_run(tmp_path / "runs" / name, {"step": 3, "a": 1})
        break_file(workdir, name, how)
        run = LiveRun(workdir)
        run.poll()
        said = view_page.report_frame(run) if name == "report.html" else run.state.problem
        assert f"{workdir / name} is " in said
        assert "secret device" not in said
        assert ("leads out of the run" in said) == (how != "pipe")
        assert ("no regular file" in said) == (how == "pipe")
    routing = tmp_path / "runs/report.html/routing"
    (routing / "counts/c").mkdir(parents=True)
    check_folder(routing.parent, "routing")
    break_file(routing / "counts/c", "0", how)
    with pytest.raises(RunPathError, match="routing/counts/c/0 is no regular file"):
        check_folder(routing.parent, "routing")


def test_each_run_has_its_own_colour_by_its_name_however_many_there_are():
    names = [f"run {i}" for i in range(200)]
    colors = RunColors()
    given = [colors.color_of(name) for name in names]
    assert len(set(given)) == 200
    assert [colors.color_of(name) for name in names] == given
    assert set(given[:8]) == set(FIRST)  # the easiest to tell apart come first
    assert RunColors().color_of("run 5") in FIRST
    assert RunColors().color_of("run 5") == RunColors().color_of("run 5")


def write_sweep(folder, *overrides):
    arms = [{"id": f"{i:010d}", "overrides": values} for i, values in enumerate(overrides)]
    for arm in arms:
        write_run(folder / "arms" / arm["id"], {"step": 1, "a": 1})
    (folder / "sweep.json").write_text(json.dumps({"arms": arms}))
    return folder


def test_arms_of_a_sweep_are_named_by_what_differs(tmp_path):
    same = {"moe.num_experts": 8, "optimizer.learning_rate": 0.001}
    sweep = write_sweep(
        tmp_path / "widths",
        same | {"train.seed": 0, "moe.top_k": 1},
        same | {"train.seed": 0, "moe.top_k": 2},
        same | {"train.seed": 1, "moe.top_k": 1},
        same | {"train.seed": 1, "moe.top_k": 1},
    )
    run_folder = RunFolder(tmp_path)
    run_folder.poll()
    assert [run.name for run in run_folder.runs.values()] == [
        "widths: top_k 1, seed 0",
        "widths: top_k 2, seed 0",
        "widths: top_k 1, seed 1, 0000000002",
        "widths: top_k 1, seed 1, 0000000003",
    ]
    assert open_run(sweep / "arms/0000000001").name_in_words == "widths: top_k 2, seed 0"
    (sweep / "sweep.json").write_text("[")
    run_folder.poll()
    assert next(iter(run_folder.runs.values())).name == "widths/arms/0000000000"


def test_the_newest_of_many_runs_are_listed_and_a_part_of_a_name_finds_others(tmp_path):
    from moejax.inspection.viewer.session import MAX_LISTED, RunList

    for i in range(MAX_LISTED + 5):
        os.utime(
            write_run(tmp_path / f"run {i:02}", {"step": 1, "a": 1}) / "metrics.jsonl",
            (100, 100 + i),
        )
    run_folder = RunFolder(tmp_path)
    run_folder.poll()
    shown = RunList(run_folder, lambda *_: None)
    shown.show()
    assert list(shown.chosen) == ["run 41", "run 42", "run 43", "run 44"]
    assert len(shown._body.objects) == MAX_LISTED
    assert "40 of 45 runs are listed" in shown._left_out.object
    shown._part.value = "RUN 00"
    shown.show()
    assert len(shown._body.objects) == 1 + 4  # those shown stay
    shown._boxes["run 00"].value = True
    assert "run 00" in shown.chosen


def test_panes_hold_plain_text_which_panel_escapes_once(tmp_path):
    import panel as pn

    from moejax.inspection.viewer.session import Session

    write_run(tmp_path / "<b>", {"step": 1, "loss/lm": 2.0}, {"step": 2, "loss/lm": 1.0})
    panes = Session(RunFolder(tmp_path)).page.select(pn.pane.HTML)
    assert len(panes) >= 5
    # `Markup.replace` escapes its arguments, so that escaping it as Panel does escapes twice.
    assert {type(pane.object) for pane in panes} == {str}
    assert any("&lt;b&gt;" in pane.object for pane in panes)


def test_what_never_changes_is_said_in_a_sentence(tmp_path):
    for name, last in (("a", 0), ("b", 1)):
        write_run(
            tmp_path / name,
            {"step": 1, "moe/dead_experts": 0},
            {"step": 2, "moe/dead_experts": last},
        )
    run_folder = RunFolder(tmp_path)
    run_folder.poll()
    chart = Chart("Dead experts", (("moe/dead_experts", ""),), "experts", "")
    a = {"a": run_folder.runs["a"]}
    assert constant(chart, run_folder.runs) is None
    assert constant(chart, a) == 0
    assert "throughout: dead experts 0." in view_page.constants([(chart, 0.0)])


def test_a_run_says_how_far_it_is_and_which_alarms_are_on(tmp_path):
    speeds = (
        {"step": step, "perf/tokens_per_s": speed}
        for step, speed in ((3, 1e3), (6, 9e4), (10, 5e4))
    )
    write_run(tmp_path, *speeds, {"step": 20, "eval/loss": 2.5, "eval/bits_per_byte": 1.5})
    on = {"step": 10, "rule": "collapse", "state": "on", "layers": [3, 1]}
    (tmp_path / "alarms.jsonl").write_text(
        lines(on, {"step": 20, "rule": "drops", "state": "on", "layers": [1]})
    )
    run = LiveRun(tmp_path)
    run.poll()
    state = run.state
    assert (state.steps, state.num_steps, state.problem) == (20, 100, "")
    assert (state.eval_loss, state.bits_per_byte, state.tokens_per_s) == (2.5, 1.5, 5e4)
    assert state.alarms == ("collapse in layers 1, 3", "drops in layer 1")
    version = run.version
    run.poll()
    assert run.version == version
    append(
        tmp_path / "alarms.jsonl",
        lines({"step": 30, "rule": "collapse", "state": "off", "layers": [1, 3]}),
    )
    run.poll()
    assert run.state.alarms == ("drops in layer 1",)
    assert run.version == version + 1


def test_new_runs_appear_and_what_is_wrong_with_others_is_text(tmp_path):
    run_folder = RunFolder(tmp_path)
    run_folder.poll()
    assert run_folder.runs == {}
    for name in "abc":
        write_run(tmp_path / name, {"step": 1, "a": 1})
    (tmp_path / "b/config.json").write_text("{")
    run_folder.poll()
    assert list(run_folder.runs) == ["a", "b", "c"]
    assert "config.json is damaged" in run_folder.runs["b"].state.problem
    assert run_folder.runs["b"].state.steps == 1  # its curves are shown all the same
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "c/alarms.jsonl").write_text("{}\n")
    write_run(tmp_path / "b", {"step": 2, "a": 1})
    run_folder.poll()
    assert run_folder.runs["a"].state.problem == f"{tmp_path / 'a'} is gone"
    assert run_folder.runs["b"].state.problem == ""
    assert "alarms.jsonl: line 1 is damaged" in run_folder.runs["c"].state.problem


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 4, "num_zero_experts": "2"},
        {"num_experts": -1},
        {"num_experts": 4, "num_zero_experts": 1e999},
    ],
)
def test_a_run_with_impossible_experts_is_text(tmp_path, moe):
    run = LiveRun(write_run(tmp_path / "a", config={"moe": moe}))
    run.poll()
    assert "config.json" in run.state.problem
    assert run.run is None


def test_one_poll_reads_no_more_than_it_may_of_all_runs_together(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, *({"step": step, "a": 1} for step in range(100)))
    run_folder = RunFolder(tmp_path)
    size = (tmp_path / "a/metrics.jsonl").stat().st_size
    run_folder.poll(size + 50)
    assert run_folder.is_behind
    assert [run.metrics.last_step for run in run_folder.runs.values()] == [
        99,
        1,
    ]  # two lines are 50 bytes
    run_folder.poll(size)
    assert not run_folder.is_behind
    assert run_folder.runs["b"].metrics.last_step == 99


def test_the_newest_runs_are_shown_at_first(tmp_path):
    run_folder = RunFolder(tmp_path)
    for i, name in enumerate("abc"):
        os.utime(write_run(tmp_path / name) / "metrics.jsonl", (100, [300, 100, 200][i]))
    run_folder.poll()
    assert run_folder.newest(2) == ["a", "c"]
    append(tmp_path / "b/metrics.jsonl", lines({"step": 1, "a": 1}))
    run_folder.poll()
    assert run_folder.newest(2) == ["b"]  # those without a curve would show nothing


def test_ages_are_coarse():
    now = time.time()
    ages = [None, now, now - 61, now - 7190, now - 7300, now - 3 * 86_400]
    assert [age(x) for x in ages] == [
        "never",
        "just now",
        "1 min ago",
        "120 min ago",
        "2 h ago",
        "3 days ago",
    ]


def test_a_chart_draws_each_metric_of_each_run_and_takes_what_is_new(tmp_path):
    chart = Chart("Loss", (("loss/lm", "training"), ("eval/loss", "validation")), "nats", "")
    write_run(
        tmp_path / "a",
        {"step": 1, "loss/lm": 3},
        {"step": 2, "loss/lm": 2},
        {"step": 2, "eval/loss": 2.5},
    )
    write_run(tmp_path / "b", {"step": 1, "loss/lm": 4}, {"step": 2, "loss/lm": 3})
    run_folder = RunFolder(tmp_path)
    run_folder.poll()
    plot = CurvePlot(chart, run_folder.runs, "steps")
    assert sorted(renderer.glyph.__class__.__name__ for renderer in plot.plot.renderers) == [
        "Line",
        "Line",
        "Scatter",
    ]
    assert plot.caption == "Solid: training; dots: validation."
    before = signature(chart, run_folder.runs)
    append(tmp_path / "b/metrics.jsonl", lines({"step": 3, "loss/lm": 1}))
    run_folder.poll()
    assert signature(chart, run_folder.runs) == before
    plot.update(["b"])
    ends = {
        (r.name, r.glyph.__class__.__name__): r.data_source.data["y"][-1]
        for r in plot.plot.renderers
    }
    assert ends == {("a", "Line"): 2, ("a", "Scatter"): 2.5, ("b", "Line"): 1}
    append(tmp_path / "b/metrics.jsonl", lines({"step": 3, "eval/loss": 1}))
    run_folder.poll()
    assert signature(chart, run_folder.runs) != before
    assert CurvePlot(LOSS_CHARTS[2], run_folder.runs, "steps").plot is None


def test_entropy_is_compared_with_uniform_routing_where_the_runs_agree_on_it(tmp_path):
    for name, num_experts in (("a", 4), ("b", 4), ("c", 8), ("dense", 0)):
        write_run(tmp_path / name, config={"moe": {"num_experts": num_experts}})
    run_folder = RunFolder(tmp_path)
    run_folder.poll()

    def reference(names):
        charts = charts_of([run_folder.runs[name] for name in names])
        return next(chart for chart in charts if chart.title == "Entropy").reference

    assert reference(["a", "b", "dense"])[0] == pytest.approx(np.log(4))
    assert reference(["a", "c"]) is None
    assert reference([]) is None


def test_the_load_of_a_layer_is_a_row_of_colours(tmp_path):
    plot = load_plot(np.array([[2, 2, 2, 2], [8, 0, 0, 0]]), [1, 3])
    data = plot.renderers[0].data_source.data
    (ratio_NE,), (log_NE,) = data["ratio"], data["log"]
    assert ratio_NE.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0]]
    assert log_NE[0].tolist() == [0, 0, 0, 0]
    assert log_NE[1, 0] == 2
    assert np.isnan(log_NE[1, 1:]).all()  # black: no token at all
    assert plot.yaxis[0].major_label_overrides == {0: "1", 1: "3"}


def test_what_comes_from_a_run_is_escaped(tmp_path):
    evil = '<img src=x onerror="1">'
    run = LiveRun(write_run(tmp_path / evil))
    (tmp_path / evil / "alarms.jsonl").write_text(
        lines({"step": 1, "rule": "<b>", "state": "on", "layers": [1]})
    )
    (tmp_path / evil / "report.html").write_text('"><script>1</script>')
    run.poll()
    frame = view_page.report_frame(run)
    for text in (
        view_page.run_row(run),
        view_page.heading(tmp_path / evil, 1, is_behind=False),
        frame,
    ):
        assert "<img" not in text
        assert "<b>" not in text
        assert "<script" not in text
    assert '<iframe sandbox="" ' in frame
    assert 'srcdoc="&quot;&gt;&lt;script&gt;1' in frame


def test_a_run_without_a_report_shows_the_command_that_makes_it(tmp_path):
    (tmp_path / "a b").mkdir()
    text = view_page.report_frame(LiveRun(tmp_path / "a b"))
    assert f"<span>--workdir=&#x27;{tmp_path}/a b&#x27;</span>" in text
    assert "<iframe" not in text


class Browser:
    """Chromium without a window, driven through its DevTools."""

    TEXT = """(() => { const texts = []; const walk = node => {
      if (['STYLE', 'SCRIPT'].includes(node.nodeName)) return;
      if (node.nodeType === 3 && node.textContent.trim()) texts.push(node.textContent.trim());
      if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
      node.childNodes.forEach(walk); };
      walk(document.body); return texts.join('\\n'); })()"""
    FRAME = """(() => { let found = ''; const walk = node => {
      if (node.nodeName === 'IFRAME') found = node.sandbox.length + node.srcdoc;
      if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
      node.childNodes.forEach(walk); };
      walk(document.body); return found; })()"""
    CLICK = """(() => { const walk = node => {
      const isTab = node.classList && node.classList.contains('bk-tab');
      if (isTab && node.textContent.trim() === '%s') node.click();
      if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
      node.childNodes.forEach(walk); };
      walk(document.body); })()"""

    def __init__(self, folder):
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "about:blank",
        ]
        self.process = subprocess.Popen([CHROMIUM, *flags], stderr=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stderr if "DevTools listening" in line)
        self.port = re.search(r":(\d+)/", line)[1]
        self.events, self._calls = [], 0

    async def open(self, url):
        from tornado.httpclient import AsyncHTTPClient
        from tornado.websocket import websocket_connect

        answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{self.port}/json/list")
        page = next(target for target in json.loads(answer.body) if target["type"] == "page")
        self._socket = await websocket_connect(page["webSocketDebuggerUrl"])
        for domain in ("Page", "Network", "Runtime"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def call(self, method, **parameters):
        self._calls += 1
        await self._socket.write_message(
            json.dumps({"id": self._calls, "method": method, "params": parameters})
        )
        while (answer := json.loads(await self._socket.read_message())).get("id") != self._calls:
            self.events.append(answer)
        return answer["result"]

    async def evaluate(self, script):
        return (await self.call("Runtime.evaluate", expression=script, returnByValue=True))[
            "result"
        ].get("value")

    async def wait_for(self, script, holds):
        """Evaluates a script until its value is as wanted, and returns it."""
        deadline = time.monotonic() + 30
        while not holds(value := await self.evaluate(script) or ""):
            assert time.monotonic() < deadline, value
            await asyncio.sleep(0.2)
        return value

    def requests(self):
        sent = [
            event["params"]["request"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [request["url"] for request in sent]


@contextlib.contextmanager
def served(folder, modules=""):
    """Serves the page in a process of its own; yields the process and the page's address."""
    command = [sys.executable, "-m", "moejax", "view", f"--workdir={folder}"]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{modules}"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def heard_by(listener):
    """Returns what was sent to a socket.

    Chromium may connect ahead of a request that the page's policy then forbids.
    """
    heard = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                heard += filter(None, [connection.recv(1000)])
    return heard


async def status(url, **headers):
    """What the server answers a request: its code and body."""
    from tornado.httpclient import AsyncHTTPClient, HTTPRequest

    request = HTTPRequest(url, headers=headers, request_timeout=20)
    answer = await AsyncHTTPClient().fetch(request, raise_error=False)
    return answer.code, answer.body


async def socket_status(url, origin):
    """101 if a websocket opens, else the code of the refusal."""
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    try:
        request = HTTPRequest(url.replace("http", "ws", 1), headers={"Origin": origin})
        (await websocket_connect(request, subprotocols=["bokeh", "x"])).close()
        return 101
    except HTTPClientError as error:
        return error.code


async def check_what_is_refused(url, imported):
    page, _, token = url.partition("?")
    code, body = await status(url)
    assert (
        code == 200 and b"moejax view" in body and b"first" not in body
    )  # runs are sent over the websocket alone
    refused = 403, b""
    wrong = f"{page}?token={'0' * 48}"
    for address in (
        page,
        wrong,
        f"{url}&{token}",
        f"{page}?{token[:-1]}",
        f"{page}{token}",
        f"{page}?token=",
    ):
        assert await status(address) == refused, address
    for host in ("evil.example", "127.0.0.1", "localhost:1"):
        assert await status(url, Host=host) == refused
        assert await status(f"{page}static/js/bokeh.min.js", Host=host) == refused
    assert (await status(f"{page}static/js/bokeh.min.js"))[0] == 200
    own_origin = page.rstrip("/")
    for origin, query, code in (
        ("http://evil.example", f"?{token}", 403),
        (own_origin, "", 403),
        (own_origin, f"?{token}", 101),
    ):
        assert await socket_status(f"{page}ws{query}", origin) == code, (origin, query)
    attack = f"{page}components/payload/A/_css/x"
    assert await status(attack) == refused
    assert await status(f"{attack}?{token}", Host="evil.example") == refused
    assert (await status(f"{attack}?{token}"))[
        0
    ] == 404  # whoever knows the token imports nothing either
    for route in ("metadata", "autoload.js", "../../etc/passwd", "static/../../../../etc/passwd"):
        assert (await status(f"{page}{route}?{token}"))[0] in (403, 404), route
    assert not imported.exists()


def test_the_server_refuses_others_imports_nothing_and_waits_for_no_pipe(tmp_path):
    folder, imported = tmp_path / "runs", tmp_path / "imported"
    write_run(folder / "first", {"step": 20, "loss/lm": 2})
    for name in ("config.json", "metrics.jsonl", "alarms.jsonl", "report.html"):
        break_file(write_run(folder / f"pipe in {name}", {"step": 1, "a": 1}), name, "pipe")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/payload.py").write_text(f"open({str(imported)!r}, 'w').close()")
    with served(folder, tmp_path / "modules") as (process, url):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[0-9a-f]{48}", url), (
            process.stderr.read()
        )
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", int(re.search(r":(\d+)/", url)[1])), timeout=5)
        asyncio.run(check_what_is_refused(url, imported))


async def check_what_is_shown(browser, url, folder):
    await browser.open(url)
    text = await browser.wait_for(
        Browser.TEXT, lambda text: "Language-model loss" in text and "first" in text
    )
    assert "20 of 100" in text
    assert "MaxVio" in text
    assert "<img src=x onerror=document.title=1>" in text
    append(folder / "first/metrics.jsonl", lines({"step": 30, "loss/lm": 1.25, "tokens": 300}))
    write_run(folder / "third", {"step": 7, "loss/lm": 1})
    text = await browser.wait_for(
        Browser.TEXT, lambda text: "30 of 100" in text and "third" in text
    )
    ends = (
        "JSON.stringify([...Bokeh.documents[0]._all_models.values()]"
        ".filter(m => m.type === 'ColumnDataSource')"
        ".map(m => [...m.data.y ?? []].at(-1)))"
    )
    await browser.wait_for(ends, lambda ends: 1.25 in json.loads(ends or "[]"))
    await browser.evaluate(Browser.CLICK % "Load")
    await browser.wait_for(Browser.TEXT, lambda text: "ended with step 20" in text)
    await browser.evaluate(Browser.CLICK % "Report")
    await browser.wait_for(Browser.FRAME, lambda frame: "top.document.title" in frame)
    await asyncio.sleep(0.5)
    assert (
        await browser.evaluate("document.title") == "moejax view"
    )  # no script of a run has changed it
    asked = [request for request in browser.requests() if request.startswith(("http", "ws"))]
    assert asked and all(
        request.startswith(url.partition("?")[0]) or "/stolen" in request for request in asked
    ), asked


@pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the path"
)
def test_a_browser_updates_the_page_and_fetches_nothing_from_elsewhere(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "<img src=x onerror=document.title=1>", {"step": 20, "loss/lm": 2})
    first = write_run(
        folder / "first",
        {"step": 10, "loss/lm": 3, "moe/max_violation": 1},
        {"step": 20, "loss/lm": 2},
    )
    RoutingLog(first, [1], 4).append(
        20, np.array([[1, 2, 3, 4]]), np.full((1, 4), 0.25, np.float32)
    )
    with socket.create_server(("127.0.0.1", 0)) as thief, served(folder) as (process, url):
        thief.setblocking(False)
        steal = f"http://127.0.0.1:{thief.getsockname()[1]}/stolen"
        for run in folder.iterdir():
            (run / "report.html").write_text(
                f'<img src="{steal}"><link rel=stylesheet href="{steal}">'
                "<script>top.document.title = 1</script>"
                f'<meta http-equiv="refresh" content="0;url={steal}">'
                f'<iframe src="{steal}"></iframe>'
            )
        browser = Browser(tmp_path / "profile")
        try:
            asyncio.run(check_what_is_shown(browser, url, folder))
        finally:
            browser.process.terminate()
            browser.process.communicate()
        assert heard_by(thief) == []
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read().splitlines()[-1] == "moejax: interrupted"
