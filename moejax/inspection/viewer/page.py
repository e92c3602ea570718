"""What the page of `moejax view` says in HTML. All that comes from a run is escaped."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from moejax.inspection import html
from moejax.inspection.figures.run import Chart
from moejax.inspection.runs.paths import RunPathError, open_file
from moejax.inspection.viewer.run_folder import LiveRun, age

REPORT = "report.html"
MAX_LINKS = 8  # named
MAX_REPORT = 2**25  # bytes; a report has less than a megabyte
COLUMNS = ("Run", "Steps", "Written", "Validation loss", "Bits per byte", "Tokens/s", "Alarms")
INK = """
:host{--ink:#1f2933;--soft:#5b6573;--line:#d9dde3;--bad:#b3261e;color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media(prefers-color-scheme:dark){:host{--ink:#e4e7eb;--soft:#a3adba;--line:#363d46;--bad:#ff9c92}}
"""
TEXT_STYLE = f"""{INK}
*{{box-sizing:border-box}}
h1{{margin:0;font-size:1.5rem;overflow-wrap:anywhere}}
h2{{margin:1.2rem 0 .2rem;font-size:1.15rem}}
h3{{margin:0;font-size:1rem;overflow-wrap:anywhere}}
p{{margin:.1rem 0;max-width:46rem}}
.soft{{color:var(--soft);font-size:.875rem}}
.bad{{color:var(--bad);overflow-wrap:anywhere}}
code{{font:.85rem ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}}
code.command span{{display:inline-block;max-width:100%;word-break:break-all}}
.run{{display:grid;grid-template-columns:minmax(0,2.4fr) repeat(5,minmax(0,1fr)) minmax(0,1.6fr);gap:0 .9rem;
padding:.25rem 0;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}}
.run>*{{min-width:0;overflow-wrap:anywhere}}
.head{{color:var(--soft);font-weight:600;padding-left:1.7rem}}
i{{display:inline-block;width:.7rem;height:.7rem;margin-right:.4rem;border-radius:.15rem}}
iframe{{display:block;width:100%;height:85vh;border:1px solid var(--line);border-radius:.4rem;background:transparent}}
@media(prefers-color-scheme:dark){{i{{filter:invert(.91) hue-rotate(180deg)}}}}
@media(max-width:44rem){{
.head{{display:none}}
.run{{grid-template-columns:1fr 1fr}}
.run strong,.run .wide{{grid-column:1/-1}}
.run [data-name]:before{{content:attr(data-name) ": ";color:var(--soft)}}
}}
"""
CHOICE_STYLE = f"""{INK}
.bk-input-group{{display:flex;flex-flow:row wrap;gap:.2rem 1.1rem}}
.bk-input-group:before{{color:var(--soft)}}
.bk-input-group label{{margin:0!important;overflow-wrap:anywhere}}
label input{{accent-color:#0b62a8}}
"""
TABS_STYLE = f"""{INK}
.bk-header{{border-color:var(--line)!important}}
.bk-tab{{color:var(--soft)!important;font-size:1rem}}
.bk-tab.bk-active{{color:var(--ink)!important;background:transparent!important;border-color:var(--line)!important}}
"""
# Bokeh leaves what it painted before it knew its width in the first pixels, which are cut off.
PLOT_STYLE = """:host{clip-path:inset(-50rem -50rem -50rem 3px)}
@media(prefers-color-scheme:dark){:host{filter:invert(.91) hue-rotate(180deg)}}"""
LOAD_STYLE = """@media(prefers-color-scheme:dark){:host{background:#fff;border-radius:.4rem;filter:brightness(.88)}}"""
PAGE = """{% extends "base.html" %}{% block postamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{color-scheme:light dark}
body{padding:1rem!important;background:#fff}
@media(prefers-color-scheme:dark){html,body{background:#171717}}</style>{% endblock %}"""


def heading(folder: Path, num_runs: int, links: Sequence[str] = (), *, is_behind: bool) -> str:
    """What is viewed, and what is not for it is elsewhere."""
    runs = "1 run" if num_runs == 1 else f"{num_runs:,} runs"
    more = " Reading what was logged so far." if is_behind else ""
    if not num_runs:
        more = " A run appears here once <code>moejax train</code> has begun it in a folder below."
    if links:
        shown = ", ".join(f"<code>{html.text(link)}</code>" for link in links[:MAX_LINKS])
        rest = f" and {len(links) - MAX_LINKS} more" if len(links) > MAX_LINKS else ""
        more += f" Not followed, for they are links that lead out of this folder: {shown}{rest}."
    return (
        f"<h1>moejax view</h1><p class='soft'>{runs} in <code>{html.text(folder)}</code>.{more}</p>"
    )


def runs_head() -> str:
    """Titles of the columns of runs; a phone shows them in each row."""
    return f"<div class='run head'>{''.join(f'<span>{column}</span>' for column in COLUMNS)}</div>"


def run_row(run: LiveRun) -> str:
    """What is said of a run in the list of them; on a phone, a card."""
    state = run.state
    of_all = "" if state.num_steps is None else f" of {state.num_steps:,}"
    values = (
        f"{state.steps:,}{of_all}",
        age(state.written),
        number(state.eval_loss),
        number(state.bits_per_byte),
        number(state.tokens_per_s),
    )
    cells = "".join(
        f'<span data-name="{name}">{value}</span>'
        for name, value in zip(COLUMNS[1:6], values, strict=True)
    )
    notes = [
        f'<div class="bad">{html.text(text)}</div>'
        for text in (*state.alarms, state.problem)
        if text
    ]
    last = (
        f'<div class="wide">{"".join(notes)}</div>'
        if notes
        else f'<span data-name="{COLUMNS[6]}">none</span>'
    )
    swatch = f'<i style="background:{run.color}"></i>'
    return f'<div class="run"><strong>{swatch}{html.text(run.name)}</strong>{cells}{last}</div>'


def left_out(num_listed: int, num_runs: int) -> str:
    """Says that the list of runs is not all of them."""
    if num_listed == num_runs:
        return ""
    return (
        f"<p class='soft'>{num_listed:,} of {num_runs:,} runs are listed: those shown, and the newest. Type a part of "
        "a name for others.</p>"
    )


def constants(found: Sequence[tuple[Chart, float]]) -> str:
    """Says what is the same throughout, in place of charts."""
    listed = ", ".join(
        f"{html.text(chart.title.lower())} {number(value)}" for chart, value in found
    )
    return (
        f"<p class='soft'>The same in all runs shown that log it, throughout: {listed}.</p>"
        if found
        else ""
    )


def chart_text(chart: Chart, caption: str) -> str:
    """The heading of a plot, and how to read it."""
    parts = [
        chart.reading,
        caption,
        f"Dotted line: {chart.reference[1]}." if chart.reference else "",
    ]
    text = html.text(" ".join(part for part in parts if part))
    return f"<h3>{html.text(chart.title)}</h3><p class='soft'>{text}</p>"


def choice_style(title: str) -> str:
    """Of check boxes or radio buttons in a line behind a title."""
    return f"{CHOICE_STYLE}.bk-input-group:before{{content:'{title}'}}"


def problem(text: str) -> str:
    """A line that says what is wrong."""
    return f'<p class="bad">{html.text(text)}</p>'


def report_frame(run: LiveRun) -> str:
    """The run's report in a frame that runs no script and fetches nothing; the command for it if it is absent."""
    path = run.workdir / REPORT
    command = f"moejax report --workdir={shlex.quote(str(run.workdir))}"
    try:
        with open_file(run.workdir, REPORT) as file:
            page = file.read(MAX_REPORT + 1)
    except FileNotFoundError:
        return f"<p>{html.text(run.name)} has no report yet. This makes one: {html.command(command)}</p>"
    except OSError as error:
        return problem(f"{path} cannot be read: {error.strerror}")
    except RunPathError as error:
        return problem(str(error))
    if len(page) > MAX_REPORT:
        return problem(
            f"{path} has more than {MAX_REPORT:,} bytes, which is no report; make it again: {command}"
        )
    text = html.text(page.decode(errors="replace"))
    return f'<iframe sandbox="" title="Report of {html.text(run.name)}" srcdoc="{text}"></iframe>'


def number(value: float | None) -> str:
    """Four digits, or all of them before the point; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
