"""A local page of runs: which there are, their curves while they train, expert load, and their reports.

Built on Panel: it is Python alone, serves live plots over its own websocket from its own files, in one process, and
reports to nobody. TensorBoard would need a plugin in JavaScript for load and reports; Streamlit reports usage unless
told not to, and runs the whole script again at each click.

The page is for the person at this machine. It listens at 127.0.0.1 and answers to no other name, so that no web site
can reach it through the browser; its policy forbids the browser to fetch anything from elsewhere, whatever a run's
files say. The browser names runs by their place in the server's list: no path from it is ever opened.
"""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.extras import how_to_install
from moejax.inspection.live import Library

if TYPE_CHECKING:  # an extra, imported where it is needed
    import panel

ADDRESS = "127.0.0.1"
EVERY_MS = 2000  # looks for what is new
CATCH_UP_MS = 200  # reads on while something is left unread
NUM_CHOSEN = 4  # runs that are shown at first, the newest
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' {sockets}; frame-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ViewError(ValueError):
    """The page cannot be served: the message says why and names the remedy."""


def serve(folder: str | Path, port: int = 0, started: Callable[[str], None] = lambda url: None) -> None:
    """Serves the page until it is interrupted.

    Args:
      folder: a run directory, or one of run directories.
      port: 0 takes a free one.
      started: called with the page's address once it can be opened.

    Raises:
      ViewError: Panel is not installed, or the port cannot be had.
      KeyboardInterrupt: on SIGINT, once the server has stopped.
    """
    try:
        import panel as pn
    except ImportError as error:
        raise ViewError(f"moejax view needs Panel ({error}): {how_to_install('view')}") from error
    library = Library(Path(folder))
    port = _find_port(port)
    hosts = [f"{ADDRESS}:{port}", f"localhost:{port}"]
    server = pn.io.server.get_server(
        {"/": lambda: _new_page(library)}, port=port, address=ADDRESS, websocket_origin=hosts, title="moejax view",
        show=False, start=False, location=False,
    )  # fmt: skip
    server._tornado.add_transform(_guard_for(hosts))
    is_interrupted = []

    def interrupt(*_: Any) -> None:
        is_interrupted.append(True)
        server.io_loop.add_callback_from_signal(server.io_loop.stop)

    signal.signal(signal.SIGINT, interrupt)
    server.start()
    started(f"http://{ADDRESS}:{port}/")
    try:
        server.io_loop.start()
    finally:
        server.stop()
    if is_interrupted:
        raise KeyboardInterrupt


def _find_port(port: int) -> int:
    """The port, if it can be had; a free one for 0."""
    try:
        with socket.create_server((ADDRESS, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ViewError(f"--port={port} cannot be had ({reason}); use another, or 0 for a free one") from error


def _guard_for(hosts: list[str]) -> Any:
    """Puts the policy on every answer, and gives none to a browser that was led here by another name."""
    from tornado.web import OutputTransform

    policy = POLICY.format(sockets=" ".join(f"ws://{host}" for host in hosts))

    class Guard(OutputTransform):
        def __init__(self, request: Any):
            self.is_refused = request.host not in hosts

        def transform_first_chunk(self, status_code: int, headers: Any, chunk: bytes, finishing: bool) -> Any:
            headers["Content-Security-Policy"] = policy
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            if self.is_refused:
                chunk, status_code = b"", 403
                headers["Content-Length"] = "0"
            return status_code, headers, chunk

        def transform_chunk(self, chunk: bytes, finishing: bool) -> bytes:
            return b"" if self.is_refused else chunk

    return Guard


def _new_page(library: Library) -> "panel.Column":
    """A page for a browser that has just opened the address."""
    from moejax.inspection.view_session import Session

    return Session(library).page
