"""What the page of `moejax view` says in HTML. All that comes from a run is escaped."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from moejax.inspection import html
from moejax.inspection.figures import Chart
from moejax.inspection.live import LiveRun, RunState, age
from moejax.inspection.view_plots import color

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
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}}
th,td{{padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}}
thead th{{color:var(--soft);font-weight:600}}
tbody th{{font-weight:600;overflow-wrap:anywhere}}
i{{display:inline-block;width:.7rem;height:.7rem;margin-right:.4rem;border-radius:.15rem}}
.runs{{max-height:24rem;overflow:auto}}
iframe{{display:block;width:100%;height:85vh;border:1px solid var(--line);border-radius:.4rem;background:transparent}}
@media(prefers-color-scheme:dark){{i{{filter:invert(.91) hue-rotate(180deg)}}}}
@media(max-width:44rem){{
thead{{display:none}}
tr{{display:grid;grid-template-columns:1fr 1fr;gap:0 1rem;padding:.5rem 0;border-bottom:1px solid var(--line)}}
tbody th,td.wide{{grid-column:1/-1}}
th,td{{border:0;padding:.05rem 0}}
td[data-name]:before{{content:attr(data-name) ": ";color:var(--soft)}}
}}
"""
CHOICE_STYLE = f"""{INK}
.bk-input-group{{display:flex;flex-flow:row wrap;gap:.2rem 1.1rem;max-height:9rem;overflow:auto}}
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


def heading(folder: Path, num_runs: int, *, is_behind: bool) -> str:
    """What is viewed."""
    runs = "1 run" if num_runs == 1 else f"{num_runs:,} runs"
    more = " Reading what was logged so far." if is_behind else ""
    if not num_runs:
        more = " A run appears here once <code>moejax train</code> has begun it in a folder below."
    return f"<h1>moejax view</h1><p class='soft'>{runs} in <code>{html.text(folder)}</code>.{more}</p>"


def runs_table(runs: Mapping[str, LiveRun]) -> str:
    """A row for each run; on a phone, a card."""
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    rows = "".join(_row(name, color(run), run.state) for name, run in runs.items())
    return f'<div class="runs"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>' if rows else ""


def _row(name: str, swatch: str, state: RunState) -> str:
    of_all = "" if state.num_steps is None else f" of {state.num_steps:,}"
    values = (
        f"{state.steps:,}{of_all}",
        age(state.written),
        number(state.eval_loss),
        number(state.bits_per_byte),
        number(state.tokens_per_s),
    )
    cells = "".join(f'<td data-name="{name}">{value}</td>' for name, value in zip(COLUMNS[1:6], values, strict=True))
    notes = [f'<div class="bad">{html.text(text)}</div>' for text in (*state.alarms, state.problem) if text]
    last = f'<td class="wide">{"".join(notes)}</td>' if notes else f'<td data-name="{COLUMNS[6]}">none</td>'
    return f'<tr><th scope="row"><i style="background:{swatch}"></i>{html.text(name)}</th>{cells}{last}</tr>'


def chart_text(chart: Chart, caption: str) -> str:
    """The heading of a plot, and how to read it."""
    parts = [chart.reading, caption, f"Dotted line: {chart.reference[1]}." if chart.reference else ""]
    text = html.text(" ".join(part for part in parts if part))
    return f"<h3>{html.text(chart.title)}</h3><p class='soft'>{text}</p>"


def choice_style(title: str) -> str:
    """Of check boxes or radio buttons in a line behind a title."""
    return f"{CHOICE_STYLE}.bk-input-group:before{{content:'{title}'}}"


def problem(text: str) -> str:
    """A line that says what is wrong."""
    return f'<p class="bad">{html.text(text)}</p>'


def report_frame(name: str, workdir: Path) -> str:
    """The run's report in a frame that runs no script and fetches nothing; the command for it if it is absent."""
    path = workdir / "report.html"
    command = f"moejax report --workdir={shlex.quote(str(workdir))}"
    try:
        with path.open("rb") as file:
            page = file.read(MAX_REPORT + 1)
    except FileNotFoundError:
        return f"<p>{html.text(name)} has no report yet. This makes one: <code>{html.text(command)}</code></p>"
    except OSError as error:
        return problem(f"{path} cannot be read: {error.strerror}")
    if len(page) > MAX_REPORT:
        return problem(f"{path} has more than {MAX_REPORT:,} bytes, which is no report; make it again: {command}")
    text = html.text(page.decode(errors="replace"))
    return f'<iframe sandbox="" title="Report of {html.text(name)}" srcdoc="{text}"></iframe>'


def number(value: float | None) -> str:
    """Four digits, or all of them before the point; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
