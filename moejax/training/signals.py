"""SIGINT and SIGTERM as a wish to stop: the loop finishes its step, saves and leaves."""

import logging
import signal
import threading
import time
from types import FrameType

PATIENCE_SECONDS = 1.0

ALARM = "ALARM"
"""A reason to stop that is no signal: `training/alarms.py`."""

log = logging.getLogger("moejax")


class StopSignals:
    """While entered, remembers the first SIGINT or SIGTERM.

    Attributes:
      received: its name, or the reason of a `request` that came before it.
      signal: its name, also if another reason was the first.

    Later SIGTERMs change nothing: `make` and schedulers often send the same signal twice. A second SIGINT, a second or
    more after the first, interrupts at once. Outside the main thread, where handlers cannot be set, nothing is heard.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.signal: str | None = None
        self._heard_at = 0.0
        self._depth = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._previous = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def request(self, reason: str) -> None:
        """Asks for a stop as a signal does; the first reason counts."""
        if self.received is None:
            self.received = reason

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._heard_at = signal.Signals(number).name, now
            self.request(self.signal)
            log.info("%s: stopping after the work at hand", self.signal)
        elif number == signal.SIGINT and now - self._heard_at >= PATIENCE_SECONDS:
            raise KeyboardInterrupt
