"""What the page of `moejax view` says in HTML. All that comes from a run is escaped."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from moejax.inspection import html
from moejax.inspection.figures.run import Chart
from moejax.inspection.html import Markup
from moejax.inspection.report.page import number
from moejax.inspection.runs.paths import RunPathError, open_file
from moejax.inspection.viewer.run_folder import LiveRun, age

REPORT = "report.html"
MAX_LINKS = 8  # named
MAX_REPORT = 2**25  # bytes; a report has less than a megabyte
NO_VALUE = "-"
COLUMNS = ("Run", "Steps", "Written", "Validation loss", "Bits per byte", "Tokens/s", "Alarms")


def heading(folder: Path, num_runs: int, links: Sequence[str] = (), *, is_behind: bool) -> Markup:
    """Says what is viewed, and which links are not followed.

    Args:
      folder: that is viewed.
      num_runs: below it.
      links: that lead out of it.
      is_behind: whether the last poll left something unread.
    """
    return html.render(
        "viewer/heading",
        folder=folder,
        num_runs=num_runs,
        links=links[:MAX_LINKS],
        num_more_links=max(0, len(links) - MAX_LINKS),
        is_behind=is_behind,
    )


def runs_head() -> Markup:
    """Returns titles of the columns of runs; a phone shows them in each row."""
    return html.render("viewer/runs_head", columns=COLUMNS)


def run_row(run: LiveRun) -> Markup:
    """Returns a run's row in the list of runs; on a phone, a card."""
    state = run.state
    num_steps = "" if state.num_steps is None else f" of {state.num_steps:,}"
    values = (
        f"{state.steps:,}{num_steps}",
        age(state.written),
        number(state.eval_loss, NO_VALUE),
        number(state.bits_per_byte, NO_VALUE),
        number(state.tokens_per_s, NO_VALUE),
    )
    notes = [note for note in (*state.alarms, state.problem) if note]
    return html.render(
        "viewer/run_row",
        name=run.name,
        color=run.color,
        values=dict(zip(COLUMNS[1:6], values, strict=True)),
        alarms=COLUMNS[6],
        notes=notes,
    )


def left_out(num_listed: int, num_runs: int) -> Markup:
    """Says that the list of runs is not all of them; nothing if it is."""
    if num_listed == num_runs:
        return html.EMPTY
    note = (
        f"{num_listed:,} of {num_runs:,} runs are listed: those shown, and the newest. Type a part "
        "of a name for others."
    )
    return html.paragraph(note, "soft")


def constants(found: Sequence[tuple[Chart, float]]) -> Markup:
    """Says what is the same throughout, in place of charts; nothing if no chart is left out."""
    if not found:
        return html.EMPTY
    values = []
    for chart, value in found:
        title = chart.title.lower()
        values.append(f"{title} {number(value)}")
    listed = ", ".join(values)
    note = f"The same in all runs shown that log it, throughout: {listed}."
    return html.paragraph(note, "soft")


def chart_text(chart: Chart, caption: str) -> Markup:
    """Returns the heading of a plot, and how to read it."""
    parts = [chart.reading, caption]
    if chart.reference:
        _, name = chart.reference
        parts.append(f"Dotted line: {name}.")
    known = [part for part in parts if part]
    return section_text(chart.title, " ".join(known))


def section_text(title: str, reading: str = "") -> Markup:
    """Returns a heading, and what to say below it."""
    return html.render("viewer/section", title=title, reading=reading)


def problem(text: str) -> Markup:
    """Returns a line that says what is wrong."""
    return html.paragraph(text, "bad")


def report_frame(run: LiveRun) -> Markup:
    """Returns the run's report in a frame that runs no script and fetches nothing.

    If there is none, this is the command that makes one.
    """
    path = run.workdir / REPORT
    command = f"moejax report --workdir={shlex.quote(str(run.workdir))}"
    try:
        with open_file(run.workdir, REPORT) as file:
            page = file.read(MAX_REPORT + 1)
    except FileNotFoundError:
        return html.render("viewer/no_report", name=run.name, command=html.command(command))
    except OSError as error:
        return problem(f"{path} cannot be read: {error.strerror}")
    except RunPathError as error:
        return problem(str(error))
    if len(page) > MAX_REPORT:
        return problem(
            f"{path} has more than {MAX_REPORT:,} bytes, which is no report; make it again: "
            f"{command}"
        )
    return html.render("viewer/report", name=run.name, page=page.decode(errors="replace"))
