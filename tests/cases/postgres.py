"""A PostgreSQL server of a test's own: its folder and its socket are temporary, and no port is opened."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def postgres_programs():
    """The folder of initdb and pg_ctl, the newest where several are installed; None without."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    found = shutil.which("initdb") or (debian[-1] if debian else None)
    return Path(found).resolve().parent if found else None


@contextlib.contextmanager
def postgres_server():
    """Runs a server; yields its SQLAlchemy URL. Skips where PostgreSQL cannot run."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    account = {}
    if os.geteuid() == 0:  # the server refuses root
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder = Path(
        tempfile.mkdtemp(prefix="moejax-pg-", dir="/tmp")
    )  # short, as a socket's path must be
    if account:
        os.chown(folder, account["user"], account["group"])

    def call(program, *arguments):
        command = [programs / program, "-D", folder / "data", *arguments]
        with (folder / "log").open("a") as log:
            done = subprocess.run(
                command, cwd=folder, stdout=log, stderr=log, timeout=60, check=False, **account
            )
        if done.returncode:
            raise RuntimeError((folder / "log").read_text())

    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c max_connections=30 -F"
    try:
        call(
            "initdb",
            "--username=moejax",
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        )
        call("pg_ctl", "-w", "-l", folder / "server.log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://moejax@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
