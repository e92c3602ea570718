"""Write a run's report.html, or the comparison of several runs, as one self-contained page.

  moejax report --workdir=runs/tiny_moe
  moejax report runs/tiny_moe runs/tiny_dense --output=moe_and_dense.html

Nothing but run directories is needed. One, given either way, gets its report.html. From 2 to 16
give one page that compares them, by default comparison.html in the folder that holds the first.
"""

from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import (
    define_text,
    define_workdir,
    read_file_to_write,
    read_text_places,
    read_workdir_to_write,
    refuse_several_processes,
)
from moejax.cli.printable import printable
from moejax.inspection.report.build import build_report
from moejax.inspection.report.comparison_page import FILE_NAME, write_comparison
from moejax.paths import resolve_path


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb; they may follow run directories."""
    values.set_gnu_getopt(True)
    define_workdir(values, "the run directory, of one run")
    define_text(values)
    flags.DEFINE_string("output", "", "where to write a comparison, FILE.html", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Writes the page and prints its path."""
    refuse_several_processes("report")
    if rest and values.workdir:
        raise UsageError(
            f"--workdir={values.workdir} and {' '.join(rest)} are given; name run directories one "
            "way"
        )
    path = _compare(values, rest) if len(rest) > 1 else _report(values, rest)
    print(printable(str(path)))


def _report(values: FlagValues, workdirs: list[str]) -> Path:
    """Writes the page of one run."""
    if values.output:
        raise UsageError(
            f"--output={values.output} is for comparisons; give two or more run directories"
        )
    if workdirs:
        values["workdir"].value = workdirs[0]
    return build_report(read_workdir_to_write(values), read_text_places(values))


def _compare(values: FlagValues, workdirs: list[str]) -> Path:
    """Writes the page of several runs; says first what cannot be read or written."""
    if said := read_text_places(values).said():
        leaf, place = next(iter(said.items()))
        raise UsageError(
            f"--data.{leaf}={place} is for the report of one run; a comparison reads no text"
        )
    folders = [resolve_path(workdir) for workdir in workdirs]
    for workdir, folder in zip(workdirs, folders, strict=True):
        if not folder.is_dir():
            raise UsageError(
                f"{workdir} is not a folder; name run directories, or see moejax report --help"
            )
    output = values.output or str(folders[0].parent / FILE_NAME)
    return write_comparison(folders, read_file_to_write(output, "--output"))
