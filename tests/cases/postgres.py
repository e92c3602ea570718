"""A PostgreSQL server for one test, with a temporary folder and socket, and without a port."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

LOCALE = ("--encoding=UTF8", "--locale=C")


def postgres_programs():
    """Returns the folder of initdb and pg_ctl, of the newest version; None if there is none."""
    of_debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    by_version = sorted(of_debian, key=lambda path: int(path.parts[-3]))
    found = shutil.which("initdb") or (by_version[-1] if by_version else None)
    return Path(found).resolve().parent if found else None


def _account():
    """Returns arguments of `subprocess.run` that name a user whom PostgreSQL accepts.

    It refuses root. Another user needs no arguments; skips where there is no user postgres.
    """
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def postgres_server():
    """Runs a server; yields its SQLAlchemy URL. Skips where PostgreSQL cannot run."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    account = _account()
    # In /tmp, since the path of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="moejax-pg-", dir="/tmp"))
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
        call("initdb", "--username=moejax", "--auth=trust", "--no-sync", *LOCALE)
        call("pg_ctl", "-w", "-l", folder / "server.log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://moejax@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
