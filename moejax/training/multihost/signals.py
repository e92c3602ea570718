"""SIGINT and SIGTERM as a wish to stop: the loop finishes its step, saves and leaves.

Python runs a handler only once the main thread is back from compiled code, and a compilation may
take minutes. `SignalWatch` answers meanwhile, from a thread.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE_SECONDS = 1.0

ALARM = "ALARM"
"""A reason to stop that is no signal: `training/health/alarms.py`."""

log = logging.getLogger("moejax")


class StopSignals:
    """While entered, remembers the first SIGINT or SIGTERM.

    Attributes:
      received: its name, or the reason of a `request` that came before it.
      signal: its name, also if another reason was the first.

    Later SIGTERMs change nothing: `make` and schedulers often send the same signal twice. A second
    SIGINT, a second or more after the first, interrupts at once. Outside the main thread, where
    handlers cannot be set, nothing is heard.
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
        _answered()
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._heard_at = signal.Signals(number).name, now
            self.request(self.signal)
            log.info("%s: stopping after the work at hand", self.signal)
        elif number == signal.SIGINT and now - self._heard_at >= PATIENCE_SECONDS:
            raise KeyboardInterrupt


class SignalWatch:
    """While entered, says what a signal waits for that no handler has answered, and lets a second SIGINT leave at once.

    Entered outside the main thread, where signals cannot be watched, it does nothing.
    """

    def __init__(self) -> None:
        self._read_end = self._write_end = -1
        self._previous_fd = -1
        self._previous_handler: object = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # Whatever the main thread does, the signal's number is written there at once.
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous_handler = signal.signal(signal.SIGINT, _interrupt)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._previous_fd)
        signal.signal(signal.SIGINT, self._previous_handler)  # type: ignore[arg-type]
        os.close(self._write_end)  # which ends the thread
        self._thread.join()
        os.close(self._read_end)
        self._thread = None

    def _watch(self) -> None:
        waiting_since: float | None = None  # of a signal that no handler has answered
        is_told = False
        while True:
            timeout = None if waiting_since is None or is_told else PATIENCE_SECONDS / 4
            can_read, _, _ = select.select([self._read_end], [], [], timeout)
            number = os.read(self._read_end, 1) if can_read else None
            if number == b"":
                return
            if waiting_since is not None and _answered_at >= waiting_since:
                waiting_since, is_told = None, False
            if number and number[0] in (signal.SIGINT, signal.SIGTERM):
                if waiting_since is None:
                    # The handler may have run before its number was read here.
                    waiting_since, name = (
                        time.monotonic() - PATIENCE_SECONDS / 4,
                        signal.Signals(number[0]).name,
                    )
                elif (
                    number[0] == signal.SIGINT
                    and time.monotonic() - waiting_since >= PATIENCE_SECONDS
                ):
                    _say(f"a second SIGINT during {_work}: leaving at once")
                    os._exit(130)
            is_late = (
                waiting_since is not None and time.monotonic() - waiting_since >= PATIENCE_SECONDS
            )
            if is_late and not is_told:
                _say(
                    f"{name}: {_work} cannot be interrupted; moejax stops after it. A second Ctrl-C leaves at once"
                )
                is_told = True


@contextlib.contextmanager
def uninterrupted(work: str) -> Iterator[None]:
    """Names what the main thread does within it, for those who send a signal meanwhile: "compiling the train step"."""
    global _work
    before, _work = _work, work
    try:
        yield
    finally:
        _work = before


_work = "what is being compiled or computed"
_answered_at = 0.0


def _answered() -> None:
    """A handler runs: the main thread is back."""
    global _answered_at
    _answered_at = time.monotonic()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _answered()
    raise KeyboardInterrupt


def _say(text: str) -> None:
    """To standard error, not through `logging`, whose locks the main thread may hold."""
    os.write(2, f"moejax: {text}\n".encode())
