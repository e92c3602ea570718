"""One browser's view of the runs: what it has chosen, and what it has been sent."""

from collections.abc import Callable
from typing import Any

import panel as pn

from moejax.inspection import html
from moejax.inspection.figures.axes import NAMES
from moejax.inspection.figures.run import Chart
from moejax.inspection.runs.paths import check_folder
from moejax.inspection.viewer import page, styles
from moejax.inspection.viewer.plots import CurvePlot, charts_of, constant, load_plot, signature
from moejax.inspection.viewer.run_folder import LiveRun, RunFolder
from moejax.training.run_directory.routing_log import FOLDER

GRID = {
    "display": "grid",
    "grid-template-columns": "repeat(auto-fill, minmax(min(100%, 22rem), 1fr))",
    "gap": "1.2rem",
}
TABS = ("Curves", "Load", "Report")
EVERY_MS = 2000  # looks for what is new
CATCH_UP_MS = 200  # reads on while something is left unread
NUM_CHOSEN = 4  # runs that are shown at first, the newest
MAX_LISTED = 40  # runs; of more, a part of a name finds others
NO_CURVE = "No curve yet: no run is chosen, or none has logged a step."
NO_RUN = "No run is chosen."


class RunList:
    """The runs as rows, each with a box that shows or hides its curves.

    Args:
      run_folder: the runs.
      on_change: called when a box or the wanted part of a name has changed.

    Attributes:
      page: to be served.
    """

    def __init__(self, run_folder: RunFolder, on_change: Callable[..., None]):
        self._run_folder = run_folder
        self._on_change = on_change
        self._boxes: dict[str, pn.widgets.Checkbox] = {}
        self._rows: dict[str, pn.pane.HTML] = {}
        self._listed: list[str] = []
        self._part = pn.widgets.TextInput(
            placeholder="part of a run's name", width=280, margin=(4, 0), visible=False
        )
        self._part.param.watch(on_change, "value")
        self._left_out = _text()
        self._body = pn.Column(**WIDE)
        head = _text(page.runs_head())
        self.page = pn.Column(self._part, self._left_out, head, self._body, **WIDE)
        for path in run_folder.newest(NUM_CHOSEN):
            self._add(path, is_chosen=True)

    @property
    def chosen(self) -> dict[str, LiveRun]:
        """The runs whose curves are shown."""
        runs = self._run_folder.runs
        return {path: run for path, run in runs.items() if self._is_chosen(path)}

    def show(self) -> None:
        """Sends the browser what differs from what it was sent."""
        runs = self._run_folder.runs
        listed = self._find_listed()
        for path in listed:
            if path not in self._boxes:
                self._add(path, is_chosen=False)
            row = page.run_row(runs[path])
            _set(self._rows[path], row)
        num_runs = len(runs)
        self._part.visible = num_runs > MAX_LISTED
        left_out = page.left_out(len(listed), num_runs)
        _set(self._left_out, left_out)
        if listed != self._listed:
            self._listed = listed
            self._body.objects = [self._row_of(path) for path in listed]

    def _row_of(self, path: str) -> pn.Row:
        return pn.Row(self._boxes[path], self._rows[path], **WIDE)

    def _add(self, path: str, *, is_chosen: bool) -> None:
        margin = (10, 6, 0, 0)
        box = pn.widgets.Checkbox(value=is_chosen, width=20, margin=margin)
        box.param.watch(self._on_change, "value")
        self._boxes[path] = box
        self._rows[path] = _text()

    def _is_chosen(self, path: str) -> bool:
        return path in self._boxes and bool(self._boxes[path].value)

    def _find_listed(self) -> list[str]:
        """Returns those chosen, and the newest of those with the wanted part in their name."""
        run_folder = self._run_folder
        runs = run_folder.runs
        part = str(self._part.value or "").lower()
        found = []
        for path, run in runs.items():
            if part in run.name.lower() or part in path.lower():
                found.append(path)
        if len(found) > MAX_LISTED:
            found = run_folder.newest(MAX_LISTED, found)
        newest = set(found)
        # In the order of the runs, so that rows keep their places.
        return [path for path in runs if path in newest or self._is_chosen(path)]


class Session:
    """The page of one browser; it looks for what is new as long as the browser shows it.

    Args:
      run_folder: the runs, shared by all browsers.

    Attributes:
      page: to be served.
    """

    def __init__(self, run_folder: RunFolder):
        self._run_folder = run_folder
        run_folder.poll()
        self._heading = _text()
        self._constants = _text()
        self._report = _text()
        self._runs = RunList(run_folder, self._show)
        options = {name: axis for axis, name in NAMES.items()}
        self._axis = pn.widgets.RadioBoxGroup(options=options, value="steps", **_choice("Over"))
        self._of = pn.widgets.RadioBoxGroup(**_choice("Of"))
        self._curves = pn.Column(styles=GRID, **WIDE)
        self._load = pn.Column(**WIDE)
        self._tabs = self._new_tabs()
        self._plots: list[CurvePlot] = []
        self._drawn: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self._show()
        # Watched only now: what the first look sets is no choice of the user.
        self._axis.param.watch(self._show, "value")
        self._of.param.watch(self._show, "value")
        self._tabs.param.watch(self._show, "active")
        self.page = pn.Column(self._heading, self._runs.page, self._tabs, **WIDE)
        if pn.state.curdoc is not None:  # a browser has asked for the page
            self._serve(pn.state)

    def _serve(self, state: Any) -> None:
        """Puts the page into the frame of moejax, and looks for what is new from now on."""
        templates = pn.io.resources.BASE_TEMPLATE.environment
        state.curdoc.template = templates.from_string(styles.PAGE)
        state.add_periodic_callback(self._poll, period=EVERY_MS)
        state.add_periodic_callback(self._catch_up, period=CATCH_UP_MS)

    @property
    def _open_tab(self) -> str:
        return TABS[self._tabs.active]

    def _new_tabs(self) -> pn.Tabs:
        contents = (
            pn.Column(self._axis, self._curves, self._constants, **WIDE),
            self._load,
            pn.Column(self._of, self._report, **WIDE),
        )
        return pn.Tabs(
            *zip(TABS, contents, strict=True),
            stylesheets=[styles.TABS_STYLE],
            sizing_mode="stretch_width",
            margin=(14, 0, 0, 0),
        )

    def _poll(self) -> None:
        self._run_folder.poll()
        self._show()

    def _catch_up(self) -> None:
        """Reads on in a long run, a part at a time, so that the page answers in between."""
        if self._run_folder.is_behind:
            self._run_folder.poll()

    def _show(self, *_: Any) -> None:
        """Sends the browser what differs from what it was sent."""
        run_folder = self._run_folder
        heading = page.heading(
            run_folder.folder,
            len(run_folder.runs),
            run_folder.links,
            is_behind=run_folder.is_behind,
        )
        _set(self._heading, heading)
        self._runs.show()
        chosen = self._runs.chosen
        versions = {name: run.version for name, run in chosen.items()}
        changed = [name for name in versions if versions[name] != self._versions.get(name)]
        self._versions = versions
        self._show_curves(chosen, changed)
        self._show_load(chosen)
        self._show_report(chosen)

    def _show_curves(self, runs: dict[str, LiveRun], changed: list[str]) -> None:
        axis = self._axis.value
        charts = charts_of(runs.values())
        values = {chart.title: constant(chart, runs) for chart in charts}
        signatures = [signature(chart, runs) for chart in charts]
        wanted = (axis, charts, values, signatures)
        if self._drawn.get("curves") == wanted:
            # The curves are the same, so only their points are sent.
            for plot in self._plots:
                plot.update(changed)
            return
        self._drawn["curves"] = wanted
        self._plots = []
        cells: list[pn.viewable.Viewable] = []
        constants: list[tuple[Chart, float]] = []
        for chart in charts:
            value = values[chart.title]
            if value is not None:
                constants.append((chart, value))
                continue
            curves = CurvePlot(chart, runs, axis)
            if curves.plot is not None:
                self._plots.append(curves)
                text = page.chart_text(chart, curves.caption)
                cells.append(_cell(text, curves.plot, styles.PLOT_STYLE))
        self._curves.objects = cells or [_note(NO_CURVE)]
        _set(self._constants, page.constants(constants))

    def _show_load(self, runs: dict[str, LiveRun]) -> None:
        if self._open_tab != "Load":
            return
        wanted = [(name, run.version) for name, run in runs.items()]
        if self._drawn.get("load") == wanted:
            return
        self._drawn["load"] = wanted
        cells = [_load_of(run) for run in runs.values()]
        self._load.objects = cells or [_note(NO_RUN)]

    def _show_report(self, runs: dict[str, LiveRun]) -> None:
        self._offer_reports_of(runs)
        if self._open_tab != "Report":
            return
        path = self._of.value
        run = runs.get(path)
        wanted = (path, _written(run))
        if self._drawn.get("report") == wanted:
            return
        self._drawn["report"] = wanted
        content = page.report_frame(run) if run else html.paragraph(NO_RUN)
        _set(self._report, content)

    def _offer_reports_of(self, runs: dict[str, LiveRun]) -> None:
        """Lets the user choose among the reports of these runs; keeps the choice if it can."""
        options = {run.name: path for path, run in runs.items()}
        if options == self._of.options:
            return
        self._of.options = options
        if self._of.value not in runs:
            self._of.value = next(iter(runs), None)


WIDE: dict[str, Any] = {"sizing_mode": "stretch_width", "margin": 0}


def _text(content: str = "") -> pn.pane.HTML:
    # Plain text, which Panel escapes for the transport: `Markup` would escape that again.
    return pn.pane.HTML(
        str(content), stylesheets=[styles.TEXT_STYLE], sizing_mode="stretch_width", margin=(4, 0)
    )


def _note(text: str) -> pn.pane.HTML:
    """Returns a line in place of what there is nothing of."""
    return _text(html.paragraph(text))


def _choice(title: str) -> dict[str, Any]:
    """Returns the arguments of buttons in a line after a title."""
    return {
        "inline": True,
        "sizing_mode": "stretch_width",
        "margin": (4, 0),
        "stylesheets": [styles.choice_style(title)],
    }


def _set(pane: pn.pane.HTML, content: str) -> None:
    """Sends a pane's content to the browser if it differs from what was sent."""
    if pane.object != content:
        pane.object = str(content)


def _cell(text: str, plot: Any, style: str) -> pn.Column:
    plot.stylesheets = [style]
    return pn.Column(_text(text), pn.pane.Bokeh(plot, **WIDE), **WIDE)


def _load_of(run: LiveRun) -> pn.viewable.Viewable:
    """Returns the heat map of the last logged interval, or why there is none."""
    try:
        check_folder(run.workdir, FOLDER)
        routing = None if run.run is None else run.run.reload().routing
        if routing is None or not routing.num_entries:
            is_dense = run.run is not None and not run.num_experts
            reason = "it is a dense run" if is_dense else "none is logged yet"
            text = page.section_text(run.name, f"No load: {reason}.")
            return _text(text)
        counts_1NE = routing.read("counts", -1)
    except (ValueError, OSError) as error:
        text = page.section_text(run.name) + page.problem(str(error))
        return _text(text)
    reading = (
        f"Load over uniform load in the interval that ended with step {routing.steps[-1]:,}. White "
        "is uniform, red is overloaded, blue is underused, black got no token at all."
    )
    layers = routing.layers.tolist()
    plot = load_plot(counts_1NE[0], layers)
    text = page.section_text(run.name, reading)
    return _cell(text, plot, styles.LOAD_STYLE)


def _written(run: LiveRun | None) -> Any:
    """Returns what changes when the run's report does."""
    if run is None:
        return None
    try:
        info = (run.workdir / page.REPORT).stat()
    except OSError:
        return None
    return (info.st_ino, info.st_size, info.st_mtime_ns)
