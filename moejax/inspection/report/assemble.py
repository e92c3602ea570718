"""A run as one HTML page: how training went, how tokens were routed, what experts do, and what the model writes.

See `report/page.py` for what a page is. Each section is a function of the run, in the files
beside this one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from moejax.inspection.figures import run as figures
from moejax.inspection.report import experts, health, load, training
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
    losses = (*figures.LOSS_CHARTS, *training.other_losses(run))
    sections: list[Section] = [
        ("summary", "Summary", training.summary(run)),
        ("losses", "Losses", training.charts(run, losses) + training.losses_by_cost(run)),
        ("speed", "Speed and optimisation", training.charts(run, figures.SPEED_CHARTS)),
    ]
    if run.is_dense:
        sections.append(
            (
                "routing",
                "Routing",
                "<p>This is a dense run: it has no experts, so nothing is routed.</p>",
            )
        )
    else:
        sections += _routing(run)
        sections += [
            ("tokens", "What each expert takes", experts.tokens(run, token_counts_nEV, piece)),
            ("attributes", "What routing goes by", experts.attributes(findings)),
        ]
        if findings.domains is not None:
            sections.append(("domains", "Domains", experts.domains(findings)))
        sections += [
            ("text", "A text by expert", experts.passage(findings)),
            ("counterfactuals", "Counterfactuals", guarded(lambda: experts.changed_routing(run))),
        ]
    sections += [
        ("samples", "Samples", training.written(samples)),
        ("config", "Configuration", training.configuration(run)),
    ]
    return render_page(run.name_in_words, training.subtitle(run), sections, kind="run report")


def _routing(run: Run) -> list[Section]:
    return [
        ("alarms", "Alarms", guarded(lambda: health.alarms(run))),
        (
            "routing",
            "Routing health",
            training.charts(run, figures.routing_charts(run.num_choices)),
        ),
        ("layers", "Layer by layer", health.layers_over_time(run)),
        ("load", "Expert load over time", load.load_over_time(run)),
        ("final-load", "Final expert load", load.final_load(run)),
        ("settling", "Saturation and churn", guarded(lambda: health.settling(run))),
        ("coactivation", "Experts that go together", guarded(lambda: health.coactivation(run))),
        ("flow", "Paths through the layers", guarded(lambda: health.flow(run))),
    ]


def write_report(workdir: str | Path, html: str) -> Path:
    """Writes `report.html` into the run directory in one rename, so that a reader never sees half a page."""
    return write_page(Path(workdir) / "report.html", html)
