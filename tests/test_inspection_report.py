"""The report: one harmless, self-contained page for any run, whatever it holds and however little."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moejax.inspection.report import Sample, render_report, write_report
from moejax.inspection.run import open_run
from moejax.training.routing_log import RoutingLog

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;\x00\x1b\u202e"
VOID = {"meta", "img", "br", "link", "input", "hr"}
MOE_SECTIONS = ["alarms", "routing", "layers", "load", "final-load", "settling", "coactivation", "flow"]
EXPERT_SECTIONS = ["tokens", "attributes", "text", "counterfactuals"]


class Page(HTMLParser):
    """Elements, attributes and text of a page; complains about tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words, self.open, self.style = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)


def training_line(step, num_experts):
    line = {"step": step, "tokens": 100 * step, "loss/lm": 8 / step, "loss/total": 9 / step, "learning_rate": 1e-3}
    line |= {"grad_norm": 1.0, "perf/tokens_per_s": 1000.0 + step, "skipped_steps": 0}
    if num_experts:
        line |= {"loss/balance": 1.1, "loss/z": 3.0, "loss/balance_weighted": 0.011, "loss/z_weighted": 0.003}
        line |= {"moe/max_violation": 0.4, "moe/dead_experts": 1, "moe/dropped": 0.0, "moe/entropy": 1.2}
        line |= {"moe/load_entropy": 1.3}
    return line


def make_run(workdir, *, num_experts=4, layers=(0, 2), steps=(10, 20, 30), evaluate=True, routing=True, **facts):
    """A run directory; expert 1 of the second layer gets nothing."""
    facts = {
        "config": {"moe": {"num_experts": num_experts, "top_k": 2}, "train": {"num_steps": 2000, "seed": 0}},
        "versions": {"jax": "0.10.2"},
        "git_commit": "abc123",
        "device": "4 x TPU v5e",
        "command": "moejax train --config=configs/tiny_moe.py",
        "parameters": {"total": 1_000_000, "active": 400_000},
    } | facts
    lines = [training_line(step, num_experts) for step in steps]
    if evaluate:
        lines.append({"step": steps[-1], "eval/loss": 3.125, "eval/perplexity": 22.76, "eval/bits_per_byte": 1.0625})
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(facts))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if num_experts and routing:
        log = RoutingLog(workdir, layers, num_experts)
        counts = np.full((len(layers), num_experts), 50)
        counts[1, 1] = 0
        for step in steps:
            log.append(step, counts, np.full(counts.shape, 1 / num_experts, np.float32))
    return open_run(workdir)


def token_counts(N=2, E=4, V=30):
    counts = np.full((N, E, V), 40)
    counts[:, 0, 7] = 4000
    return counts


def render(run, counts=None, piece=str, samples=()):
    return render_report(run, token_counts_NEV=counts, piece=piece, samples=samples)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of an ordinary run, with tokens and a sample: text of the page."""
    run = make_run(tmp_path_factory.mktemp("runs") / "runs-tiny")
    return render(run, token_counts(), samples=[Sample("My fellow", " Americans\n\nwe", 0.8, 0.95)])


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures out, for tests of what is written."""
    for name in ("draw_curves", "draw_load_over_time", "draw_final_load"):
        monkeypatch.setattr(f"moejax.inspection.figures.{name}", lambda *_, **__: "data:image/svg+xml;base64,")


def test_a_report_has_every_section_and_a_contents_list_that_leads_there(whole):
    page = Page(whole)
    assert page.ids == ["summary", "losses", "speed", *MOE_SECTIONS, *EXPERT_SECTIONS, "samples", "config"]
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{anchor}" for anchor in page.ids]


def test_the_summary_states_size_quality_speed_and_origin(whole):
    text = Page(whole).text
    for fact in (
        "runs-tiny",
        "4 experts, top 2 in 2 layers",
        "1,000,000 in total, 400,000 active for a token (40%)",
        "3.125 nats per token, at step 30",
        "22.76",
        "1.062",  # bits per byte to four digits
        "1,020 (median)",
        "30 of 2000",
        "4 x TPU v5e",
        "jax 0.10.2",
        "abc123",
        "moejax train --config=configs/tiny_moe.py",
    ):
        assert fact in text


def test_an_evaluation_that_got_worse_shows_the_lowest_too(tmp_path, undrawn):
    make_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "eval/loss": 3.5}\n')
    assert "3.5 nats per token, at step 40 (lowest: 3.125 at step 30)" in Page(render(open_run(tmp_path))).text


def test_the_page_stands_alone_and_forbids_fetching(whole):
    page = Page(whole)
    assert whole.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
            assert attributes["alt"]
    assert "url(" not in page.style and "@import" not in page.style
    metas = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert any(meta.get("content", "").startswith("default-src 'none'") for meta in metas)
    assert "http" not in re.sub(r"data:image/[^\"]*|http-equiv", "", whole)


def test_hostile_text_from_the_run_is_shown_and_not_obeyed(tmp_path):
    run = make_run(
        tmp_path / "<b>run",
        config={
            "moe": {"num_experts": 4, "top_k": HOSTILE},
            HOSTILE: {HOSTILE: HOSTILE},
            "train": {"num_steps": HOSTILE},
        },
        versions={HOSTILE: HOSTILE},
        git_commit=HOSTILE,
        device=HOSTILE,
        command=HOSTILE,
    )
    with open(tmp_path / "<b>run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 40, f"loss/{HOSTILE}$x^": 1.0}) + "\n")
    run = open_run(tmp_path / "<b>run")
    html = render(run, token_counts(), piece=lambda _: HOSTILE, samples=[Sample(HOSTILE, HOSTILE, 1.0, 1.0)])
    page = Page(html)
    assert not {"script"} & {tag for tag, _ in page.elements}
    assert all(a["src"].startswith("data:") for tag, a in page.elements if tag == "img")
    assert "<b>run" in page.text
    assert page.text.count("<script>alert('x')</script>") >= 12
    assert "\x00" not in html and "\x1b" not in html


def test_lone_surrogates_do_not_keep_the_page_from_being_written(tmp_path, undrawn):
    run = make_run(tmp_path)
    html = render(run, token_counts(), piece=lambda _: "\udc80", samples=[Sample("\ud800", "\udfff", 1.0, 1.0)])
    assert write_report(tmp_path, html).read_text(encoding="utf-8") == html


def test_a_dense_run_says_so_and_has_no_expert_sections(tmp_path):
    page = Page(render(make_run(tmp_path, num_experts=0)))
    assert "This is a dense run" in page.text
    assert not ({*MOE_SECTIONS, *EXPERT_SECTIONS} - {"routing"}) & set(page.ids)
    assert "MaxVio" not in page.text and "Balance loss" not in page.text


def test_a_run_with_a_single_line_is_reported(tmp_path):
    page = Page(render(make_run(tmp_path, steps=(10,), evaluate=False)))
    assert "summed over steps 1 to 10" in page.text
    assert "10 of 2000" in page.text


def test_a_run_without_evaluation_says_so(tmp_path, undrawn):
    text = Page(render(make_run(tmp_path, evaluate=False))).text
    assert "no evaluation yet" in text and "not logged yet" in text


def test_a_run_that_has_logged_nothing_is_reported(tmp_path):
    make_run(tmp_path, routing=False)
    (tmp_path / "metrics.jsonl").write_text("")
    text = Page(render(open_run(tmp_path))).text
    assert "Nothing is logged yet" in text and "No routing is logged yet" in text and "0 of 2000" in text


def test_metrics_that_are_not_finite_are_named_so(tmp_path):
    make_run(tmp_path)
    nothing = {"loss/lm": None, "perf/tokens_per_s": None, "eval/loss": None}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 40} | nothing) + "\n")
    text = Page(render(open_run(tmp_path))).text
    assert "not finite nats per token" in text
    assert "1,020 (median)" in text  # of those that are finite


def test_dead_experts_are_named_by_model_layer(whole):
    text = Page(whole).text
    assert "Dead: 1 of 8 experts; in layer 2: 1." in text
    assert "Least used: 1 (0.00). Dead: 1." in text


def test_a_run_without_dead_experts_says_so(tmp_path, undrawn):
    make_run(tmp_path, routing=False)
    RoutingLog(tmp_path, [0], 4).append(10, np.full((1, 4), 9), np.full((1, 4), 0.25, np.float32))
    assert "No expert is dead" in Page(render(open_run(tmp_path))).text


def test_the_final_load_sums_the_last_tenth_of_the_intervals(tmp_path, undrawn):
    make_run(tmp_path, routing=False)
    log = RoutingLog(tmp_path, [0], 2)
    for i in range(1, 21):
        log.append(10 * i, np.array([[30, 10]] if i > 18 else [[0, 99]]), np.full((1, 2), 0.5, np.float32))
    text = Page(render(open_run(tmp_path))).text
    assert "summed over steps 181 to 200" in text
    assert "Busiest: 0 (1.50). Least used: 1 (0.50)." in text


def test_tokens_are_shown_with_their_ratio_and_visible_blanks(tmp_path, undrawn):
    names = {7: " the\n\u200b"}
    page = Page(render(make_run(tmp_path), token_counts(), piece=lambda token: names.get(token, "?")))
    assert "␣the⏎U+200B" in page.text
    spans = [a["title"] for tag, a in page.elements if tag == "span" and "title" in a]
    assert "id 7, 4,000 times" in spans
    assert "nothing stands out" in page.text  # of the experts without the planted token


def test_a_loss_that_no_chart_knows_is_drawn_too(tmp_path, undrawn):
    make_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "loss/orthogonality": 0.5}\n')
    assert "loss/orthogonality" in Page(render(open_run(tmp_path))).text


def test_samples_show_prompt_continuation_and_sampling(whole):
    assert "<pre><b>My fellow</b> Americans\n\nwe</pre>" in whole
    assert "Temperature 0.8, top-p 0.95" in whole


def test_every_leaf_of_the_config_is_listed(tmp_path, undrawn):
    page = Page(
        render(make_run(tmp_path, config={"moe": {"num_experts": 4, "router": "switch"}, "new": {"leaf": [1]}}))
    )
    for fact in ("num_experts 4", 'router "switch"', "leaf [1]"):
        assert fact in page.text


def test_wide_models_stay_under_the_size_limit(tmp_path, monkeypatch):
    N, E = 61, 256
    run = make_run(tmp_path, num_experts=E, layers=range(N), steps=(10, 20))
    # The largest figures there are, by their own test.
    monkeypatch.setattr("moejax.inspection.figures.draw_load_over_time", lambda *_: "x" * 95_000)
    monkeypatch.setattr("moejax.inspection.figures.draw_final_load", lambda *_: "x" * 50_000)
    counts = np.random.default_rng(0).poisson(3, (N, E, 60)) ** 3
    html = render(run, counts, piece=lambda token: f" word{token}")
    assert "12 of 61 MoE layers are shown, evenly spaced" in html
    assert "Layer 60" in html
    assert 1_740_000 < len(html.encode()) < 3_000_000


def test_the_report_is_replaced_in_one_piece(tmp_path, monkeypatch):
    path = write_report(tmp_path, "old")
    assert (path, path.read_text()) == (tmp_path / "report.html", "old")
    write_report(tmp_path, "new ␣")
    assert path.read_text(encoding="utf-8") == "new ␣"

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, "newer")
    assert path.read_text(encoding="utf-8") == "new ␣"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
