"""Reading files of folders of unknown origin, without following links and without blocking."""

import errno
import os
import stat
from pathlib import Path

# O_NONBLOCK: opening a named pipe must not wait for its other end.
READ_REGULAR = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_regular(path: Path) -> int:
    """Returns a descriptor of an ordinary file, open for reading.

    Raises:
      OSError: there is no such file, or it is a symbolic link, a folder, a named pipe or a device.
    """
    descriptor = os.open(path, READ_REGULAR)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
    return descriptor


def read_regular(path: Path) -> bytes:
    """Returns the bytes of an ordinary file; see `open_regular`."""
    with open(open_regular(path), "rb") as file:
        return file.read()


def regular_size(path: Path) -> int | None:
    """Returns the size of an ordinary file in bytes; None if there is no such file, or a link."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
