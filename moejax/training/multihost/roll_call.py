"""All processes of a run are called before they begin: who is missing, comes twice, or runs something else.

Process 0 listens at the coordinator's address; every other process tells it there who it is and
what it runs. Process 0 answers all of them alike: begin, or what is wrong. Only then does jax's own
service start at the same port, which would wait in silence for a process that never comes, and does
not compare anything.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import moejax
from moejax.training.run_directory.numerics import numerics

MAX_LINE_BYTES = 16384
ANSWER_S = 5.0
"""How long a connected process may take to say who it is."""

RETRY_S = 0.2

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RollCallError(RuntimeError):
    """The processes cannot begin: the message says which is missing or differs."""


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a process says of itself.

    Attributes:
      process: its number, from 0.
      of: how many it was told there are.
      host: its machine.
      runs: what must be equal in all processes, by name: versions, the digest of moejax's files,
        jax's settings.
    """

    process: int
    of: int
    host: str
    runs: dict[str, str]

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def call_roll(
    coordinator: str, num_processes: int, process_id: int, wait_s: float
) -> dict[str, socket.socket]:
    """Waits until all processes have come and run the same.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      wait_s: how long to wait for the others.

    Returns:
      Open connections by the name of the process at the other end: of process 0 to all others, of
      each other to process 0.

    Raises:
      RollCallError: a process is missing, comes twice, or runs something else; or the address
        cannot be used.
    """
    host, _, port = coordinator.rpartition(":")
    hello = Hello(process_id, num_processes, socket.gethostname(), what_runs())
    if process_id == 0:
        return _listen(int(port), hello, wait_s)
    return {"process 0": _report(host.strip("[]"), int(port), hello, wait_s)}


def _listen(port: int, own: Hello, wait_s: float) -> dict[str, socket.socket]:
    """Process 0: hears the others, answers all of them, and returns its connections to them."""
    heard: dict[int, tuple[Hello, socket.socket]] = {}
    with contextlib.ExitStack() as stack:
        server = _server(port)
        stack.callback(server.close)
        end = time.monotonic() + wait_s
        problem = ""
        while not problem and len(heard) < own.of - 1:
            connection = _accept(server, end)
            if connection is None:
                problem = _missing(own, set(heard), wait_s)
                break
            said = _hear(connection)
            if said is None:  # a port scanner, or a connection that broke: it is no process of ours
                connection.close()
                continue
            stack.callback(connection.close)
            first = heard.get(said.process, (None, None))[0]
            problem = _difference(own, said, first)
            heard[said.process if said.process not in heard else -len(heard)] = said, connection
        for _, connection in heard.values():
            with contextlib.suppress(OSError):  # it has left by itself
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        if problem:
            raise RollCallError(problem)
        stack.pop_all()
        server.close()
    return {str(said): connection for said, connection in heard.values()}


def _server(port: int) -> socket.socket:
    try:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        raise RollCallError(
            f"process 0 cannot listen at port {port} of {socket.gethostname()} ({error.strerror}); another program or "
            "another process 0 uses it: choose another port in --coordinator"
        ) from error


def _accept(server: socket.socket, end: float) -> socket.socket | None:
    """The next connection; None if none comes until `end`."""
    server.settimeout(max(end - time.monotonic(), 0.001))
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    connection.settimeout(ANSWER_S)
    return connection


def _hear(connection: socket.socket) -> Hello | None:
    """What the other end says of itself; None if it is no process of moejax."""
    try:
        said = json.loads(_read_line(connection))
        runs = {str(name): str(value) for name, value in said["runs"].items()}
        return Hello(int(said["process"]), int(said["of"]), str(said["host"]), runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        part = connection.recv(MAX_LINE_BYTES)
        if not part:
            break
        line += part
    return line


def _missing(own: Hello, heard: set[int], wait_s: float) -> str:
    absent = [str(number) for number in range(1, own.of) if number not in heard]
    names = f"process {absent[0]}" if len(absent) == 1 else f"processes {', '.join(absent)}"
    return (
        f"{names} of {own.of} did not come to process 0 on {own.host} within {wait_s:g} s; start all {own.of} with the "
        "same --coordinator and --num_processes, or wait longer with --wait_s"
    )


def _difference(own: Hello, said: Hello, first: Hello | None) -> str:
    """What is wrong with a process that has come; empty if nothing is."""
    if said.of != own.of:
        return (
            f"{said} was started with --num_processes={said.of}, and {own} with {own.of}; give all processes the same "
            "number"
        )
    if not 0 < said.process < own.of:
        return f"{said} has a number that is not between 1 and {own.of - 1}; give each process its own --process_id"
    if first is not None:
        return f"{said} came twice, the first time from {first.host}; give each process its own --process_id"
    for name in sorted(own.runs.keys() | said.runs.keys()):
        mine, theirs = own.runs.get(name, "nothing"), said.runs.get(name, "nothing")
        if mine != theirs:
            return f"{said} runs {name} {theirs}, and {own} runs {mine}; all processes must run the same"
    return ""


def _report(host: str, port: int, hello: Hello, wait_s: float) -> socket.socket:
    """Another process: tells process 0 who it is, takes its answer, and returns its connection."""
    end = time.monotonic() + wait_s
    where = f"process 0 did not answer at {host}:{port} within {wait_s:g} s"
    reason = "nothing was heard"
    while time.monotonic() < end:
        problem = None
        with contextlib.ExitStack() as stack:
            try:
                address = (host, port)
                connection = socket.create_connection(
                    address, timeout=max(end - time.monotonic(), 0.001)
                )
                stack.callback(connection.close)
                connection.sendall(json.dumps(dataclasses.asdict(hello)).encode() + b"\n")
                # Process 0 answers once it has heard all: it gives up first, and says who
                # is missing.
                connection.settimeout(wait_s + ANSWER_S)
                answer = _read_line(connection)
                problem = json.loads(answer)["problem"] if answer else None
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if problem == "":
                stack.pop_all()
                return connection
        if problem:
            raise RollCallError(problem)
        time.sleep(RETRY_S)
    raise RollCallError(
        f"{where} to {hello} ({reason}); start it with --process_id=0 on that host, check --coordinator, or wait "
        "longer with --wait_s"
    )


def what_runs() -> dict[str, str]:
    """What must be equal in all processes of a run."""
    versions = {package: _version(package) for package in PACKAGES}
    settings = {name: str(value) for name, value in numerics().items()}
    return {"moejax": f"{moejax.__version__} (files {_source_digest()})"} | versions | settings


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _source_digest() -> str:
    """Of all of moejax's files: a version number does not change with each edit."""
    digest = hashlib.sha256()
    for path, name in _source_files():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _source_files() -> Iterator[tuple[Path, str]]:
    root = Path(moejax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        yield path, path.relative_to(root).as_posix()
