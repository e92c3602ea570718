"""Which files `data.files` names: a file, a folder, a glob, or several of them with commas between."""

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
from moejax.data.errors import DataError

Kind: TypeAlias = Literal["text", "lines", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
}
"""By suffix; files of any other are one text each."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SNIFFED_BYTES = 8192  # a file with a zero byte among them is no text: the rule of git
READ_BYTES = 1 << 20

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file that holds documents.

    Attributes:
      path: of it.
      kind: one text; JSON objects, one a line; or Parquet.
      compression: "gzip", "zstd" or "".
      domain: the first folder on its way from the folder that `data.files` names; "" if it is
        directly in that.
    """

    path: Path
    kind: Kind
    compression: str
    domain: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffixes of kind and compression."""
        name = self.path.name.removesuffix(self.path.suffix) if self.compression else self.path.name
        return Path(name).stem

    def open(self) -> BinaryIO:
        """What is in it, decompressed, as a stream.

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
    """That a file of `data.files` cannot be read."""
    reason = (
        getattr(error, "strerror", None)
        or next(iter(str(error).splitlines()), type(error).__name__)[:200]
    )
    return DataError(f"{path} cannot be read ({reason}); leave it out of data.files or repair it")


def find_text_files(files: str) -> list[TextFile]:
    """The files that `data.files` names, each once, sorted by path.

    What exists by the whole text is meant first, so that a name may hold commas and the
    signs of globs.

    Raises:
      ConfigError: a part of it names no file.
    """
    whole = os.path.expanduser(files)
    items = (
        [files]
        if os.path.exists(whole)
        else [item.strip() for item in files.split(",") if item.strip()]
    )
    found: dict[str, TextFile] = {}
    for item in items:
        for file in _files_of(item):
            found.setdefault(os.path.realpath(file.path), file)
    if not found:
        raise ConfigError(
            f"data.files={files!r} names no file; give a file, a folder or a glob such as 'texts/*.txt'"
        )
    return sorted(found.values(), key=lambda file: file.path)


def _files_of(item: str) -> list[TextFile]:
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
            f"data.files={item!r} matches no file{where}; give a file, a folder, a glob such as 'texts/**/*.txt', or "
            "several of them with commas between"
        )
    return found


def _describe(path: Path, domain: str = "") -> TextFile:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    if compression:
        suffixes = suffixes[:-1]
    return TextFile(
        path, KINDS.get(suffixes[-1], "text") if suffixes else "text", compression, domain
    )


def _files_below(folder: Path) -> list[TextFile]:
    """The files with text below a folder; hidden ones and those that are no text are left out."""
    found, others = [], []
    for path in _walk(folder):
        if not os.path.exists(path):
            raise DataError(f"{path} is a link to a file that is not there; remove it or repair it")
        if not path.is_file():  # a pipe or a device
            others.append(path)
            continue
        below = path.relative_to(folder).parts
        file = _describe(path, domain=below[0] if len(below) > 1 else "")
        if file.kind == "text" and not _is_text(file):
            others.append(path)
        else:
            found.append(file)
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
    """What is below a folder, also through links, but for hidden names; raises `DataError` for what cannot be read."""

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            place = os.path.realpath(os.path.join(parent, name))
            if (
                place in seen
            ):  # a link to a folder that is read anyway, perhaps to one that it is in
                folders.remove(name)
            seen.add(place)
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _is_text(file: TextFile) -> bool:
    with file.open() as stream:
        try:
            return b"\0" not in stream.read(SNIFFED_BYTES)
        except OSError as error:
            raise unreadable(file.path, error) from error
