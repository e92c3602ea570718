"""Whether the other processes of a run still live: one line names the one that is gone, before anything else is said.

Each process keeps the connection over which it answered the roll call. The kernel closes it when
the process ends, however it ends, so that process 0 learns of it at once and tells the others. What
ends them is not here: the collective that they are in fails, or jax's service gives them up.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Mapping

MAX_LINE_BYTES = 4096

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds, seconds and probes after which a connection to a host that is gone breaks, where the system has them."""


class Partners:
    """The other processes, as far as this one is connected to them: process 0 to all, each other to process 0.

    Args:
      links: connections by the name of the process at the other end.

    Attributes:
      is_told: set once a line about a process that is gone has been printed.
    """

    def __init__(self, links: Mapping[str, socket.socket]):
        self.is_told = threading.Event()
        self._links = dict(links)
        self._is_quiet = False
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()  # the thread and the end of the process both send
        for link in self._links.values():
            _keep_alive(link)
        self._thread = threading.Thread(target=self._watch, name="partners", daemon=True)
        self._thread.start()

    def expect_their_end(self) -> None:
        """From now on nothing is said: all processes know that they end, and say why themselves."""
        self._is_quiet = True

    def leave(self, word: str) -> None:
        """Tells the others that this process ends, and stops watching.

        Args:
          word: "done", or "failed" if it did.
        """
        self.expect_their_end()
        self._tell(list(self._links), word)
        self._wake.send(b"x")
        self._thread.join()
        for link in (*self._links.values(), self._wake, self._woken):
            link.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for name, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, name)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if self._hear(key.data):
                        selector.unregister(key.fileobj)

    def _hear(self, name: str) -> bool:
        """Hears one connection; returns whether nothing more can come from it."""
        try:
            data = self._links[name].recv(MAX_LINE_BYTES)
        except OSError:  # reset, or no answer to keepalive probes
            data = b""
        words = [json.loads(line) for line in data.splitlines()] if data else [{"word": "gone"}]
        for message in words:
            word, about = message["word"], message.get("about", name)
            if word in ("gone", "failed"):
                self._say(about, word)
                self._tell([other for other in self._links if other != name], word, about)
        return not data or words[-1]["word"] == "done"

    def _say(self, name: str, word: str) -> None:
        if self._is_quiet:
            return
        what = (
            "failed; its own output says why"
            if word == "failed"
            else "has ended or cannot be reached"
        )
        text = f"moejax: {name} {what}; this process ends, too. The same command, started in all processes, continues "
        os.write(2, f"{text}from the newest checkpoint\n".encode())
        self.is_told.set()
        self._is_quiet = True  # the end of one ends the others: the first is the one to name

    def _tell(self, names: list[str], word: str, about: str = "") -> None:
        message = {"word": word, "about": about} if about else {"word": word}
        with self._lock:
            for name in names:
                with contextlib.suppress(OSError):  # it has ended itself
                    self._links[name].sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(link: socket.socket) -> None:
    """Breaks the connection if the other host is gone; a host that lost its power closes nothing."""
    link.settimeout(None)
    if link.family == socket.AF_UNIX:
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
