"""Which files `data.files` names: a file, a folder, a glob, or several separated by commas."""

import dataclasses
import glob
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, cast

from moejax.config import ConfigError
from moejax.data.errors import DataError, os_reason

Kind: TypeAlias = Literal["text", "lines", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
}
"""Kinds of files by suffix; a file with any other suffix is one text."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SNIFFED_BYTES = 8192  # a file with a zero byte among them is no text: the rule of git
READ_BYTES = 1 << 20

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file that holds documents.

    Attributes:
      path: where it is.
      kind: one text; JSON objects, one a line; or Parquet.
      compression: "gzip", "zstd" or "".
      domain: the first folder on the way from the folder that `data.files` names; "" if the file is
        directly in that.
    """

    path: Path
    kind: Kind
    compression: str
    domain: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffixes of kind and compression."""
        name = self.path.name
        if self.compression:
            name = name.removesuffix(self.path.suffix)
        return Path(name).stem

    def open(self) -> BinaryIO:
        """Returns its content, decompressed, as a stream.

        Raises:
          DataError: it cannot be read. Reading the stream raises OSError for damage.
        """
        try:
            if not self.compression:
                return self.path.open("rb", buffering=READ_BYTES)
            import pyarrow

            compressed = pyarrow.input_stream(
                str(self.path), compression=self.compression, buffer_size=READ_BYTES
            )
            return cast(BinaryIO, io.BufferedReader(compressed, READ_BYTES))
        except OSError as error:
            raise unreadable(self.path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """Returns the error for a file of `data.files` that cannot be read."""
    return DataError(
        f"{path} cannot be read ({os_reason(error)}); leave it out of data.files or repair it"
    )


def find_text_files(files: str) -> list[TextFile]:
    """Returns the files that `data.files` names, each once, sorted by path.

    If the complete text is an existing path, it is taken as that, so that a name may hold commas
    and the signs of globs.

    Raises:
      ConfigError: a part of it names no file.
    """
    found: dict[str, TextFile] = {}
    for item in _items(files):
        for file in _files_of(item):
            found.setdefault(os.path.realpath(file.path), file)
    if not found:
        raise ConfigError(
            f"data.files={files!r} names no file; give a file, a folder or a glob such as "
            "'texts/*.txt'"
        )
    return sorted(found.values(), key=lambda file: file.path)


def _items(files: str) -> list[str]:
    """Returns the files, folders and globs that a text names, separated by commas."""
    path = os.path.expanduser(files)
    if os.path.exists(path):
        return [files]
    items = [item.strip() for item in files.split(",")]
    return [item for item in items if item]


def _files_of(item: str) -> list[TextFile]:
    """Returns the files that one file name, folder or glob stands for."""
    if re.match(r"[A-Za-z0-9]+://", item):
        raise ConfigError(
            f"data.files={item!r} is an address; copy the files to a disk and name them there"
        )
    path = Path(os.path.expanduser(item))
    if path.is_file():
        return [_describe(path)]
    if path.is_dir():
        return _files_below(path)
    names = glob.glob(str(path), recursive=True)
    found = [_describe(Path(name)) for name in names if os.path.isfile(name)]
    if not found:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"data.files={item!r} matches no file{where}; give a file, a folder, a glob such as "
            "'texts/**/*.txt', or several of them separated by commas"
        )
    return found


def _describe(path: Path, domain: str = "") -> TextFile:
    """Returns a file with the kind and the compression that its suffixes tell."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    compression = COMPRESSIONS.get(last, "")
    if compression:
        suffixes.pop()
        last = suffixes[-1] if suffixes else ""
    kind: Kind = KINDS.get(last, "text")
    return TextFile(path, kind, compression, domain)


def _files_below(folder: Path) -> list[TextFile]:
    """Returns the files with text below a folder; hidden ones and other files are left out."""
    found = []
    others = []
    for path in _walk(folder):
        if not os.path.exists(path):
            raise DataError(f"{path} is a link to a file that is not there; remove it or repair it")
        top, *below = path.relative_to(folder).parts
        file = _describe(path, domain=top if below else "")
        if _holds_text(file):
            found.append(file)
        else:
            others.append(path)
    if others:
        log.info(
            "data.files=%s: left out %d files that are no text, such as %s",
            folder,
            len(others),
            others[0],
        )
    if not found:
        raise ConfigError(
            f"data.files={str(folder)!r} is a folder without a file of text; name another"
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Yields what is below a folder except for hidden names; links are followed.

    Raises:
      DataError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        visible = [name for name in folders if not name.startswith(".")]
        folders.clear()  # `os.walk` goes on with what is put back
        for name in sorted(visible):
            place = os.path.realpath(os.path.join(parent, name))
            # A link may lead to a folder that is read anyway, even to one that it is in.
            if place not in seen:
                folders.append(name)
            seen.add(place)
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


def _holds_text(file: TextFile) -> bool:
    """Whether it is a file of a known kind, or one whose first bytes are text."""
    if not file.path.is_file():  # a pipe or a device
        return False
    if file.kind != "text":
        return True
    with file.open() as stream:
        try:
            return b"\0" not in stream.read(SNIFFED_BYTES)
        except OSError as error:
            raise unreadable(file.path, error) from error
