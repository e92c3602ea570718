"""Reading files of folders that may come from elsewhere: links are not followed, nothing is waited for."""

import errno
import os
import stat
from pathlib import Path


def open_regular(path: Path) -> int:
    """A descriptor of an ordinary file, to read from.

    Raises:
      OSError: there is none; also for a symbolic link, a folder, a named pipe, a device.
    """
    # O_NONBLOCK: opening a named pipe must not wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
    return descriptor


def read_regular(path: Path) -> bytes:
    """The bytes of an ordinary file; see `open_regular`."""
    with open(open_regular(path), "rb") as file:
        return file.read()


def regular_size(path: Path) -> int | None:
    """The size of an ordinary file in bytes; None if there is none: links are not followed."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
