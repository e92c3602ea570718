"""Sections of a run's report: what each expert takes, what routing goes by, a text coloured by expert, counterfactuals.

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
from moejax.inspection.counterfactuals.plan import NOT_SELECTABLE, OUTPUT_ZERO
from moejax.inspection.counterfactuals.result import FILE_NAME, Counterfactuals
from moejax.inspection.figures import counterfactuals as counterfactual_figures
from moejax.inspection.figures import run as figures
from moejax.inspection.figures import specialisation as specialisation_figures
from moejax.inspection.report.page import details, drawn_layers, figure, grid, left_out, table
from moejax.inspection.runs.run import Run

NO_EXPERT = (
    "<p>No token was sent to an expert: soft routing gives each a mixture of all tokens.</p>"
)
MAX_TOKENS = 9_000  # listed in all, fewer for each expert where there are many experts


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What routed validation text shows of the experts; what is empty or None is left out of the report.

    Attributes:
      information: of each attribute, in `layers`.
      layers: model layers of that and of `domains`.
      num_tokens: that were routed.
      domains: of the labels of documents.
      domain_names: of those.
      trace: of one passage.
    """

    information: Sequence[Information] = ()
    layers: Sequence[int] = ()
    num_tokens: int = 0
    domains: DomainSpecialisation | None = None
    domain_names: Sequence[str] = ()
    trace: Trace | None = None


def tokens(
    run: Run, token_counts_nEV: Int[np.ndarray, "n E V"] | None, piece: Callable[[int], str]
) -> str:
    """The tokens that each expert gets more often than chance would give it; counts are those of `drawn_layers`."""
    if token_counts_nEV is None or not token_counts_nEV.size:
        return "<p>Not counted for this report.</p>"
    if not token_counts_nEV.any():
        return NO_EXPERT
    num_drawn, E, _ = token_counts_nEV.shape
    layers = list(range(num_drawn)) if run.routing is None else run.routing.layers.tolist()
    drawn = [layers[n] for n in drawn_layers(len(layers))]
    top = int(np.clip(MAX_TOKENS // (num_drawn * E), 1, 12))
    share_nE = figures.load_ratio(token_counts_nEV.sum(axis=2))
    parts = []
    for n, (layer, ranked) in enumerate(
        zip(drawn, over_represented_tokens(token_counts_nEV, top=top), strict=True)
    ):
        rows = [(str(e), f"{share_nE[n, e]:.2f}", _pieces(ranked[e], piece)) for e in range(E)]
        listed = table(("Expert", "Load", "Tokens"), rows, kind="tokens")
        parts.append(details(f"Layer {layer}", listed, is_open=n == 0))
    return (
        "<p>The tokens that each expert gets more often than it would if routing ignored their identity, the strongest "
        "evidence first (log-likelihood ratio; rare tokens and chance are left out). After a token: which share of its "
        f"visits to experts go to this one{_at_most(run)}, and how many times more often that is than by chance. Load "
        "is the expert's over the uniform load on the text counted. Nothing listed means routing by something else "
        f"than the word.</p>{left_out(len(layers))}{''.join(parts)}"
    )


def _at_most(run: Run) -> str:
    """The largest share of visits that an expert can have of a token."""
    top_k = run.config.get("moe", {}).get("top_k")
    return (
        f" (at most {1 / top_k:.0%}, since a token has {top_k} experts)"
        if type(top_k) is int and top_k > 1
        else ""
    )


def _pieces(ranked: Sequence[TokenShare], piece: Callable[[int], str]) -> str:
    if not ranked:
        return '<i class="soft">nothing stands out</i>'
    return " ".join(
        f'<span title="id {t.token}, {t.num_assignments:,} times">{html.text(html.visible(piece(t.token)))}'
        f"<small>{t.share:.0%}, {t.ratio:.1f}&times;</small></span>"
        for t in ranked
    )


def attributes(findings: ReportData) -> str:
    """How much each attribute of a token tells of its experts."""
    results = findings.information
    if not results:
        return "<p>Not measured for this report.</p>"
    if not any(result.entropy_N.any() for result in results):
        return NO_EXPERT
    layers = findings.layers
    rows = [_information_row(result, layers) for result in results]
    head = (
        "attribute",
        "bits",
        "of them chance",
        "standard deviation",
        "share above chance",
        "adjusted",
        "strongest layer",
    )
    strongest = max(results, key=lambda result: float(result.share_N.mean()))
    by_layer = specialisation_figures.draw_information_by_layer(results, layers)
    return (
        "<p>How much knowing one property of a token tells about its experts: mutual information, in bits, over the "
        "entropy of the experts. The chance part is what the same property shows when it is dealt out to tokens at "
        "random; only what is above it counts. Position in row is a control, which the model does not see. "
        f"{findings.num_tokens:,} tokens of validation text were routed. <strong>Routing goes most by "
        f"{html.text(specialisation_figures.information_name(strongest))}, which tells "
        f"{strongest.share_N.mean():.0%} above chance.</strong></p>"
        + grid(
            [
                figure("Mean over layers", "Good to know: what is well above its hatched part.",
                       specialisation_figures.draw_information(results)),
                figure("Above chance, by layer", "The brighter, the more it tells about the experts of that layer.",
                       by_layer, kind="true-colors"),
            ]
        )
        + details(
            "As a table",
            "<p>Means over layers. Adjusted: 0 at chance, 1 where routing is a function of the attribute.</p>"
            + table(head, rows, kind="numbers"),
        )
    )  # fmt: skip


def _information_row(result: Information, layers: Sequence[int]) -> list[str]:
    means = (result.information_N, result.baseline_N, result.spread_N)
    return [
        html.text(specialisation_figures.information_name(result)),
        *(f"{values_N.mean():.3f}" for values_N in means),
        f"{result.share_N.mean():.1%}",
        f"{result.adjusted_N.mean():.1%}",
        str(layers[int(result.share_N.argmax())]),
    ]


def domains(findings: ReportData) -> str:
    """Which experts the documents of each domain visit."""
    found = findings.domains
    if found is None:
        return "<p>The documents of this corpus have no domains.</p>"
    if not np.nan_to_num(found.share_NDE).any():
        return NO_EXPERT
    order_D = np.argsort(-found.tokens_D, kind="stable")
    names = [findings.domain_names[d] for d in order_D]
    shown = []
    for n, layer in enumerate(findings.layers):
        image = specialisation_figures.draw_domains(
            found.share_NDE[n][order_D], float(found.uniform_N[n]), names
        )
        domain, expert = divmod(int(np.nanargmax(found.share_NDE[n])), found.share_NDE.shape[2])
        reading = (
            f"{html.text(findings.domain_names[domain])} visits expert {expert} with "
            f"{found.share_NDE[n, domain, expert]:.0%} of its tokens; uniform: {found.uniform_N[n]:.0%}."
        )
        shown.append(figure(f"Layer {layer}", reading, image, kind="true-colors"))
    more = len(names) - specialisation_figures.MAX_DOMAINS
    return (
        "<p>The share of a domain's tokens that visit each expert, over the level of uniform routing: white is that "
        "level, red above, blue below, black never.</p>"
        + (
            f"<p>The {specialisation_figures.MAX_DOMAINS} largest domains; {more} are left out.</p>"
            if more > 0
            else ""
        )
        + grid(shown)
    )


def passage(findings: ReportData) -> str:
    """A text with each token in the colour of its first expert."""
    if findings.trace is None:
        return "<p>No text was traced for this report.</p>"
    return f'<div class="passage">{as_html(findings.trace)}</div>'


def changed_routing(run: Run) -> str:
    """What `counterfactuals.json` says."""
    if not (run.workdir / FILE_NAME).exists():
        return (
            f"<p>Not evaluated. {html.command('moejax counterfactuals --workdir=...')} evaluates the run with other "
            "numbers of experts, without each expert, and more; write the report again after it.</p>"
        )
    result = Counterfactuals.load(run.workdir / FILE_NAME)
    change = "Change of the validation loss against that as trained; bars are two standard errors."
    ablation = "Red: worse without the expert. White: it makes no difference. A dot marks what may be noise."
    drawn = (
        ("Experts per token", change, counterfactual_figures.draw_top_k(result), ""),
        ("Capacity", change, counterfactual_figures.draw_capacity(result), ""),
        ("Without one expert: not selectable", f"{ablation} Its tokens go to the next best.",
         counterfactual_figures.draw_ablation(result, NOT_SELECTABLE), "true-colors"),
        ("Without one expert: output 0", f"{ablation} Its tokens get nothing from it.",
         counterfactual_figures.draw_ablation(result, OUTPUT_ZERO), "true-colors"),
        ("Other weights", change, counterfactual_figures.draw_bars(result, ("swap", "merge")), ""),
        ("Other choices", change, counterfactual_figures.draw_bars(result, ("random", "uniform")), ""),
    )  # fmt: skip
    rows = [row for row in result.table() if row["kind"] != "ablate"]
    parts = [
        f"<p>{html.text(result.title())}.</p>",
        grid(
            figure(title, reading, image, kind=kind)
            for title, reading, image, kind in drawn
            if image
        ),
        details("All but ablations, as a table", _as_table(rows)),
    ]
    if ablations := result.summary():
        parts.append(details("Ablations by layer, as a table", _as_table(ablations)))
    if result.left_out:
        listed = "".join(
            f"<li>{html.text(what)}: {html.text(why)}</li>" for what, why in result.left_out.items()
        )
        parts.append(f"<p>Left out, for it has no meaning here:</p><ul>{listed}</ul>")
    return "".join(parts)


def _as_table(rows: Sequence[dict[str, str]]) -> str:
    cells = [[html.text(cell) for cell in row.values()] for row in rows]
    return table([html.text(name) for name in rows[0]], cells, kind="numbers")
