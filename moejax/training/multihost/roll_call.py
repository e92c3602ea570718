"""The roll call before a run begins: is every process there, only once, and running the same code?

Process 0 listens at the coordinator's address; every other process tells it there who it is and
what it runs. Process 0 sends all of them the same answer: begin, or what is wrong. Only then does
jax's own service start at the same port. That service would wait without a message for a process
that never comes, and it compares nothing.
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
    """How a process introduces itself.

    Attributes:
      process: its number, from 0.
      of: the number of processes that it was started with.
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
    """Waits until all processes have connected, and compares what they run.

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
        return _answer_others(int(port), hello, wait_s)
    return {"process 0": _report(host.strip("[]"), int(port), hello, wait_s)}


def _answer_others(port: int, own: Hello, wait_s: float) -> dict[str, socket.socket]:
    """Listens to the others in process 0, answers all of them, and returns its connections."""
    with contextlib.ExitStack() as stack:
        server = _listen(port)
        stack.callback(server.close)
        connected, problem = _collect(server, own, wait_s, stack)
        answer = json.dumps({"problem": problem}).encode() + b"\n"
        for _, connection in connected:
            with contextlib.suppress(OSError):  # that process has ended by itself
                connection.sendall(answer)
        if problem:
            raise RollCallError(problem)
        stack.pop_all()
        server.close()
    return {str(hello): connection for hello, connection in connected}


def _collect(
    server: socket.socket, own: Hello, wait_s: float, stack: contextlib.ExitStack
) -> tuple[list[tuple[Hello, socket.socket]], str]:
    """Accepts the other processes until all are there, time is up, or one is wrong.

    Returns:
      The processes with their connections, which `stack` closes, and what is wrong; empty if
      nothing is.
    """
    connected: list[tuple[Hello, socket.socket]] = []
    by_process: dict[int, Hello] = {}
    end = time.monotonic() + wait_s
    while len(connected) < own.of - 1:
        connection = _accept(server, end)
        if connection is None:
            return connected, _missing(own, set(by_process), wait_s)
        hello = _read_hello(connection)
        if hello is None:  # a port scanner, or a connection that broke: not one of our processes
            connection.close()
            continue
        stack.callback(connection.close)
        problem = _difference(own, hello, by_process.get(hello.process))
        connected.append((hello, connection))
        by_process.setdefault(hello.process, hello)
        if problem:
            return connected, problem
    return connected, ""


def _listen(port: int) -> socket.socket:
    """Returns a socket that accepts connections at a port, over IPv6 too where the host has it."""
    try:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        host = socket.gethostname()
        raise RollCallError(
            f"process 0 cannot listen at port {port} of {host} ({error.strerror}); another program "
            "or another process 0 uses it: choose another port in --coordinator"
        ) from error


def _accept(server: socket.socket, end: float) -> socket.socket | None:
    """Returns the next connection; None if none comes before `end`."""
    server.settimeout(max(end - time.monotonic(), 0.001))
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    connection.settimeout(ANSWER_S)
    return connection


def _read_hello(connection: socket.socket) -> Hello | None:
    """Returns how the process at the other end introduces itself; None if it is not moejax's."""
    try:
        fields = json.loads(_read_line(connection))
        runs = {str(name): str(value) for name, value in fields["runs"].items()}
        process = int(fields["process"])
        num_processes = int(fields["of"])
        return Hello(process, num_processes, str(fields["host"]), runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read_line(connection: socket.socket) -> bytes:
    """Reads up to the end of a line, of the stream, or of what a line may hold."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        part = connection.recv(MAX_LINE_BYTES)
        if not part:
            break
        line += part
    return line


def _missing(own: Hello, connected: set[int], wait_s: float) -> str:
    """Names the processes that did not connect."""
    absent = [str(number) for number in range(1, own.of) if number not in connected]
    noun = "process" if len(absent) == 1 else "processes"
    return (
        f"{noun} {', '.join(absent)} of {own.of} did not come to process 0 on {own.host} within "
        f"{wait_s:g} s; start all {own.of} with the same --coordinator and --num_processes, or "
        "wait longer with --wait_s"
    )


def _difference(own: Hello, other: Hello, earlier: Hello | None) -> str:
    """Describes what is wrong with a process that has connected; empty if nothing is.

    Args:
      own: of process 0.
      other: of that process.
      earlier: of one that connected before under the same number.
    """
    if other.of != own.of:
        return (
            f"{other} was started with --num_processes={other.of}, and {own} with {own.of}; give "
            "all processes the same number"
        )
    if not 0 < other.process < own.of:
        return (
            f"{other} has a number that is not between 1 and {own.of - 1}; give each process its "
            "own --process_id"
        )
    if earlier is not None:
        return (
            f"{other} came twice, the first time from {earlier.host}; give each process its own "
            "--process_id"
        )
    for name in sorted(own.runs.keys() | other.runs.keys()):
        own_value = own.runs.get(name, "nothing")
        other_value = other.runs.get(name, "nothing")
        if own_value != other_value:
            return (
                f"{other} runs {name} {other_value}, and {own} runs {own_value}; all processes "
                "must run the same"
            )
    return ""


def _report(host: str, port: int, hello: Hello, wait_s: float) -> socket.socket:
    """Introduces this process to process 0 and returns the connection, once the answer is good.

    Raises:
      RollCallError: process 0 answers that something is wrong, or does not answer.
    """
    end = time.monotonic() + wait_s
    reason = "nothing was heard"
    while time.monotonic() < end:
        try:
            connection = _introduce(host, port, hello, end, wait_s)
            if connection is not None:
                return connection
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        time.sleep(RETRY_S)
    raise RollCallError(
        f"process 0 did not answer at {host}:{port} within {wait_s:g} s to {hello} ({reason}); "
        "start it with --process_id=0 on that host, check --coordinator, or wait longer with "
        "--wait_s"
    )


def _introduce(
    host: str, port: int, hello: Hello, end: float, wait_s: float
) -> socket.socket | None:
    """Connects to process 0 once and returns the connection if the answer is good.

    Returns:
      None if process 0 closed the connection without an answer.

    Raises:
      RollCallError: process 0 answers that something is wrong.
      OSError, ValueError, KeyError, TypeError: it cannot be reached, or the answer is not moejax's.
    """
    timeout = max(end - time.monotonic(), 0.001)
    with contextlib.ExitStack() as stack:
        connection = socket.create_connection((host, port), timeout=timeout)
        stack.callback(connection.close)
        connection.sendall(json.dumps(dataclasses.asdict(hello)).encode() + b"\n")
        # Process 0 answers once all have connected: it gives up first, and says which is missing.
        connection.settimeout(wait_s + ANSWER_S)
        answer = _read_line(connection)
        problem = json.loads(answer)["problem"] if answer else None
        if problem is None:
            return None
        if problem:
            raise RollCallError(problem)
        stack.pop_all()
    return connection


def what_runs() -> dict[str, str]:
    """Returns what must be equal in all processes of a run, by name."""
    runs = {"moejax": f"{moejax.__version__} (files {_source_digest()})"}
    for package in PACKAGES:
        runs[package] = _version(package)
    for setting, value in numerics().items():
        runs[setting] = str(value)
    return runs


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _source_digest() -> str:
    """Returns a digest of moejax's files: a version number does not change with each edit."""
    digest = hashlib.sha256()
    for path, name in _source_files():
        digest.update(name.encode())
        digest.update(b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _source_files() -> Iterator[tuple[Path, str]]:
    root = Path(moejax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        yield path, path.relative_to(root).as_posix()
