"""What is said of files of a run that cannot be read."""

from pathlib import Path


class RunError(ValueError):
    """A run directory that cannot be read: the message names the file and the remedy."""


def missing_file(path: Path) -> RunError:
    """Returns the error for a file that is not there."""
    return RunError(f"{path} is missing; `moejax train` writes it, so give the --workdir of a run")


def unreadable_file(path: Path, error: OSError) -> RunError:
    """Returns the error for a file that is there and cannot be read.

    Nothing says that it is damaged, so that no remedy may delete or replace it.
    """
    return RunError(
        f"{path} cannot be read ({error.strerror}); "
        "see who may read it, and whether its disk is working"
    )
