"""Whether the other processes of a run are alive: one line names the first that is gone.

Each process keeps the connection over which it answered the roll call. The kernel closes it when
the process ends, however it ends, so that process 0 learns of it at once and tells the others.
Nothing here ends a process: the collective that it takes part in fails, or jax's coordination
service gives it up.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Mapping, Sequence

MAX_LINE_BYTES = 4096

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""After how many seconds, seconds and probes a connection to a host that is gone breaks.

Options that the system does not have are left out.
"""


class Partners:
    """The processes that this one is connected to: process 0 to all, each other one to process 0.

    Args:
      links: connections by the name of the process at the other end.

    Attributes:
      has_reported: set once a line about a process that is gone has been printed.
    """

    def __init__(self, links: Mapping[str, socket.socket]):
        self.has_reported = threading.Event()
        self._links = dict(links)
        self._is_quiet = False
        self._wake, self._woken = socket.socketpair()
        # The thread sends, and so does the main thread when the process ends.
        self._lock = threading.Lock()
        for link in self._links.values():
            _keep_alive(link)
        self._thread = threading.Thread(target=self._watch, name="partners", daemon=True)
        self._thread.start()

    def expect_their_end(self) -> None:
        """Prints nothing from now on: all processes know that they end, and say why themselves."""
        self._is_quiet = True

    def leave(self, state: str) -> None:
        """Tells the others that this process ends, and stops watching.

        Args:
          state: "done", or "failed" if it did.
        """
        self.expect_their_end()
        self._send(list(self._links), state)
        self._wake.send(b"x")
        self._thread.join()
        for link in (*self._links.values(), self._wake, self._woken):
            link.close()

    def _watch(self) -> None:
        """Reads from all connections until `leave` wakes the thread."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for name, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, name)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if self._receive(key.data):
                        selector.unregister(key.fileobj)

    def _receive(self, name: str) -> bool:
        """Reads from one connection; returns whether nothing more can come from it."""
        messages = self._read_messages(name)
        is_broken = not messages
        if is_broken:
            messages = [{"word": "gone"}]
        for message in messages:
            state = message["word"]
            about = message.get("about", name)
            if state in ("gone", "failed"):
                self._report(about, state)
                others = [other for other in self._links if other != name]
                self._send(others, state, about)
        return is_broken or messages[-1]["word"] == "done"

    def _read_messages(self, name: str) -> list[dict[str, str]]:
        """Returns what a process sent; empty if the connection broke or was closed."""
        try:
            data = self._links[name].recv(MAX_LINE_BYTES)
        except OSError:  # reset, or no answer to keepalive probes
            return []
        return [json.loads(line) for line in data.splitlines()]

    def _report(self, name: str, state: str) -> None:
        """Prints which process is gone or failed, once."""
        if self._is_quiet:
            return
        what = "has ended or cannot be reached"
        if state == "failed":
            what = "failed; its own output says why"
        text = (
            f"moejax: {name} {what}; this process ends, too. The same command, started in all "
            "processes, continues from the newest checkpoint\n"
        )
        os.write(2, text.encode())
        self.has_reported.set()
        self._is_quiet = True  # the end of one process ends the others: only the first is a cause

    def _send(self, names: Sequence[str], state: str, about: str = "") -> None:
        """Sends to some processes that this one, or the one that `about` names, is in a state."""
        message = {"word": state}
        if about:
            message["about"] = about
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for name in names:
                with contextlib.suppress(OSError):  # that process has ended itself
                    self._links[name].sendall(line)


def _keep_alive(link: socket.socket) -> None:
    """Makes a connection break once the other host is gone: one that lost its power closes none."""
    link.settimeout(None)
    if link.family == socket.AF_UNIX:
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
