"""Folders that appear complete or not at all."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from moejax.data.errors import DataError


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` that takes its name when the body succeeds, and is removed otherwise.

    If another process made `folder` first, its result is kept: equal names hold equal contents.

    Raises:
      DataError: the temporary folder cannot be made.
    """
    temporary = folder.with_name(f"{folder.name}.incomplete-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{temporary} cannot be made ({error.strerror}); choose another data.directory") from error
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
