"""Sections of a run's report: alarms, each MoE layer over time, pairs of experts, how routing settles and flows."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from moejax.config.sections.alarms import RULES
from moejax.inspection import html
from moejax.inspection.analysis.expert_profile import coactivation_shares
from moejax.inspection.analysis.saturation import router_saturation
from moejax.inspection.analysis.token_flow import token_flow
from moejax.inspection.figures import layers as layer_figures
from moejax.inspection.figures import pairs as pair_figures
from moejax.inspection.figures.layers import draw_layers, last_values, worst_layer
from moejax.inspection.figures.run import only_value
from moejax.inspection.report.page import (
    details,
    drawn_layers,
    figure,
    grid,
    left_out,
    number,
    table,
)
from moejax.inspection.runs.run import Run
from moejax.training.health.alarms import active, name_layers, read_alarms

MAX_ALARMS = 100  # listed, the newest
MAX_EVALUATIONS = 20  # of which saturation is drawn
MIN_EVALUATIONS = 3  # that a curve of it takes: the last point is always 1
LAST_ENTRIES = 64  # among which the last finite value of a metric is looked for
MAX_PAIR_LAYERS = 6  # drawn of deeper models: noise of many pairs does not compress
FLOW_COLUMNS = 4  # layers in one figure of flows
MAX_FLOW_FIGURES = 3
NOT_EVALUATED = "<p>No evaluation has logged routing yet (train.eval_every).</p>"
LAYER_CHARTS: tuple[tuple[str, str, str, Callable[[np.ndarray], float] | None], ...] = (
    (
        "max_violation",
        "MaxVio",
        "Busiest expert over the mean load, less 1. Good: below about 0.5.",
        np.nanmax,
    ),
    (
        "load_entropy",
        "Load entropy, nats",
        "How evenly tokens spread. Good: close to ln E.",
        np.nanmin,
    ),
    (
        "entropy",
        "Router entropy, nats",
        "How undecided the router is about a token. 0: it explores no more.",
        np.nanmin,
    ),
    ("dropped", "Dropped, share of choices", "Choices that found no slot. Good: 0.", np.nanmax),
    (
        "logit_max",
        "Largest router logit",
        "In magnitude. Growing without end precedes instability.",
        np.nanmax,
    ),
    (
        "top_prob",
        "Top probability",
        "Of a token's first choice, in the mean. 1: the router is certain.",
        None,
    ),
)
"""Metric of `routing/layers`, title with unit, how to read it, and what is worst."""


def alarms(run: Run) -> str:
    """What holds at the end, and what began and ended before."""
    lines = read_alarms(run.workdir)
    thresholds = run.config.get("alarms", {})
    on = [f"{rule} ({number(thresholds[rule])})" for rule in RULES if isinstance(thresholds.get(rule), int | float)
          and thresholds[rule]]  # fmt: skip
    watched = (
        f"Rules, with their thresholds: {html.text(', '.join(on))}."
        if on
        else "No rule is on (alarms.*)."
    )
    places = active(lines)
    by_rule = {
        rule: sorted(layer for other, layer in places if other == rule) for rule, _ in places
    }
    if by_rule:
        holding = "; ".join(
            f"{html.text(rule)} in {html.text(name_layers(found))}"
            for rule, found in by_rule.items()
        )
        verdict = f'<p class="warning"><strong>On at the end: {holding}.</strong></p>'
    else:
        verdict = "<p><strong>No alarm is on at the end.</strong></p>" if on or lines else ""
    if not lines:
        return f"{verdict}<p>{watched} None has been raised.</p>" if on else f"<p>{watched}</p>"
    rows = [
        (
            f"{line['step']:,}",
            html.text(line["rule"]),
            html.text(line["state"]),
            html.text(name_layers([int(layer) for layer in line["layers"]])),
            html.text(line.get("reading", "")),
        )
        for line in lines[-MAX_ALARMS:]
    ]
    more = (
        f"<p>The newest {MAX_ALARMS} of {len(lines):,} lines.</p>"
        if len(lines) > MAX_ALARMS
        else ""
    )
    history = more + table(("step", "rule", "", "where", "what was seen"), rows, "events")
    return f"{verdict}<p>{watched}</p>{details(f'History: {len(lines):,} lines', history, is_open=len(lines) <= 12)}"


def layers_over_time(run: Run) -> str:
    """One figure per metric with a line or a row for each layer, and a table of the last values."""
    routing = run.routing
    names = [] if routing is None else list(routing.attributes["metrics"])
    if routing is None or not routing.num_entries or not names:
        return "<p>No metrics of single layers are logged.</p>"
    layers = routing.layers.tolist()
    drawn = [name for name, *_ in LAYER_CHARTS if name in names]
    columns = [names.index(name) for name in drawn]
    values_SNM = np.concatenate([block[:, :, columns] for block in routing.blocks("layers")])
    shown, constant = [], []
    for name, title, reading, worst in LAYER_CHARTS:
        if name not in drawn:
            continue
        values_SN = values_SNM[:, :, drawn.index(name)].astype(np.float64)
        if not np.isfinite(values_SN).any():
            continue
        value = only_value([values_SN.ravel()])
        if value is not None:
            constant.append(f"{title.partition(',')[0].lower()} {number(value)}")
            continue
        is_entropy = name in ("entropy", "load_entropy")
        reference = (math.log(run.num_choices), "uniform: ln E") if is_entropy else None
        image = draw_layers(
            routing.steps,
            values_SN,
            layers,
            title,
            worst=worst,
            reference=reference,
            from_zero=not is_entropy,
        )
        shown.append(
            figure(
                title, reading, image, value=_worst(values_SN, layers, worst), kind=_colors(layers)
            )
        )
    none = f"<p>The same in every layer throughout: {'; '.join(constant)}.</p>" if constant else ""
    last_SNM = routing.read("layers", -min(routing.num_entries, LAST_ENTRIES)).astype(np.float64)
    last_NM = np.stack([last_values(last_SNM[:, :, m]) for m in range(len(names))], axis=1)
    rows = [
        [str(layer), *("" if math.isnan(x) else number(float(x)) for x in last_M)]
        for layer, last_M in zip(layers, last_NM, strict=True)
    ]
    head = ["layer", *map(html.text, names)]
    last = details("Last finite values of every metric, by layer", table(head, rows, "numbers"))
    return f"<p>Means over each logging interval, layer by layer.</p>{none}{grid(shown)}{last}"


def _worst(
    values_SN: np.ndarray, layers: Sequence[int], worst: Callable[[np.ndarray], float] | None
) -> str:
    n = None if worst is None else worst_layer(values_SN, worst)
    return (
        "" if n is None else f"worst: layer {layers[n]}, {number(float(last_values(values_SN)[n]))}"
    )


def _colors(layers: Sequence[int]) -> str:
    """Heat maps keep their colours on a dark page."""
    return "true-colors" if len(layers) > layer_figures.MAX_LINES else ""


def coactivation(run: Run) -> str:
    """Which experts the same tokens visit, in the newest evaluation."""
    if not run.evaluations.steps:
        return NOT_EVALUATED
    pairs_NEE = run.evaluations.read()["coactivation"]
    layers = _layers(run, len(pairs_NEE))
    off_NEE = pairs_NEE * ~np.eye(pairs_NEE.shape[1], dtype=bool)
    if not off_NEE.any():
        return "<p>No token visits two experts of a layer.</p>"
    shown = []
    for n in drawn_layers(len(pairs_NEE), MAX_PAIR_LAYERS if len(pairs_NEE) > 12 else 12):
        image = pair_figures.draw_coactivation(pairs_NEE[n])
        shown.append(
            figure(f"Layer {layers[n]}", _strongest_pair(pairs_NEE[n]), image, kind="true-colors")
        )
    note = ""
    if pairs_NEE.shape[1] > pair_figures.MAX_EXPERTS:
        note = (
            f" Of the experts, the {pair_figures.MAX_EXPERTS} with the strongest pairs are drawn."
        )
    some = left_out(len(pairs_NEE), MAX_PAIR_LAYERS) if len(pairs_NEE) > 12 else ""
    return (
        "<p>How many validation tokens visit both experts of a pair, over how many would if each expert's load alone "
        "decided (quasi-independence). White is chance; red pairs go together, and could share a device; blue pairs "
        f"avoid each other; black pairs never meet. Grey: the diagonal, and pairs too rare to tell.{note}</p>"
        f"{some}{grid(shown)}"
    )


def _strongest_pair(pairs_EE: np.ndarray) -> str:
    ratio_EE = np.nan_to_num(pair_figures.coactivation_ratio(pairs_EE))
    if not ratio_EE.any():
        return "All pairs are too rare to tell."
    i, j = np.unravel_index(int(ratio_EE.argmax()), ratio_EE.shape)
    shares_EE = coactivation_shares(pairs_EE[None])[0]
    if shares_EE[i, j] < shares_EE[j, i]:
        i, j = j, i
    return (
        f"Strongest: {shares_EE[i, j]:.0%} of the tokens of {i} also visit {j}; by chance "
        f"{shares_EE[i, j] / ratio_EE[i, j]:.0%}."
    )


def settling(run: Run) -> str:
    """Saturation and churn over evaluations, by layer."""
    steps = run.evaluations.steps
    if len(steps) < 2:
        return "<p>Two evaluations or more show how routing settles (train.eval_every).</p>"
    chosen = [steps[i] for i in drawn_layers(len(steps), MAX_EVALUATIONS)]
    found = [run.evaluations.read(step) for step in chosen]
    experts_S = [arrays["experts"] for arrays in found]
    layers, num_experts = _layers(run, len(experts_S[0])), found[-1]["load"].shape[1]
    saturation_SN = router_saturation(experts_S, num_experts)
    if len(chosen) < MIN_EVALUATIONS:
        return _settled_in_words(chosen, saturation_SN, found[-1].get("churn"), layers)
    visits = float((experts_S[-1] < num_experts).sum(axis=2).mean())
    shown = [
        figure(
            "Saturation",
            "Of each token's experts at the last evaluation, the share that it had already. Rising early: routing was "
            "decided early. Routing at random shows K / E where loads are equal, and more where they are not.",
            draw_layers(np.array(chosen), saturation_SN, layers, "share of the last experts",
                        reference=(visits / num_experts, "uniform: K / E"), is_measured=True),
            kind=_colors(layers),
        )
    ]  # fmt: skip
    churned = [
        (step, arrays["churn"])
        for step, arrays in zip(chosen, found, strict=True)
        if "churn" in arrays
    ]
    if churned:
        churn_SN = np.stack([churn_N for _, churn_N in churned]).astype(np.float64)
        image = draw_layers(
            np.array([step for step, _ in churned]), churn_SN, layers, "share of a token's experts", worst=np.nanmax,
            is_measured=True,
        )  # fmt: skip
        shown.append(
            figure(
                "Churn",
                "Of a token's experts at the evaluation before, the share that it no longer visits. Good: falling.",
                image, value=_worst(churn_SN, layers, np.nanmax), kind=_colors(layers),
            )
        )  # fmt: skip
    return f"<p>The same validation tokens, routed at {len(chosen)} evaluations.</p>{grid(shown)}"


def _settled_in_words(
    steps: Sequence[int],
    saturation_SN: np.ndarray,
    churn_N: np.ndarray | None,
    layers: Sequence[int],
) -> str:
    """Saturation and churn between two evaluations: one number a layer, which no curve shows."""
    rows = []
    for n, layer in enumerate(layers):
        churn = "" if churn_N is None else f"{churn_N[n]:.0%}"
        rows.append([f"layer {layer}", f"{saturation_SN[0, n]:.0%}", churn])
    return (
        f"<p>Two evaluations, at steps {steps[0]:,} and {steps[-1]:,}; with three or more, curves show how routing "
        "settles. Saturation: of each token's experts at the second, the share that it had at the first. Churn: of its "
        "experts at the first, the share that it no longer visits at the second.</p>"
        + table(("", "saturation", "churn"), rows, "numbers")
    )


def flow(run: Run) -> str:
    """Paths of tokens from layer to layer, in the newest evaluation."""
    if not run.evaluations.steps:
        return NOT_EVALUATED
    arrays = run.evaluations.read()
    experts_NTK, num_experts = arrays["experts"], arrays["load"].shape[1]
    layers = _layers(run, len(experts_NTK))
    windows = flow_windows(len(layers))
    if not windows:
        return "<p>There is one MoE layer: no paths.</p>"
    shown = []
    for first, last in windows:
        drawn_NT1 = experts_NTK[first : last + 1, :, :1]
        is_whole_T = (drawn_NT1 < num_experts).all(
            axis=(0, 2)
        )  # else bands would not fill their blocks
        found = token_flow(drawn_NT1[:, is_whole_T], num_experts)
        if not found.counts_MEE.any():
            return "<p>No token visits an expert in each of some neighbouring layers.</p>"
        image = pair_figures.draw_flow(
            found.counts_MEE, found.expected_MEE, layers[first : last + 1]
        )
        shown.append(figure(f"Layers {layers[first]} to {layers[last]}", "", image))
    some = (
        ""
        if len(windows) * (FLOW_COLUMNS - 1) >= len(layers) - 1
        else " Of the layers, some windows are shown."
    )
    return (
        "<p>Each token's first expert in one layer and in the next. A block is an expert, as high as its share of "
        "tokens; a band is the tokens that go from one to another. Drawn are the bands furthest above what independent "
        f"layers would give, at most {pair_figures.MAX_FLOWS} in each step; the share of tokens they hold is written "
        f"below, and the rest is left out.{some}</p>{grid(shown)}"
    )


def flow_windows(num_layers: int) -> list[tuple[int, int]]:
    """First and last layer of each figure of flows; windows share their ends, and deep models show a few of them."""
    step = FLOW_COLUMNS - 1
    windows = [
        (first, min(first + step, num_layers - 1)) for first in range(0, num_layers - 1, step)
    ]
    return [windows[i] for i in drawn_layers(len(windows), MAX_FLOW_FIGURES)] if windows else []


def _layers(run: Run, num_layers: int) -> list[int]:
    """Model layers of the MoE layers, or their numbers if they are not logged."""
    return list(range(num_layers)) if run.routing is None else run.routing.layers.tolist()
