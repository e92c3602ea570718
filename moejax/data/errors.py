"""Errors about data on disk, rather than about the configuration."""

from pathlib import Path

MAX_REASON_CHARACTERS = 200


class DataError(ValueError):
    """Data that is missing, corrupt or unreadable: one line that names the file and the remedy."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has no message."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:MAX_REASON_CHARACTERS]


def os_reason(error: Exception) -> str:
    """Returns why a file operation failed: "No space left on device", not the path with it."""
    return getattr(error, "strerror", None) or first_line(error)


def prepare_again(folder: Path) -> str:
    """Returns the remedy for a damaged folder of prepared data."""
    return f"remove the folder {folder} and run the command again, which prepares it"
