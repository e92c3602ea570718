"""The report: one harmless, self-contained page for any run, however little it holds."""

import json
import re

import numpy as np
import pytest

from cases.pages import HOSTILE, Page
from moejax.config import resolve, to_dict
from moejax.data.labels import Labels
from moejax.inspection import html
from moejax.inspection.analysis.expert_profile import DomainSpecialisation
from moejax.inspection.analysis.information import Information
from moejax.inspection.analysis.trace import RoutedTokens
from moejax.inspection.analysis.trace_view import Trace
from moejax.inspection.counterfactuals.result import AS_TRAINED, FILE_NAME, Counterfactuals, Outcome
from moejax.inspection.figures.style import Drawing
from moejax.inspection.report.assemble import render_report, write_report
from moejax.inspection.report.build import find_specialisation
from moejax.inspection.report.evaluations import FLOW_COLUMNS, MAX_FLOW_FIGURES, flow_windows
from moejax.inspection.report.experts import ReportData, domains
from moejax.inspection.report.training import Sample, configuration
from moejax.inspection.runs.run import open_run
from moejax.inspection.runs.settings import settings_of
from moejax.training.evaluation import Evaluation
from moejax.training.health.telemetry import LAYER_METRICS
from moejax.training.run_directory.evaluation_log import EvaluationLog
from moejax.training.run_directory.routing_log import RoutingHistory, RoutingLog

MOE_SECTIONS = [
    "alarms",
    "routing",
    "layers",
    "load",
    "final-load",
    "settling",
    "coactivation",
    "flow",
]
EXPERT_SECTIONS = ["tokens", "attributes", "text", "counterfactuals"]


ALARM_LINES = [
    {
        "step": 10,
        "rule": "collapse",
        "state": "on",
        "layers": [0, 2],
        "value": 0.6,
        "reading": "MaxVio is 60%",
    },
    {
        "step": 20,
        "rule": "ties",
        "state": "on",
        "layers": [2],
        "value": 0.1,
        "reading": "10% of tokens tie",
    },
    {"step": 30, "rule": "collapse", "state": "off", "layers": [0]},
]
ALARMS = "".join(json.dumps(line) + "\n" for line in ALARM_LINES)


def training_line(step, num_experts):
    line = {
        "step": step,
        "tokens": 100 * step,
        "loss/lm": 8 / step,
        "loss/total": 9 / step,
        "learning_rate": 1e-3,
    }
    line |= {"grad_norm": 1.0, "perf/tokens_per_s": 1000.0 + step, "skipped_steps": 0}
    if num_experts:
        line |= {
            "loss/balance": 1.1,
            "loss/z": 3.0,
            "loss/balance_weighted": 0.011,
            "loss/z_weighted": 0.003,
        }
        line |= {
            "moe/max_violation": 0.4,
            "moe/dead_experts": 1,
            "moe/dropped": 0.0,
            "moe/entropy": 1.2,
        }
        line |= {"moe/load_entropy": 1.3}
    return line


def make_run(
    workdir,
    *,
    num_experts=4,
    layers=(0, 2),
    steps=(10, 20, 30),
    evaluate=True,
    routing=True,
    **facts,
):
    """A run directory; expert 1 of the second layer gets nothing."""
    facts = {
        "config": {
            "moe": {"num_experts": num_experts, "top_k": 2},
            "train": {"num_steps": 2000, "seed": 0},
        },
        "versions": {"jax": "0.10.2"},
        "git_commit": "abc123",
        "device": "4 x TPU v5e",
        "command": "moejax train --config=configs/tiny_moe.py",
        "parameters": {"total": 1_000_000, "active": 400_000},
    } | facts
    lines = [training_line(step, num_experts) for step in steps]
    if evaluate:
        lines.append(
            {
                "step": steps[-1],
                "eval/loss": 3.125,
                "eval/perplexity": 22.76,
                "eval/bits_per_byte": 1.0625,
            }
        )
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


def render(run, counts=None, piece=str, samples=(), findings=None):
    return render_report(
        run,
        token_counts_nEV=counts,
        piece=piece,
        samples=samples,
        findings=findings or ReportData(),
    )


def log_layers(workdir, steps, values_SN, layers=(0, 2), num_experts=4, name="max_violation"):
    """A routing log in which one metric of the layers is as given, and all others are 0."""
    log = RoutingLog(workdir, layers, num_experts, LAYER_METRICS)
    counts = np.full((len(layers), num_experts), 50)
    for step, values_N in zip(steps, values_SN, strict=True):
        metrics_NM = np.zeros((len(layers), len(LAYER_METRICS)), np.float32)
        metrics_NM[:, LAYER_METRICS.index(name)] = values_N
        log.append(
            step, counts, np.full(counts.shape, 1 / num_experts, np.float32), layers=metrics_NM
        )


def evaluate(workdir, steps, experts_NTK, num_experts=4):
    """Evaluations which all saw the same choices."""
    N, T, K = experts_NTK.shape
    visits_NTE = np.zeros((N, T, num_experts), np.int32)
    np.put_along_axis(visits_NTE, experts_NTK, 1, axis=2)
    visits_NTE = visits_NTE.astype(np.float32)
    pairs_NEE = (visits_NTE.swapaxes(1, 2) @ visits_NTE).astype(np.int32)
    load_NE = (visits_NTE.sum(axis=1) / (T * K)).astype(np.float32)
    log = EvaluationLog(workdir, after_step=0)
    for step in steps:
        log.append(
            step, Evaluation(1.0, 2.7, 1.0, T, load_NE, pairs_NEE, experts_NTK.astype(np.int32))
        )


def choices(N=2, T=400, K=2, E=4, seed=0):
    return np.argsort(np.random.default_rng(seed).random((N, T, E)), axis=2)[:, :, :K]


def trace_of(pieces, N=2, E=4, K=2):
    T = len(pieces)
    experts_NTK = choices(N, T, K, E).astype(np.int32)
    scores_NTE = np.full((N, T, E), 1 / E, np.float32)
    weights_NTK = np.full((N, T, K), 0.5, np.float32)
    return Trace(
        np.arange(T, dtype=np.int32),
        tuple(pieces),
        tuple(range(N)),
        experts_NTK,
        weights_NTK,
        scores_NTE,
        scores_NTE,
        E,
    )


def information(name, excess_N):
    excess_N = np.asarray(excess_N, np.float64)
    ones_N = np.ones(len(excess_N))
    return Information(
        name, None, "tokens", excess_N + 0.1, 0.1 * ones_N, 0.01 * ones_N, 2 * ones_N, 1.5 * ones_N
    )


def test_soft_routing_has_no_tokens_to_list(tmp_path):
    nothing = Information("token", None, "tokens", *np.zeros((5, 2)))
    domains = DomainSpecialisation(
        np.zeros((2, 1, 4)), np.zeros((2, 4)), np.zeros(2), np.array([9])
    )
    findings = ReportData([nothing], (0, 2), 9, domains=domains, domain_names=("x",))
    html = render(make_run(tmp_path), np.zeros((2, 4, 9), int), findings=findings)
    assert html.count("No token was sent to an expert") == 3


def outcome(kind, what, **more):
    values = {
        "layer": None,
        "experts": (),
        "setting": None,
        "loss": 2.0,
        "change": 0.0,
        "standard_error": 0.01,
    }
    return Outcome(kind, what, **(values | {"gate_mass": 1.0, "dropped": 0.0} | more))


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """The report of an ordinary run, with tokens and a sample: text of the page."""
    run = make_run(tmp_path_factory.mktemp("runs") / "runs-tiny")
    evaluate(run.workdir, (20, 30), choices())
    (run.workdir / "alarms.jsonl").write_text(ALARMS)
    results = (
        outcome(AS_TRAINED, "no change"),
        outcome("top_k", "K = 1", setting=1.0, change=0.25),
    )
    Counterfactuals(results, {"bias_off": "no bias"}, 30, 8, 99, (0, 2), 4, (2, 2)).save(
        run.workdir / FILE_NAME
    )
    results = [information("token", [0.5, 0.7]), information("position in row", [0.0, 0.02])]
    findings = ReportData(results, (0, 2), 1234, trace=trace_of(["My", " fellow"]))
    samples = [Sample("My fellow", " Americans\n\nwe", 0.8, 0.95)]
    return render(run, token_counts(), samples=samples, findings=findings)


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures out, for tests of what is written."""
    for name in ("draw_curves", "draw_load_over_time", "draw_final_load"):
        monkeypatch.setattr(
            f"moejax.inspection.figures.run.{name}",
            lambda *_, **__: Drawing("data:image/svg+xml;base64,"),
        )


def test_a_report_has_every_section_and_a_contents_list_that_leads_there(full_report):
    page = Page(full_report)
    assert page.ids == [
        "summary",
        "losses",
        "speed",
        *MOE_SECTIONS,
        *EXPERT_SECTIONS,
        "samples",
        "config",
    ]
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{anchor}" for anchor in page.ids]


def test_the_summary_states_size_quality_speed_and_origin(full_report):
    text = Page(full_report).text
    for fact in (
        "runs-tiny",
        "4 experts, top 2 in 2 layers",
        "1,000,000 in total, 400,000 active for a token (40%)",
        "3.125 nats per token, at step 30",
        "22.76",
        "1.062",  # bits per byte to four digits
        "1,020 (median over logging intervals)",
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
    assert (
        "3.5 nats per token, at step 40 (lowest: 3.125 at step 30)"
        in Page(render(open_run(tmp_path))).text
    )


def test_the_page_stands_alone_and_forbids_fetching(full_report):
    page = Page(full_report)
    assert full_report.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
            assert attributes["alt"]
    assert "url(" not in page.style
    assert "@import" not in page.style
    metas = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert any(meta.get("content", "").startswith("default-src 'none'") for meta in metas)
    assert "http" not in re.sub(r"data:image/[^\"]*|http-equiv", "", full_report)


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
    html = render(
        run, token_counts(), piece=lambda _: HOSTILE, samples=[Sample(HOSTILE, HOSTILE, 1.0, 1.0)]
    )
    page = Page(html)
    assert not {"script"} & {tag for tag, _ in page.elements}
    assert all(a["src"].startswith("data:") for tag, a in page.elements if tag == "img")
    assert "<b>run" in page.text
    assert page.text.count("<script>alert('x')</script>") >= 12
    assert "\x00" not in html
    assert "\x1b" not in html


def test_lone_surrogates_do_not_keep_the_page_from_being_written(tmp_path, undrawn):
    run = make_run(tmp_path)
    html = render(
        run,
        token_counts(),
        piece=lambda _: "\udc80",
        samples=[Sample("\ud800", "\udfff", 1.0, 1.0)],
    )
    assert write_report(tmp_path, html).read_text(encoding="utf-8") == html


def test_a_dense_run_says_so_and_has_no_expert_sections(tmp_path):
    page = Page(render(make_run(tmp_path, num_experts=0)))
    assert "This is a dense run" in page.text
    assert not ({*MOE_SECTIONS, *EXPERT_SECTIONS} - {"routing"}) & set(page.ids)
    assert "MaxVio" not in page.text
    assert "Balance loss" not in page.text


def test_a_run_with_a_single_line_is_reported(tmp_path):
    page = Page(render(make_run(tmp_path, steps=(10,), evaluate=False)))
    assert "summed over steps 1 to 10" in page.text
    assert "10 of 2000" in page.text


def test_a_run_without_evaluation_says_so(tmp_path, undrawn):
    text = Page(render(make_run(tmp_path, evaluate=False))).text
    assert "no evaluation yet" in text
    assert "not logged yet" in text


def test_a_run_that_has_logged_nothing_is_reported(tmp_path):
    make_run(tmp_path, routing=False)
    (tmp_path / "metrics.jsonl").write_text("")
    text = Page(render(open_run(tmp_path))).text
    assert "Nothing is logged yet" in text
    assert "No routing is logged yet" in text
    assert "0 of 2000" in text


def test_metrics_that_are_not_finite_are_named_so(tmp_path):
    make_run(tmp_path)
    nothing = {"loss/lm": None, "perf/tokens_per_s": None, "eval/loss": None}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 40} | nothing) + "\n")
    text = Page(render(open_run(tmp_path))).text
    assert "not finite nats per token" in text
    assert "1,020 (median over logging intervals)" in text  # of those that are finite


def test_dead_experts_are_named_by_model_layer(full_report):
    text = Page(full_report).text
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
        log.append(
            10 * i, np.array([[30, 10]] if i > 18 else [[0, 99]]), np.full((1, 2), 0.5, np.float32)
        )
    text = Page(render(open_run(tmp_path))).text
    assert "summed over steps 181 to 200" in text
    assert "Busiest: 0 (1.50). Least used: 1 (0.50)." in text


def test_tokens_are_shown_with_their_ratio_and_visible_blanks(tmp_path, undrawn):
    names = {7: " the\n\u200b"}
    text = render(make_run(tmp_path), token_counts(), piece=lambda token: names.get(token, "?"))
    page = Page(text)
    assert "␣the⏎U+200B" in page.text
    spans = [a["title"] for tag, a in page.elements if tag == "span" and "title" in a]
    assert "id 7, 4,000 times" in spans
    assert "97%, 1.6&times;" in text  # 4,000 of its 4,120 visits; the expert has 59 % of all
    assert "nothing stands out" in page.text  # of the experts without the planted token


def test_a_loss_that_no_chart_knows_is_drawn_too(tmp_path, undrawn):
    make_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "loss/orthogonality": 0.5}\n')
    assert "loss/orthogonality" in Page(render(open_run(tmp_path))).text


def test_samples_show_prompt_continuation_and_sampling(full_report):
    assert "<pre><b>My fellow</b> Americans\n\nwe</pre>" in full_report
    assert "Temperature 0.8, top-p 0.95" in full_report


def test_every_leaf_of_the_config_is_listed(tmp_path, undrawn):
    page = Page(
        render(
            make_run(
                tmp_path,
                config={"moe": {"num_experts": 4, "router": "switch"}, "new": {"leaf": [1]}},
            )
        )
    )
    for fact in ("num_experts 4", 'router "switch"', "leaf [1]"):
        assert fact in page.text


def test_alarms_show_what_is_on_at_the_end_and_their_history(full_report):
    text = Page(full_report).text
    assert "On at the end: collapse in layer 2; ties in layer 2." in text
    assert "History: 3 lines" in text
    assert "20 ties on layer 2 10% of tokens tie" in text
    assert "30 collapse off layer 0" in text


def test_a_run_without_alarms_names_the_rules_that_watched(tmp_path, undrawn):
    alarms = {"collapse": 0.5, "ties": 0.0, "stop": ""}
    config = {"moe": {"num_experts": 4}, "alarms": alarms}
    text = Page(render(make_run(tmp_path, config=config))).text
    assert "No alarm is on at the end. Rules, with their thresholds: collapse (0.5)." in text
    assert "collapse (0.5). None has been raised." in text


def test_damaged_or_hostile_files_cost_only_their_own_section(tmp_path, undrawn):
    run = make_run(tmp_path)
    line = {"step": 10, "rule": HOSTILE, "state": "on", "layers": [0], "reading": HOSTILE}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(line) + "\n")
    rows = (outcome(AS_TRAINED, HOSTILE), outcome("top_k", HOSTILE, setting=1.0))
    Counterfactuals(rows, {HOSTILE: HOSTILE}, 30, 8, 99, (0, 2), 4, (2, 2)).save(
        tmp_path / FILE_NAME
    )
    html = render(run, findings=ReportData(trace=trace_of([HOSTILE])))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "\x1b" not in html
    assert (
        page.text.count("<script>alert('x')</script>") >= 7
    )  # twice the rule, the reading, rows, left out
    for name in ("alarms.jsonl", FILE_NAME, "routing/evaluations/5.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{\n")
    text = Page(render(run)).text
    assert (
        text.count("Left out: ") == 4
    )  # co-activation and paths, too; one evaluation cannot settle
    assert "alarms.jsonl: line 1 is damaged" in text
    assert "is damaged (JSONDecodeError" in text


def test_layers_are_drawn_one_by_one_with_the_worst_named(tmp_path, undrawn):
    make_run(tmp_path, routing=False)
    log_layers(tmp_path, (10, 20), [[0.9, 0.1], [0.25, 0.75]])
    text = Page(render(open_run(tmp_path))).text
    assert "worst: layer 2, 0.75" in text
    same = "load entropy 0; router entropy 0; dropped 0; largest router logit 0"
    assert f"The same in every layer throughout: {same}" in text


def test_experts_that_go_together_are_named_with_their_share_and_chance(tmp_path, undrawn):
    run = make_run(tmp_path, routing=False)
    pairs = [(0, 1)] * 300 + [(2, 3)] * 300 + [(0, 2), (0, 3), (1, 2), (1, 3)] * 100
    evaluate(tmp_path, (10,), np.array([pairs]))
    text = Page(render(run)).text
    # Each expert is in 500 pairs, so chance gives each of three partners a third.
    assert "Strongest: 60% of the tokens of 0 also visit 1; by chance 33%." in text
    assert "Two evaluations or more show how routing settles" in text
    assert "There is one MoE layer: no paths." in text


def test_saturation_and_churn_are_drawn_of_the_same_tokens(tmp_path, undrawn):
    run = make_run(tmp_path)
    evaluate(tmp_path, (10, 20, 30), choices())
    page = Page(render(run))
    assert "The same validation tokens, routed at 3 evaluations." in page.text
    assert {"Saturation, as a figure", "Churn, as a figure", "Layers 0 to 2, as a figure"} <= {
        attributes["alt"] for tag, attributes in page.elements if tag == "img"
    }


def test_two_evaluations_are_a_table_not_a_curve(tmp_path, undrawn):
    run = make_run(tmp_path)
    evaluate(tmp_path, (10, 20), choices())
    page = Page(render(run))
    assert "Two evaluations, at steps 10 and 20;" in page.text
    assert "Saturation, as a figure" not in {
        a.get("alt") for tag, a in page.elements if tag == "img"
    }


def test_what_never_changes_is_a_sentence_and_four_figures_are_two_by_two(tmp_path, undrawn):
    make_run(tmp_path, layers=(0, 1, 2, 3))
    text = render(open_run(tmp_path))
    assert "The same throughout:" in Page(text).text
    load = text.partition('<section id="load">')[2].partition("</section>")[0]
    assert '<div class="grid four">' in load


def test_what_differs_from_the_defaults_is_marked_unless_it_follows(tmp_path):
    config = to_dict(resolve({"moe": {"num_experts": 16}, "model": {"d_ff": 64}}))
    chosen = [setting for setting in settings_of(config) if setting.is_chosen]
    found = {(setting.section, setting.name): setting for setting in chosen}
    assert set(found) == {("moe", "num_experts"), ("model", "d_ff")}
    num_experts, d_ff = found["moe", "num_experts"], found["model", "d_ff"]
    assert (num_experts.value, num_experts.default) == (16, 8)
    assert (d_ff.value, d_ff.default) == (64, 1024)
    assert config["moe"]["d_expert"] == 32  # follows from d_ff, whose default it is not
    text = configuration(make_run(tmp_path, config=config))
    assert text.count('class="changed"') == 2
    assert "2 of " in text
    assert "default 1024" in text


def test_a_flag_is_never_broken_after_its_hyphens():
    text = html.command("moejax train --config=a.py '--workdir=a b' <x>")
    assert text.count("<span>") == 5
    assert "<span>--config=a.py</span>" in text
    assert "&lt;x&gt;" in text


def test_flows_are_drawn_in_windows_that_share_their_ends():
    assert flow_windows(1) == []
    assert flow_windows(2) == [(0, 1)]
    assert flow_windows(6) == [(0, 3), (3, 5)]
    deep = flow_windows(61)
    assert len(deep) == MAX_FLOW_FIGURES
    assert (deep[0], deep[-1]) == (
        (0, FLOW_COLUMNS - 1),
        (57, 60),
    )


def test_what_routing_goes_by_names_the_strongest_attribute_and_lists_all(full_report):
    text = Page(full_report).text
    assert "1,234 tokens of validation text were routed. Routing goes most by token" in text
    assert "by token, which explains 30% of the entropy above chance." in text
    # Mean information 0.7 bits, of which 0.1 is chance; (0.7 - 0.1) / 2 = 30%; adjusted 0.6 / (1.5
    # - 0.1) = 42.9%.
    assert "token 0.700 0.100 0.010 30.0% 42.9% 2" in text
    assert "position in row 0.110 0.100 0.010 0.5% 0.7% 2" in text


def test_counterfactuals_are_shown_where_they_were_evaluated(full_report, tmp_path, undrawn):
    text = Page(full_report).text
    assert "Step 30, 8 validation rows, 99 tokens" in text
    assert "top_k K = 1 all +0.2500" in text
    assert "bias_off: no bias" in text
    assert "Experts per token" in text
    assert (
        "Not evaluated. moejax counterfactuals --workdir=... evaluates"
        in Page(render(make_run(tmp_path))).text
    )


def test_domains_are_measured_where_documents_have_one_and_given_the_token(monkeypatch):
    rng = np.random.default_rng(0)
    T = 600
    documents_T = np.repeat([0, 1, -1], T // 3).astype(np.int32)
    experts_NTK = np.where(documents_T == 1, 3, 2).reshape(1, T, 1).astype(np.int32)
    routed = RoutedTokens(
        rng.integers(0, 3, T).astype(np.int32),
        documents_T,
        np.arange(T, dtype=np.int32) % 200,
        documents_T,
        experts_NTK,
        np.ones((1, T, 1), np.float32),
        np.zeros(1),
        4,
        (5,),
    )
    monkeypatch.setattr("moejax.inspection.report.build.MEASURED_TOKENS", 400)
    findings = find_specialisation(
        routed,
        lambda token: "abc"[token],
        labels=Labels((), ("prose", "verse"), np.array([1, 0], np.int32)),
    )
    assert (findings.num_tokens, findings.layers) == (T, [5])
    *_, domain, domain_given_token, token_given_domain = findings.information
    assert (domain_given_token.given, token_given_domain.given) == ("token", "domain")
    assert domain.information_N == pytest.approx(
        1, abs=0.02
    )  # a fair coin decides, of some 270 tokens
    assert domain_given_token.information_N == pytest.approx(1, abs=0.05)
    assert token_given_domain.information_N == pytest.approx(0, abs=1e-9)
    np.testing.assert_array_equal(findings.domains.share_NDE, [[[0, 0, 0, 1], [0, 0, 1, 0]]])
    text = domains(findings)
    assert "prose visits expert 3 with 100% of its tokens; uniform: 25%." in text
    assert "<h3>Layer 5</h3>" in text
    assert find_specialisation(routed, lambda token: "abc"[token]).domains is None


def test_a_text_is_coloured_by_expert_without_a_script(full_report):
    page = Page(full_report)
    assert "My" in page.text
    assert "␣fellow" in page.text
    assert (
        sum(
            attributes.get("type") == "radio" for tag, attributes in page.elements if tag == "input"
        )
        == 2
    )


def test_wide_models_stay_under_the_size_limit(tmp_path, monkeypatch):
    N, E, S = 61, 256, 200
    rng = np.random.default_rng(0)
    run = make_run(tmp_path, num_experts=E, layers=range(N), steps=(10, 20), routing=False)
    steps = np.arange(1, S + 1) * 10
    log = RoutingLog(tmp_path, range(N), E, LAYER_METRICS)
    counts_NE, probs_NE = np.ones((N, E), np.int64), np.ones((N, E), np.float32)
    for step in steps[-20:]:
        log.append(
            int(step),
            counts_NE,
            probs_NE,
            layers=rng.random((N, len(LAYER_METRICS))).astype(np.float32),
        )
    # The routing log is short for the test's sake; the figures have as many columns as those of
    # a long one.
    noise_SNM = rng.random((S, N, len(LAYER_METRICS)), np.float32)
    monkeypatch.setattr(
        "moejax.inspection.runs.run.Run.routing", _LongLog(open_run(tmp_path).routing, noise_SNM)
    )
    evaluate(
        tmp_path, (10, 20), choices(N, 600, 8, 64), 64
    )  # of more experts, 64 are drawn, most pairs in grey
    (tmp_path / "alarms.jsonl").write_text(ALARMS * 500)
    # The largest figures there are, by their own test.
    monkeypatch.setattr(
        "moejax.inspection.figures.run.draw_load_over_time", lambda *_: "x" * 95_000
    )
    monkeypatch.setattr("moejax.inspection.figures.run.draw_final_load", lambda *_: "x" * 50_000)
    counts = rng.poisson(3, (12, E, 60)) ** 3  # of the layers shown
    findings = ReportData(
        [information("token", np.ones(12))], range(12), 9, trace=trace_of(["word"] * 133, 12, E, 8)
    )
    html = render(run, counts, piece=lambda token: f" word{token}", findings=findings)
    assert "12 of 61 MoE layers are shown, evenly spaced" in html
    assert "6 of 61 MoE layers are shown, evenly spaced" in html
    assert "Layer 60" in html
    assert "The newest 100 of 1,500 lines" in html
    assert 3_000_000 < len(html.encode()) < 5_000_000


class _LongLog(RoutingHistory):
    """A routing log that says it has as many entries as `noise`."""

    def __init__(self, log, noise):
        self.__dict__.update(log.__dict__)
        self.log, self.noise = log, noise
        self.steps = np.arange(1, len(noise) + 1) * 10

    def read(self, name, *entries):
        return self.noise if name == "layers" else self.log.read(name)

    def blocks(self, name, first=0):
        yield from [self.noise[:50], self.noise[50:]] if name == "layers" else self.log.blocks(name)

    def summed(self, name, num_columns):
        return self.log.summed(name, num_columns)


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
