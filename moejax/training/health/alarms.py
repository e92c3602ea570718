"""Alarms: a line in `workdir/alarms.jsonl` and in the log when a rule about routing begins to hold.

`alarm_rules.check` is a pure function of one logging interval. `AlarmLog` remembers which layers
each rule holds in, so that a condition that lasts is reported once when it begins and once when it
ends. A rule in `alarms.stop` saves the run and ends it.
"""

import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from moejax.config import Config
from moejax.training.health.alarm_rules import Alarm, check
from moejax.training.health.telemetry import RoutingInterval
from moejax.training.run_directory.line_file import LineFile, read_lines

FILE = "alarms.jsonl"

GRACE_INTERVALS = 3
"""Logging intervals without a finding after which an alarm has ended."""

LASTING = ("collapse",)
"""Rules that begin once they held in `GRACE_INTERVALS` intervals in a row.

A new router is uneven for some steps.
"""

Counts: TypeAlias = dict[tuple[str, int], int]
"""Logging intervals, by rule and layer."""

log = logging.getLogger("moejax")


class AlarmError(RuntimeError):
    """A rule in `alarms.stop` held: the message names it and the remedy."""


class AlarmFileError(ValueError):
    """An `alarms.jsonl` that cannot be read: the message names the line and the remedy."""


class AlarmLog:
    """Writes `workdir/alarms.jsonl`: a line when a rule begins to hold in layers, one when it ends.

    Args:
      workdir: the run directory.
      after_step: lines of later steps are dropped: a resumed run writes them again.
      config: of the run.
      counts: `counts` of the run at that step. Without them intervals are counted from zero, and
        the beginning or the end of an alarm may be reported up to `GRACE_INTERVALS` intervals late.
      name: of the run, in the log; "" where there is only one.
      noted: `state` at that step, from its checkpoint.

    Raises:
      LineFileError: the file cannot be read or written.
    """

    def __init__(
        self,
        workdir: str | Path,
        after_step: int,
        config: Config,
        counts: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        noted: Mapping[str, Any] | None = None,
    ):
        self._config = config
        self._name = f"{name}, " if name else ""
        self._file = LineFile(Path(workdir) / FILE, after_step, noted, _is_alarm)
        held, quiet = _restore_counts(counts)
        # For how many intervals in a row rules in `LASTING` have held.
        self._held: Counts = held
        # For how many intervals a rule that began has not held.
        if quiet is None:
            quiet = dict.fromkeys(active(self._file.lines), 0)
        self._quiet: Counts = quiet

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint notes of the file."""
        return self._file.state

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def counts(self) -> dict[str, Any]:
        """What a continued run must know of the intervals before it, as JSON."""
        return {"held": _to_rows(self._held), "quiet": _to_rows(self._quiet)}

    def update(self, step: int, interval: RoutingInterval) -> list[Alarm]:
        """Checks an interval that ended with `step`, and writes what begins and what ends.

        Returns:
          The alarms that hold and are to stop the run.
        """
        alarms = self._without_new(check(interval, self._config))
        for alarm in alarms:
            self._begin(step, alarm)
        for place in self._quiet:
            self._quiet[place] += 1
        for place in _places(alarms):
            self._quiet[place] = 0
        self._end_quiet(step)
        return [alarm for alarm in alarms if alarm.rule in self._config.alarms.stopping]

    def _without_new(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Returns the alarms without the layers in which a lasting rule has not yet begun."""
        self._held = {place: self._held.get(place, 0) + 1 for place in _places(alarms)}
        kept = []
        for alarm in alarms:
            layers = [layer for layer in alarm.layers if self._has_begun(alarm.rule, layer)]
            if layers:
                kept.append(alarm.within(layers))
        return kept

    def _has_begun(self, rule: str, layer: int) -> bool:
        """Whether a rule that holds in a layer counts already."""
        if rule not in LASTING or (rule, layer) in self._quiet:
            return True
        return self._held[rule, layer] >= GRACE_INTERVALS

    def _begin(self, step: int, alarm: Alarm) -> None:
        """Reports an alarm in the layers in which it did not hold before."""
        layers = [layer for layer in alarm.layers if (alarm.rule, layer) not in self._quiet]
        if not layers:
            return
        begun = alarm.within(layers)
        values: dict[str, Any] = {
            "value": begun.value,
            "threshold": begun.threshold,
            "reading": begun.reading,
        }
        # JSON has no infinity.
        finite = {key: value for key, value in values.items() if value != math.inf}
        self._write(step, alarm.rule, "on", layers, **finite)
        log.warning(
            "%sstep %d: alarm %s in %s: %s",
            self._name,
            step,
            alarm.rule,
            name_layers(layers),
            begun.reading,
        )

    def _end_quiet(self, step: int) -> None:
        """Reports the end of alarms that have not held for `GRACE_INTERVALS` intervals."""
        ended: dict[str, list[int]] = {}
        for place, num_intervals in sorted(self._quiet.items()):
            if num_intervals >= GRACE_INTERVALS:
                rule, layer = place
                ended.setdefault(rule, []).append(layer)
                del self._quiet[place]
        for rule, layers in ended.items():
            self._write(step, rule, "off", layers)
            where = name_layers(layers)
            log.info("%sstep %d: alarm %s has ended in %s", self._name, step, rule, where)

    def _write(self, step: int, rule: str, state: str, layers: list[int], **more: Any) -> None:
        self._file.append({"step": step, "rule": rule, "state": state, "layers": layers, **more})


def _places(alarms: Iterable[Alarm]) -> list[tuple[str, int]]:
    """Returns the rules and layers in which alarms hold."""
    return [(alarm.rule, layer) for alarm in alarms for layer in alarm.layers]


def _to_rows(counts: Counts) -> list[list[Any]]:
    """Returns counts as JSON can hold them."""
    return [[rule, layer, number] for (rule, layer), number in counts.items()]


def _from_rows(rows: Iterable[Any]) -> Counts:
    return {(str(rule), int(layer)): int(number) for rule, layer, number in rows}


def _restore_counts(counts: Mapping[str, Any] | None) -> tuple[Counts, Counts | None]:
    """Returns for how many intervals rules have held, and for how many not.

    Returns:
      ({}, None) if that was not counted, or cannot be read.
    """
    if counts is None:
        return {}, None
    try:
        return _from_rows(counts["held"]), _from_rows(counts["quiet"])
    except (KeyError, TypeError, ValueError):
        log.warning("the checkpoint's counts of alarms are damaged: intervals count from zero")
        return {}, None


def read_alarms(workdir: str | Path) -> list[dict[str, Any]]:
    """Reads the lines of `workdir/alarms.jsonl`; none if there is no such file.

    A last line that a crash has cut off is left out.

    Raises:
      AlarmFileError: a line is damaged.
    """
    path = Path(workdir) / FILE
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise AlarmFileError(
            f"{path} cannot be read ({error.strerror}); give this user the right to read it"
        ) from error
    lines: list[dict[str, Any]] = []
    for line in read_lines(io.BytesIO(content)):
        values = line.values
        fault = line.fault if values is None else _fault(values)
        if values is None or fault:
            raise AlarmFileError(
                f"{path}: line {line.number} is damaged ({fault}); delete that line"
            )
        lines.append(values)
    return lines


def _is_alarm(line: Mapping[str, Any]) -> bool:
    return not _fault(line)


def _fault(line: Mapping[str, Any]) -> str:
    """Names what an alarm's line lacks; empty if it is sound."""
    if line.get("state") not in ("on", "off"):
        return "no state"
    if not isinstance(line.get("rule"), str):
        return "no rule"
    layers = line.get("layers")
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        return "layers that are not integers"
    return ""


def active(lines: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Returns rules and layers of the alarms that have begun and not ended, oldest first."""
    places: dict[tuple[str, int], None] = {}
    for line in lines:
        for layer in line["layers"]:
            place = line["rule"], layer
            places.pop(place, None)
            if line["state"] == "on":
                places[place] = None
    return list(places)


def name_layers(layers: Sequence[int]) -> str:
    """Returns `layer 3`, `layers 1, 2`, or the first eight of many and how many more there are."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    names = ", ".join(str(layer) for layer in layers[:8])
    num_more = len(layers) - 8
    if num_more > 0:
        return f"layers {names} and {num_more} more"
    return f"layers {names}"


def stop_message(step: int, alarms: Sequence[Alarm]) -> str:
    """Says why an alarm ended a run, and what to do."""
    readings = [f"{alarm.rule} in {name_layers(alarm.layers)}: {alarm.reading}" for alarm in alarms]
    rules = ", ".join(alarm.rule for alarm in alarms)
    return (
        f"alarms.stop: {'; '.join(readings)}; saved step {step}; take {rules} out of alarms.stop "
        "to go on from there, or begin another run with other moe or optimizer settings"
    )
