"""Write a run's report.html: one self-contained page, from the run directory alone.

moejax report --workdir=runs/tiny_moe
"""

from absl.flags import FlagValues

from moejax.cli.options import define_workdir, read_workdir, refuse_several_processes
from moejax.inspection.build import build_report


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Writes the page and prints its path."""
    refuse_several_processes("report")
    print(build_report(read_workdir(values)))
