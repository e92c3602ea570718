"""Whether the workers of a study's running trials are alive, for every storage alike.

A worker renews its trial's `beat` every few seconds. An observer compares a beat with what it saw
itself before, by its own clock, so that clocks of different machines are never compared: a worker
whose beat has not changed for the grace period is dead.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial


class Watch:
    """Remembers since when the beat of each running trial is the same."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic):
        self._grace_s, self._clock = grace_s, clock
        self._seen: dict[
            int, tuple[float | None, float]
        ] = {}  # number -> beat, and when it was first seen
        self._lock = threading.Lock()  # the worker and its heart observe

    def observe(self, trials: Iterable["FrozenTrial"]) -> list["FrozenTrial"]:
        """Looks at a study's trials, as they are now.

        Returns:
          The running ones whose worker is dead.
        """
        running = [trial for trial in trials if trial.state.name == "RUNNING"]
        with self._lock:
            now, before = self._clock(), self._seen
            self._seen = {}
            for trial in running:
                beat = trial.user_attrs.get("beat")
                seen = before.get(trial.number)
                self._seen[trial.number] = (
                    seen if seen is not None and seen[0] == beat else (beat, now)
                )
            return [trial for trial in running if now - self._seen[trial.number][1] > self._grace_s]


class Heartbeat:
    """Renews a trial's beat from a thread while the context lasts, and watches the other workers meanwhile.

    Attributes:
      is_lost: set when the trial has ended without us: another worker took it for dead.
    """

    def __init__(self, study: "Study", trial: "Trial", watch: Watch, every_s: float):
        self._study, self._trial, self._watch, self._every_s = study, trial, watch, every_s
        self.is_lost = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._beat_on, name=f"beat of trial {trial.number}", daemon=True
        )

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=self._every_s)  # not for ever: a storage may hang

    def _beat_on(self) -> None:
        import optuna

        while not self._is_over.is_set():
            try:
                self._trial.set_user_attr("beat", time.time())
                self._watch.observe(
                    self._study.get_trials(
                        deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)
                    )
                )
            except optuna.exceptions.UpdateFinishedTrialError:
                self.is_lost.set()
                return
            except Exception:  # the storage is away for a moment: the next beat tries again
                pass
            self._is_over.wait(self._every_s)
