"""Show the runs below a folder in a browser, live: curves, expert load and reports.

moejax view --workdir=runs

The address that is printed has a token, without which nothing of a run is shown: open all of it.
The page is served to this machine alone, until Ctrl-C. From elsewhere: ssh -L 8080:127.0.0.1:8080
HOST, and here --port=8080.
"""

from absl import flags
from absl.flags import FlagValues

from moejax.cli.options import define_workdir, read_workdir, refuse_several_processes


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values, "a run directory, or a folder of them")
    flags.DEFINE_integer(
        "port",
        0,
        "to serve at; 0 takes a free one",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Serves the page, whose address is printed, until it is interrupted."""
    from moejax.inspection.viewer.server import serve  # its plots take a second to import

    refuse_several_processes("view")
    serve(read_workdir(values), values.port, started=lambda url: print(url, flush=True))
