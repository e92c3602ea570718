"""From a sweep's directory to its page."""

from pathlib import Path

from moejax.inspection.report.page import write_page
from moejax.paths import resolve_path
from moejax.sweeps.report.page import build_sweep_page
from moejax.sweeps.store.directory import join_records
from moejax.sweeps.store.fair_rates import read_rates
from moejax.sweeps.store.records import read_definition
from moejax.sweeps.tables import frame_of

FILE_NAME = "report.html"


def build_sweep_report(directory: str | Path) -> Path:
    """Joins the rows of all arms that have ended, and writes `report.html` of the sweep.

    Raises:
      RecordError: `sweep.json` or a row is missing or damaged, or a file is a link out of
        the directory.
      LockedError: the directory cannot be written.
    """
    directory = resolve_path(directory)
    read_definition(directory)  # before anything is written there
    rows = join_records(directory)
    return write_page(
        directory / FILE_NAME,
        build_sweep_page(
            frame_of(rows), read_definition(directory), directory.name, read_rates(directory)
        ),
    )
