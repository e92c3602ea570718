"""Sections of a run's report: what each expert takes, what routing goes by, a text by expert.

Their numbers come from validation text that the model routed for the report.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from moejax.inspection import html
from moejax.inspection.analysis.expert_profile import DomainSpecialisation
from moejax.inspection.analysis.information import Information
from moejax.inspection.analysis.specialisation import TokenShare, over_represented_tokens
from moejax.inspection.analysis.trace_view import Trace, as_html
from moejax.inspection.figures import run as figures
from moejax.inspection.figures import specialisation as specialisation_figures
from moejax.inspection.html import Markup
from moejax.inspection.report.page import details, drawn_layers, figure, grid, left_out, table

NO_EXPERT = "No token was sent to an expert: soft routing gives each a mixture of all tokens."
MAX_TOKENS = 9_000  # listed in all, fewer for each expert where there are many experts
MAX_TOKENS_OF_EXPERT = 12
INFORMATION_HEAD = (
    "attribute",
    "bits",
    "of them chance",
    "standard deviation",
    "share above chance",
    "adjusted",
    "strongest layer",
)


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What routed validation text shows of the experts.

    What is empty or None is left out of the report.

    Attributes:
      information: of each attribute, in `layers`.
      layers: model layers of that and of `domains`.
      num_tokens: that were routed.
      text: what they are of.
      domains: of the labels of documents.
      domain_names: of those.
      trace: of one passage.
    """

    information: Sequence[Information] = ()
    layers: Sequence[int] = ()
    num_tokens: int = 0
    text: str = "validation text"
    domains: DomainSpecialisation | None = None
    domain_names: Sequence[str] = ()
    trace: Trace | None = None


def tokens(
    token_counts_nEV: Int[np.ndarray, "n E V"] | None,
    piece: Callable[[int], str],
    *,
    layers: Sequence[int] | None,
    top_k: int | None,
) -> Markup:
    """Returns the tokens that each expert gets more often than chance would give it.

    Args:
      token_counts_nEV: how often each expert of the `drawn_layers` got each token.
      piece: token id to text.
      layers: model layer of each MoE layer; None if that is not known.
      top_k: experts of a token; None if that is not known.
    """
    if token_counts_nEV is None or not token_counts_nEV.size:
        return html.paragraph("Not counted for this report.")
    if not token_counts_nEV.any():
        return html.paragraph(NO_EXPERT)
    num_drawn, E, _ = token_counts_nEV.shape
    if layers is None:
        layers = range(num_drawn)
    drawn_n = [layers[n] for n in drawn_layers(len(layers))]
    num_listed = np.clip(MAX_TOKENS // (num_drawn * E), 1, MAX_TOKENS_OF_EXPERT)
    counts_nE = token_counts_nEV.sum(axis=2)
    load_nE = figures.load_ratio(counts_nE)
    ranked_nE = over_represented_tokens(token_counts_nEV, top=int(num_listed))
    parts: list[Markup] = []
    for layer, load_E, ranked_E in zip(drawn_n, load_nE, ranked_nE, strict=True):
        listed = _tokens_of_layer(load_E, ranked_E, piece)
        is_first = not parts
        parts.append(details(f"Layer {layer}", listed, is_open=is_first))
    return html.render(
        "report/tokens",
        at_most=_at_most(top_k),
        left_out=left_out(len(layers)),
        layers=html.join(parts),
    )


def _at_most(top_k: int | None) -> str:
    """Returns the largest share of a token's visits that an expert can have."""
    if top_k is None or top_k <= 1:
        return ""
    share = 1 / top_k
    return f" (at most {share:.0%}, since a token has {top_k} experts)"


def _tokens_of_layer(
    load_E: np.ndarray,
    ranked_E: Sequence[Sequence[TokenShare]],
    piece: Callable[[int], str],
) -> Markup:
    """Returns a table with a row for each expert of a layer: its load and its tokens."""
    rows = []
    for e, ranked in enumerate(ranked_E):
        load = f"{load_E[e]:.2f}"
        rows.append((str(e), load, _pieces(ranked, piece)))
    return table(("Expert", "Load", "Tokens"), rows, kind="tokens")


def _pieces(ranked: Sequence[TokenShare], piece: Callable[[int], str]) -> Markup:
    """Returns the tokens of one expert, each with its share and its ratio to chance."""
    shown = []
    for share in ranked:
        text = html.visible(piece(share.token))
        shown.append((share, text))
    return html.render("report/expert_tokens", tokens=shown)


def attributes(findings: ReportData) -> Markup:
    """Returns how much each attribute of a token tells about its experts."""
    results = findings.information
    if not results:
        return html.paragraph("Not measured for this report.")
    if not any(result.entropy_N.any() for result in results):
        return html.paragraph(NO_EXPERT)
    layers = findings.layers
    means = figure(
        "Mean over layers",
        "Good to know: what is well above its hatched part.",
        specialisation_figures.draw_information(results),
    )
    by_layer = figure(
        "Above chance, by layer",
        "The brighter, the more it tells about the experts of that layer.",
        specialisation_figures.draw_information_by_layer(results, layers),
        kind="true-colors",
    )
    rows = [_information_row(result, layers) for result in results]
    strongest = max(results, key=lambda result: float(result.share_N.mean()))
    note = (
        "Means over layers. Adjusted: 0 at chance, 1 where routing is a function of the attribute."
    )
    listed = html.paragraph(note) + table(INFORMATION_HEAD, rows, kind="numbers")
    return html.render(
        "report/attributes",
        num_tokens=f"{findings.num_tokens:,}",
        text=findings.text,
        strongest=specialisation_figures.information_name(strongest),
        share=f"{strongest.share_N.mean():.0%}",
        figures=grid([means, by_layer]),
        table=details("As a table", listed),
    )


def _information_row(result: Information, layers: Sequence[int]) -> list[str]:
    """Returns what `INFORMATION_HEAD` names, of one attribute."""
    strongest = int(result.share_N.argmax())
    return [
        specialisation_figures.information_name(result),
        f"{result.information_N.mean():.3f}",
        f"{result.baseline_N.mean():.3f}",
        f"{result.spread_N.mean():.3f}",
        f"{result.share_N.mean():.1%}",
        f"{result.adjusted_N.mean():.1%}",
        str(layers[strongest]),
    ]


def domains(findings: ReportData) -> Markup:
    """Returns which experts the documents of each domain visit."""
    found = findings.domains
    if found is None:
        return html.paragraph("The documents of this corpus have no domains.")
    if not np.nan_to_num(found.share_NDE).any():
        return html.paragraph(NO_EXPERT)
    order_D = np.argsort(-found.tokens_D, kind="stable")
    names = [findings.domain_names[d] for d in order_D]
    drawn = []
    for n, layer in enumerate(findings.layers):
        share_DE = found.share_NDE[n]
        uniform = float(found.uniform_N[n])
        image = specialisation_figures.draw_domains(share_DE[order_D], uniform, names)
        strongest = _strongest_visit(share_DE, findings.domain_names)
        reading = f"{strongest}; uniform: {uniform:.0%}."
        drawn.append(figure(f"Layer {layer}", reading, image, kind="true-colors"))
    return html.render(
        "report/domains",
        max_domains=specialisation_figures.MAX_DOMAINS,
        num_domains=len(names),
        figures=grid(drawn),
    )


def _strongest_visit(share_DE: np.ndarray, names: Sequence[str]) -> str:
    """Says which domain has the largest share of its tokens at one expert."""
    num_experts = share_DE.shape[1]
    largest = int(np.nanargmax(share_DE))
    domain, expert = divmod(largest, num_experts)
    name = names[domain]
    share = share_DE[domain, expert]
    return f"{name} visits expert {expert} with {share:.0%} of its tokens"


def passage(findings: ReportData) -> Markup:
    """Returns a text with each token in the colour of its first expert."""
    if findings.trace is None:
        return html.paragraph("No text was traced for this report.")
    return html.render("report/passage", trace=as_html(findings.trace))
