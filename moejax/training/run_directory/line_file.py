"""Files of one JSON object per line, which a run appends to.

A checkpoint notes the size of such a file and a digest of it. A continued run compares them:
history that was lost or changed is reported in one line, and the run goes on, since nothing that it
computes depends on it.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moejax.paths import replace_file

DIGEST_BYTES = 16

log = logging.getLogger("moejax")


class LineFileError(ValueError):
    """A file of a run that cannot be read or written: the message names it and the remedy."""


class LineFile:
    """A file of lines, open for appending.

    Args:
      path: of the file, in the run directory.
      after_step: lines of later steps are dropped: a continued run writes them again.
      noted: `state` of the file when the run was at that step, from the checkpoint; None if it
        is not known.
      is_line: whether an object is a line of this file.

    Attributes:
      lines: what was kept of it when it was opened.

    Raises:
      LineFileError: the file cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        after_step: int,
        noted: Mapping[str, Any] | None,
        is_line: Callable[[Any], bool],
    ):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._num_damaged = 0
        self._file: BinaryIO | None = None  # opened when there is a line to write
        try:
            content = path.read_bytes() if path.exists() else b""
            kept = self._keep(content, after_step, is_line)
            if path.exists():
                replace_file(path, kept)
        except OSError as error:
            raise LineFileError(
                f"{path} cannot be read and written ({error.strerror}); give this user the rights "
                "to it, or move it away to go on without its history"
            ) from error
        self._num_bytes = len(kept)
        self._hash = hashlib.blake2b(kept, digest_size=DIGEST_BYTES)
        is_changed = noted is not None and not _is_kept_as_noted(kept, noted, after_step)
        if self._num_damaged or is_changed:
            log.warning(
                "%s is not what was written up to step %d: a part of its history is lost or "
                "damaged; the run goes on from its checkpoint",
                path,
                after_step,
            )

    @property
    def state(self) -> dict[str, Any]:
        """The size of what was written, and a digest of it, as JSON."""
        return _state(self._num_bytes, self._hash)

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line; it is in the file on return.

        Raises:
          LineFileError: the file cannot be written.
        """
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                self._file = self.path.open("ab")
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise LineFileError(
                f"{self.path} cannot be written ({error.strerror}); make room there, and run the "
                "command again"
            ) from error
        self._num_bytes += len(text)
        self._hash.update(text)

    def close(self) -> None:
        """Closes the file."""
        if self._file is None:
            return
        file = self._file
        self._file = None
        # A line that could not be written was reported then.
        with contextlib.suppress(OSError):
            file.close()

    def _keep(self, content: bytes, after_step: int, is_line: Callable[[Any], bool]) -> bytes:
        """Returns the bytes of the lines up to a step, without damaged ones."""
        kept = []
        for line in read_lines(io.BytesIO(content)):
            values = line.values
            if values is None or not is_line(values):
                self._num_damaged += 1
            elif values["step"] <= after_step:
                kept.append(line.text)
                self.lines.append(values)
        return b"".join(kept)


def _is_kept_as_noted(kept: bytes, noted: Mapping[str, Any], after_step: int) -> bool:
    """Whether a file begins with what was noted and holds only lines of the last step after it.

    Lines of the last step were written after its checkpoint was saved.
    """
    if not _begins_as_noted(kept, noted):
        return False
    later = io.BytesIO(kept[noted["bytes"] :])
    steps = {line.values["step"] for line in read_lines(later) if line.values is not None}
    return steps <= {after_step}


def _state(num_bytes: int, digest: "hashlib.blake2b") -> dict[str, Any]:
    return {"bytes": num_bytes, "digest": digest.hexdigest()}


def is_as_noted(path: Path, noted: Any) -> bool:
    """Whether a file still begins with the bytes whose `LineFile.state` was noted.

    Args:
      path: of the file.
      noted: from a checkpoint, which may have been made elsewhere: any JSON value.
    """
    return _begins_as_noted(path.read_bytes(), noted)


def _begins_as_noted(content: bytes, noted: Any) -> bool:
    num_bytes = noted.get("bytes") if isinstance(noted, dict) else None
    if type(num_bytes) is not int or num_bytes < 0:
        return False
    beginning = content[:num_bytes]
    digest = hashlib.blake2b(beginning, digest_size=DIGEST_BYTES)
    return _state(len(beginning), digest) == noted


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      number: from 1.
      end: how many bytes of the file there are up to its end.
      text: its bytes, with a line break at the end.
      values: its JSON object, which has an integer `step`; None if it is damaged.
      fault: what is wrong with it; empty if nothing is.
    """

    number: int
    end: int
    text: bytes
    values: dict[str, Any] | None
    fault: str


def read_lines(texts: Iterable[bytes]) -> Iterator[Line]:
    """Yields the lines of a file, except empty ones and a last one that a crash has cut off.

    That is one without a line break that is not JSON. No beginning of a JSON object is JSON itself,
    so that a line of which only the line break is missing is known to be complete.

    Args:
      texts: what an open file yields.
    """
    end = 0
    for number, text in enumerate(texts, start=1):
        end += len(text)
        if not text.strip():
            continue
        has_break = text.endswith(b"\n")
        if not has_break:
            text += b"\n"
        try:
            values = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            if has_break:
                yield Line(number, end, text, None, str(error))
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            yield Line(number, end, text, values, "")
        else:
            yield Line(number, end, text, None, "not a JSON object with an integer `step`")
