"""A run as one HTML page: training, how tokens were routed, what experts do, what the model writes.

See `report/page.py` for what a page is. Each section is a function of the run, in the other files
of this folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from moejax.inspection import html
from moejax.inspection.figures import run as figures
from moejax.inspection.report import counterfactuals, evaluations, experts, health, load, training
from moejax.inspection.report.experts import ReportData
from moejax.inspection.report.page import Section, guarded, render_page, write_page
from moejax.inspection.report.training import Sample
from moejax.inspection.runs.run import Run

NOTHING = ReportData()


def render_report(
    run: Run,
    *,
    token_counts_nEV: Int[np.ndarray, "n E V"] | None,
    piece: Callable[[int], str],
    samples: Sequence[Sample],
    findings: ReportData = NOTHING,
) -> str:
    """Renders the page.

    Args:
      run: the record of a run.
      token_counts_nEV: how often each expert of the `drawn_layers` got each token, from validation
        text; None leaves the table of tokens out.
      piece: token id to text.
      samples: texts that the model wrote.
      findings: what else routed text shows.

    Returns:
      An HTML document.
    """
    sections = _training_sections(run)
    if run.is_dense:
        note = "This is a dense run: it has no experts, so nothing is routed."
        sections.append(("routing", "Routing", html.paragraph(note)))
    else:
        sections += _routing_sections(run)
        tokens = experts.tokens(
            token_counts_nEV, piece, layers=_layers(run), top_k=_experts_per_token(run)
        )
        sections.append(("tokens", "What each expert takes", tokens))
        sections += _expert_sections(run, findings)
    sections += [
        ("samples", "Samples", training.written(samples)),
        ("config", "Configuration", training.configuration(run)),
    ]
    return render_page(run.name_in_words, training.subtitle(run), sections, kind="run report")


def _training_sections(run: Run) -> list[Section]:
    loss_charts = (*figures.LOSS_CHARTS, *training.other_losses(run))
    losses = training.charts(run, loss_charts) + training.losses_by_cost(run)
    speed = training.charts(run, figures.SPEED_CHARTS)
    return [
        ("summary", "Summary", training.summary(run)),
        ("losses", "Losses", losses),
        ("speed", "Speed and optimisation", speed),
    ]


def _routing_sections(run: Run) -> list[Section]:
    routing = training.charts(run, figures.routing_charts(run.num_choices))
    settling = guarded(lambda: evaluations.settling(run))
    coactivation = guarded(lambda: evaluations.coactivation(run))
    return [
        ("alarms", "Alarms", guarded(lambda: health.alarms(run))),
        ("routing", "Routing health", routing),
        ("layers", "Layer by layer", health.layers_over_time(run)),
        ("load", "Expert load over time", load.load_over_time(run)),
        ("final-load", "Final expert load", load.final_load(run)),
        ("settling", "Saturation and churn", settling),
        ("coactivation", "Experts that go together", coactivation),
        ("flow", "Paths through the layers", guarded(lambda: evaluations.flow(run))),
    ]


def _expert_sections(run: Run, findings: ReportData) -> list[Section]:
    sections: list[Section] = [
        ("attributes", "What routing goes by", experts.attributes(findings)),
    ]
    if findings.domains is not None:
        sections.append(("domains", "Domains", experts.domains(findings)))
    changed = guarded(lambda: counterfactuals.changed_routing(run))
    sections += [
        ("text", "A text by expert", experts.passage(findings)),
        ("counterfactuals", "Counterfactuals", changed),
    ]
    return sections


def _layers(run: Run) -> list[int] | None:
    """Returns the model layer of each MoE layer; None before any routing is logged."""
    return None if run.routing is None else run.routing.layers.tolist()


def _experts_per_token(run: Run) -> int | None:
    """Returns K, as far as the run's record says a number."""
    top_k = run.config.get("moe", {}).get("top_k")
    return top_k if type(top_k) is int else None


def write_report(workdir: str | Path, document: str) -> Path:
    """Writes `report.html` into the run directory in one rename: no reader sees half a page."""
    return write_page(Path(workdir) / "report.html", document)
