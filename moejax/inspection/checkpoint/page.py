"""A checkpoint as one HTML page: load, texts by expert, what experts take, what routing goes by.

Unlike the report of a run it needs no record of training, so a released model has one, too.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moejax.config import Config
from moejax.inference.load import LoadedRun
from moejax.inspection import html
from moejax.inspection.analysis.trace_view import as_html
from moejax.inspection.checkpoint.measure import Inspection, LayerRouting
from moejax.inspection.html import Markup
from moejax.inspection.report import counterfactuals, evaluations, experts, load
from moejax.inspection.report.build import count_routed_tokens, find_specialisation
from moejax.inspection.report.page import Section, drawn_layers, left_out, render_page, table

FILE_NAME = "inspection.html"

SUMMARY_HEAD = (
    "layer",
    "least load",
    "most load",
    "entropy",
    "first weight",
    "unvisited",
    "together",
)
MAX_NAMED = 8  # experts that no token visits, by number


def render_inspection(inspection: Inspection, loaded: LoadedRun, name: str) -> str:
    """Renders the page.

    Args:
      inspection: of the model.
      loaded: the model.
      name: of its folder.

    Returns:
      An HTML document, which fetches nothing.
    """
    routed, piece = inspection.routed, loaded.tokenizer.piece
    found = find_specialisation(routed, piece, labels=inspection.labels)
    is_prompt = inspection.num_rows is None
    findings = dataclasses.replace(found, text="the prompts" if is_prompt else found.text)
    tokens = experts.tokens(
        count_routed_tokens(routed, loaded.config.vocab_size),
        piece,
        layers=list(routed.layers),
        top_k=loaded.config.moe.top_k,
    )
    sections: list[Section] = [
        ("summary", "Layer by layer", _summary(inspection, loaded.config)),
        ("load", "Expert load", _load(inspection)),
        ("text", "A text by expert", _passages(inspection)),
        ("tokens", "What each expert takes", tokens),
        ("attributes", "What routing goes by", experts.attributes(findings)),
    ]
    if findings.domains is not None:
        sections.append(("domains", "Domains", experts.domains(findings)))
    pairs = evaluations.coactivation_of(inspection.coactivation_NEE, list(routed.layers))
    sections.append(("coactivation", "Experts that go together", pairs))
    if inspection.counterfactuals is not None:
        changed = counterfactuals.outcomes(inspection.counterfactuals)
        sections.append(("counterfactuals", "Counterfactuals", changed))
    subtitle = f"{model_in_words(loaded.config)}; step {inspection.step}"
    return render_page(name, subtitle, sections, kind="inspection")


def model_in_words(config: Config) -> str:
    """Says how many experts a model has in how many layers."""
    moe = config.moe
    return (
        f"Mixture of Experts: {moe.num_choices} experts, top {moe.top_k}, in "
        f"{config.num_moe_layers} of {config.model.num_layers} layers"
    )


def note_of(config: Config) -> str:
    """Returns what of a model's routing is not shown, in one line; empty if all is."""
    if config.attention.kind == "routed":
        return "Attention has experts, too, whose routing is not shown."
    return ""


def summary_rows(layers: Sequence[LayerRouting]) -> list[dict[str, str]]:
    """Returns a row for each layer, as text by `SUMMARY_HEAD`."""
    rows = []
    for found in layers:
        cells = (
            str(found.layer),
            f"{min(found.load_E):.2f}",
            f"{max(found.load_E):.2f}",
            f"{found.entropy:.3f}",
            "-" if found.first_weight is None else f"{found.first_weight:.3f}",
            _named(found.unvisited),
            "-" if found.coactivation is None else f"{found.coactivation:.2f}",
        )
        rows.append(dict(zip(SUMMARY_HEAD, cells, strict=True)))
    return rows


def _named(unvisited: Sequence[int]) -> str:
    """Returns how many experts no token visits, and the first of them by number."""
    if not unvisited:
        return "0"
    names = ", ".join(map(str, unvisited[:MAX_NAMED]))
    more = ", ..." if len(unvisited) > MAX_NAMED else ""
    return f"{len(unvisited)} ({names}{more})"


def _summary(inspection: Inspection, config: Config) -> Markup:
    rows = [list(row.values()) for row in summary_rows(inspection.layers)]
    return html.render(
        "checkpoint/summary",
        text=inspection.text,
        most_entropy=f"{math.log(inspection.routed.num_experts):.2f}",
        note=note_of(config),
        table=table(SUMMARY_HEAD, rows, kind="numbers"),
    )


def _load(inspection: Inspection) -> Markup:
    counts_NE = inspection.counts_NE
    return html.render(
        "checkpoint/load",
        text=inspection.text,
        left_out=left_out(len(counts_NE)),
        figures=load.load_of_layers(counts_NE, np.array(inspection.routed.layers)),
    )


def _passages(inspection: Inspection) -> Markup:
    """Returns every traced text, of deep models in evenly spaced layers."""
    passages = []
    for found in inspection.traces:
        shown = found.of_layers(drawn_layers(len(found.layers)))
        passages.append(html.render("report/passage", trace=as_html(shown)))
    return html.join(passages)
