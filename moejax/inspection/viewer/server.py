"""A local page of runs: their curves while they train, expert load, and their reports.

Built on Panel: it is Python alone, serves live plots over its own websocket from its own files, in
one process, and sends nothing to anyone. TensorBoard would need a plugin in JavaScript for load and
reports; Streamlit reports usage unless that is switched off, and runs the entire script again at
each click.

The page is for the person who started it. It listens at 127.0.0.1 and answers to no other name, so
that no web site can reach it through the browser, and only to who knows the token in its address,
so that no other user of the machine can. Both are asked before a request is routed. Only the few
routes of the page are served: Panel would add one that imports any module that a request names. The
page's policy forbids the browser to fetch anything from elsewhere, whatever a run's files say. The
browser names runs by their place in the server's list: no path from it is ever opened.
"""

import hmac
import os
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.extras import how_to_install
from moejax.inspection.viewer.run_folder import RunFolder

if TYPE_CHECKING:  # an extra, imported where it is needed
    import panel

ADDRESS = "127.0.0.1"
TOKEN = "token"  # the argument of the address
TOKEN_BYTES = 24
# One of each route that is served.
PATHS = (
    "/",
    "/ws",
    "/favicon.ico",
    "/static/js/bokeh.js",
    "/static/extensions/panel/panel.js",
)
# Of Bokeh and Panel; nothing of a run is in these, so they need no token.
FILES = (
    "/static/",
    "/favicon.ico",
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' {sockets}; frame-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class ViewError(ValueError):
    """The page cannot be served: the message says why and names the remedy."""


def serve(
    folder: str | Path, port: int = 0, started: Callable[[str], None] = lambda url: None
) -> None:
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
    run_folder = RunFolder(Path(folder).resolve())
    port = _find_port(port)
    token = secrets.token_hex(TOKEN_BYTES)
    hosts = [f"{ADDRESS}:{port}", f"localhost:{port}"]
    server = pn.io.server.get_server(
        {"/": lambda: _new_page(run_folder)},
        port=port,
        address=ADDRESS,
        websocket_origin=hosts,
        title="moejax view",
        show=False,
        start=False,
        location=False,
    )
    _guard(server._tornado, hosts, token)
    is_interrupted = []

    def interrupt(*_: Any) -> None:
        is_interrupted.append(True)
        server.io_loop.add_callback_from_signal(server.io_loop.stop)

    signal.signal(signal.SIGINT, interrupt)
    server.start()
    started(f"http://{ADDRESS}:{port}/?{TOKEN}={token}")
    try:
        server.io_loop.start()
    finally:
        server.stop()
    if is_interrupted:
        raise KeyboardInterrupt


def _find_port(port: int) -> int:
    """Returns the port, if it can be had; a free one for 0.

    Raises:
      ViewError: it cannot be had.
    """
    try:
        with socket.create_server((ADDRESS, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ViewError(
            f"--port={port} cannot be had ({reason}); use another, or 0 for a free one"
        ) from error


def _guard(application: Any, hosts: list[str], token: str) -> None:
    """Refuses requests before they are routed, and puts the policy on every answer.

    Routes that the page does not need are dropped.

    Args:
      application: of tornado.
      hosts: names by which the page may be asked for.
      token: that all but the files of Bokeh and Panel need.
    """
    from tornado.routing import Matcher, Rule
    from tornado.web import OutputTransform, RequestHandler

    policy = POLICY.format(sockets=" ".join(f"ws://{host}" for host in hosts))

    class Refusal(RequestHandler):
        def prepare(self) -> None:
            self.set_status(403)
            self.finish()

    class IsRefused(Matcher):
        def match(self, request: Any) -> dict[str, Any] | None:
            is_known = request.host in hosts
            is_allowed = request.path.startswith(FILES) or has_token(request, token)
            return None if is_known and is_allowed else {}

    class Policy(OutputTransform):
        def __init__(self, request: Any):
            pass

        def transform_first_chunk(
            self, status_code: int, headers: Any, chunk: bytes, finishing: bool
        ) -> Any:
            headers["Content-Security-Policy"] = policy
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            return status_code, headers, chunk

    application.add_transform(Policy)
    router = application.wildcard_router
    router.rules = [rule for rule in router.rules if _is_served(rule)]
    application.default_router.rules.insert(0, Rule(IsRefused(), Refusal))


def _is_served(rule: Any) -> bool:
    """Returns whether a rule of tornado's router is one that the page needs."""
    return any(rule.matcher.regex.match(path) for path in PATHS)


def has_token(request: Any, token: str) -> bool:
    """Returns whether the address of a request has the token.

    How long the comparison takes says nothing about the token.
    """
    given = request.query_arguments.get(TOKEN, [])
    return len(given) == 1 and hmac.compare_digest(given[0], token.encode())


def _new_page(run_folder: RunFolder) -> "panel.Column":
    """Returns a page for a browser that has just opened the address."""
    from moejax.inspection.viewer.session import Session

    return Session(run_folder).page
