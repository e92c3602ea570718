"""Section of a run's report: its validation loss with other routing than it was trained with."""

from collections.abc import Mapping, Sequence

from moejax.inspection import html
from moejax.inspection.counterfactuals.plan import NOT_SELECTABLE, OUTPUT_ZERO
from moejax.inspection.counterfactuals.result import FILE_NAME, Counterfactuals
from moejax.inspection.figures import counterfactuals as figures
from moejax.inspection.html import Markup
from moejax.inspection.report.page import details, figure, grid, table
from moejax.inspection.runs.run import Run

CHANGE = "Change of the validation loss against that as trained; bars are two standard errors."
ABLATION = (
    "Red: worse without the expert. White: it makes no difference. A dot marks what may be noise."
)


def changed_routing(run: Run) -> Markup:
    """Returns what `counterfactuals.json` says."""
    if not (run.workdir / FILE_NAME).exists():
        command = html.command("moejax counterfactuals --workdir=...")
        return html.render("report/no_counterfactuals", command=command)
    return outcomes(Counterfactuals.load(run.workdir / FILE_NAME))


def outcomes(result: Counterfactuals) -> Markup:
    """Returns the figures of a result, and its tables."""
    rows = [row for row in result.table() if row["kind"] != "ablate"]
    tables = details("All but ablations, as a table", _as_table(rows))
    ablations = result.summary()
    if ablations:
        tables += details("Ablations by layer, as a table", _as_table(ablations))
    return html.render(
        "report/counterfactuals",
        title=result.title(),
        figures=grid(_figures(result)),
        tables=tables,
        left_out=result.left_out,
    )


def _figures(result: Counterfactuals) -> list[Markup]:
    """Returns the figures that the result has outcomes for."""
    wanted = [
        ("Experts per token", CHANGE, figures.draw_top_k(result), ""),
        ("Capacity", CHANGE, figures.draw_capacity(result), ""),
        (
            "Without one expert: not selectable",
            f"{ABLATION} Its tokens go to the next best.",
            figures.draw_ablation(result, NOT_SELECTABLE),
            "true-colors",
        ),
        (
            "Without one expert: output 0",
            f"{ABLATION} Its tokens get nothing from it.",
            figures.draw_ablation(result, OUTPUT_ZERO),
            "true-colors",
        ),
        ("Other weights", CHANGE, figures.draw_bars(result, ("swap", "merge")), ""),
        ("Other choices", CHANGE, figures.draw_bars(result, ("random", "uniform")), ""),
    ]
    drawn = []
    for title, reading, image, kind in wanted:
        if image:
            drawn.append(figure(title, reading, image, kind=kind))
    return drawn


def _as_table(rows: Sequence[Mapping[str, str]]) -> Markup:
    return table(rows[0], [list(row.values()) for row in rows], kind="numbers")
