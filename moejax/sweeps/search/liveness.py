"""Whether the workers of a study's running trials are alive, in any storage.

A worker renews the heartbeat of its trial, the attribute `beat`, every few seconds. An observer
compares it with the last one that it saw, by its own clock, so that clocks of different machines
are never compared: a worker whose heartbeat has not changed for the grace period is dead.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial


class Watch:
    """Remembers since when the heartbeat of each running trial has been the same.

    Args:
      grace_s: seconds without a new heartbeat after which a worker counts as dead.
      clock: returns the time in seconds.
    """

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic):
        self._grace_s = grace_s
        self._clock = clock
        # By the trial's number: its heartbeat, and when that was first seen.
        self._seen: dict[int, tuple[float | None, float]] = {}
        self._lock = threading.Lock()  # a worker and its heartbeat thread both observe

    def observe(self, trials: Iterable["FrozenTrial"]) -> list["FrozenTrial"]:
        """Looks at a study's trials as they are now, and returns those whose worker is dead."""
        running = [trial for trial in trials if trial.state.name == "RUNNING"]
        with self._lock:
            now = self._clock()
            seen: dict[int, tuple[float | None, float]] = {}
            dead = []
            for trial in running:
                beat = trial.user_attrs.get("beat")
                last_beat, since = self._seen.get(trial.number, (beat, now))
                if beat != last_beat:
                    since = now
                seen[trial.number] = (beat, since)
                if now - since > self._grace_s:
                    dead.append(trial)
            self._seen = seen
            return dead


class Heartbeat:
    """Renews a trial's heartbeat from a thread while the context lasts, and watches other workers.

    Args:
      study: of the trial.
      trial: that this worker runs.
      watch: of this worker.
      every_s: seconds between two heartbeats.

    Attributes:
      is_lost: set when another worker, which took this one for dead, has ended the trial.
    """

    def __init__(self, study: "Study", trial: "Trial", watch: Watch, every_s: float):
        self._study = study
        self._trial = trial
        self._watch = watch
        self._every_s = every_s
        self.is_lost = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_beating, name=f"heartbeat of trial {trial.number}", daemon=True
        )

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=self._every_s)  # not forever: a storage may hang

    def _keep_beating(self) -> None:
        import optuna

        states = (optuna.trial.TrialState.RUNNING,)
        while not self._is_over.is_set():
            try:
                self._trial.set_user_attr("beat", time.time())
                self._watch.observe(self._study.get_trials(deepcopy=False, states=states))
            except optuna.exceptions.UpdateFinishedTrialError:
                self.is_lost.set()
                return
            except Exception:  # the storage is away for a moment: the next heartbeat tries again
                pass
            self._is_over.wait(self._every_s)
