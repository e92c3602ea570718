"""Alarms: rules that say when routing goes wrong, a line in `workdir/alarms.jsonl` and in the log for each.

`check` is a pure function of one logging interval. `AlarmLog` remembers which layers each rule
holds in, so that what lasts is said once when it begins and once when it ends. A rule in
`alarms.stop` saves the run and ends it.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from moejax.config import Config, MoeConfig
from moejax.training.health.telemetry import RoutingInterval
from moejax.training.run_directory.line_file import LineFile, parse_line

FILE = "alarms.jsonl"
LOW_RULES = ("balance_floor", "entropy")  # hold below their threshold
LASTING = (
    "collapse",
)  # begin when they held in `PATIENCE` intervals in a row: a new router is uneven for some steps
PATIENCE = 3  # intervals without a finding after which an alarm has ended

log = logging.getLogger("moejax")


class AlarmError(RuntimeError):
    """A rule in `alarms.stop` held: the message names it and the remedy."""


class AlarmFileError(ValueError):
    """An `alarms.jsonl` that cannot be read: the message names the line and the remedy."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A rule and where it holds.

    Attributes:
      rule: its name, the leaf of `alarms`.
      layers: model layers, increasing.
      values: of each.
      threshold: from the configuration.
      wording: of `reading`, with a place for the value.
    """

    rule: str
    layers: tuple[int, ...]
    values: tuple[float, ...]
    threshold: float
    wording: str

    @property
    def value(self) -> float:
        """Of the layer that is furthest beyond the threshold."""
        return min(self.values) if self.rule in LOW_RULES else max(self.values)

    @property
    def reading(self) -> str:
        """What was seen, with that value."""
        return (
            "router logits are not finite"
            if math.isinf(self.value)
            else self.wording.format(self.value)
        )

    def within(self, layers: Iterable[int]) -> "Alarm":
        """The same of some of its layers."""
        wanted = set(layers)
        kept = [pair for pair in zip(self.layers, self.values, strict=True) if pair[0] in wanted]
        return dataclasses.replace(
            self, layers=tuple(x for x, _ in kept), values=tuple(x for _, x in kept)
        )


def check(interval: RoutingInterval, config: Config) -> list[Alarm]:
    """Applies every rule that is on to every MoE layer of one logging interval.

    Args:
      interval: what was logged.
      config: of the run; thresholds are in `config.alarms`.

    Returns:
      One alarm for each rule that holds in a layer, in the order of the rules.
    """
    alarms, seen = config.alarms, interval.layers
    kinds = [kind for kind in config.layers if kind is not None]
    worst_N = interval.idle_steps_NE.max(axis=1)
    readings = {
        "collapse": (_collapse(interval), "MaxVio is {:.0%} of what is possible"),
        "dead_experts": (worst_N.astype(float), "an expert got no token for {:,.0f} steps"),
        "balance_floor": (_balance(interval), "the balance loss is {:.3f}, and 1 is its floor"),
        "logits": (
            np.where(np.isnan(seen["logit_max"]), np.inf, seen["logit_max"]),
            "a router logit reached {:,.1f}",
        ),
        "ties": (seen["ties"], "{:.2%} of tokens tie between their last expert and the next"),
        "drops": (seen["dropped"], "{:.1%} of choices found no slot"),
        "entropy": (_entropy(seen["entropy"], kinds), "the router's entropy is {:.2%} of ln E"),
    }
    found = []
    for rule, (value_N, reading) in readings.items():
        threshold = float(getattr(alarms, rule))
        holds_N = (value_N < threshold) if rule in LOW_RULES else (value_N > threshold)
        if threshold and holds_N.any():
            layers = [config.moe_layers[n] for n in np.flatnonzero(holds_N).tolist()]
            found.append(
                Alarm(rule, tuple(layers), tuple(value_N[holds_N].tolist()), threshold, reading)
            )
    return found


def _collapse(interval: RoutingInterval) -> Float[np.ndarray, "N"]:
    """MaxVio over E / K - 1, which it has when every token visits the same K experts; 0 where that is 0.

    K is what tokens had, which a schedule may set below `moe.top_k`.
    """
    num_experts, choices_N = interval.counts_NE.shape[1], interval.choices_N
    most_N = np.where(choices_N > 0, num_experts / np.where(choices_N > 0, choices_N, 1) - 1, 0)
    is_possible_N = most_N > 1e-6
    return np.where(
        is_possible_N, interval.layers["max_violation"] / np.where(is_possible_N, most_N, 1), 0.0
    )


def _balance(interval: RoutingInterval) -> Float[np.ndarray, "N"]:
    """The balance loss of the interval as one batch, normalised to 1 at perfect balance."""
    load_NE = interval.counts_NE / np.maximum(interval.counts_NE.sum(axis=1, keepdims=True), 1)
    return np.where(
        interval.counts_NE.any(axis=1),
        load_NE.shape[1] * (load_NE * interval.probs_NE).sum(axis=1),
        np.nan,
    )


def _entropy(
    entropy_N: Float[np.ndarray, "N"], kinds: Sequence[MoeConfig]
) -> Float[np.ndarray, "N"]:
    """The router's entropy over that of a uniform router; NaN where no choice is learned."""
    uniform_N = np.array(
        [math.log(kind.num_choices) if kind.num_choices > 1 else math.nan for kind in kinds]
    )
    return entropy_N / uniform_N


class AlarmLog:
    """`workdir/alarms.jsonl`: one line when a rule begins to hold in some layers, and one when it ends there.

    Args:
      workdir: the run directory.
      after_step: lines of later steps are dropped: a resumed run writes them again.
      config: of the run.
      counts: `counts` of the run at that step; without them, intervals are counted anew, so that
        the beginning or the end of an alarm may be said up to `PATIENCE` intervals later.
      name: of the run, in the log; "" where there is but one.
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
        name: str = "",
        noted: Mapping[str, Any] | None = None,
    ):
        self._config = config
        self._name = f"{name}, " if name else ""
        self._file = LineFile(
            Path(workdir) / FILE, after_step, noted, lambda line: not _fault(line)
        )
        held, quiet = _counted(counts)
        # By rule and layer, for how many intervals in a row rules in `LASTING` have held.
        self._held = held
        # By rule and layer, the intervals since it last held.
        self._quiet = dict.fromkeys(active(self._file.lines), 0) if quiet is None else quiet

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
        return {
            name: [[rule, layer, number] for (rule, layer), number in places.items()]
            for name, places in (("held", self._held), ("quiet", self._quiet))
        }

    def update(self, step: int, interval: RoutingInterval) -> list[Alarm]:
        """Checks an interval that ended with `step`, writes what is new; returns what holds and is to stop the run."""
        found = self._lasting(check(interval, self._config))
        holding = {(alarm.rule, layer) for alarm in found for layer in alarm.layers}
        for alarm in found:
            begun = alarm.within(
                layer for layer in alarm.layers if (alarm.rule, layer) not in self._quiet
            )
            if begun.layers:
                self._write(step, alarm.rule, "on", begun.layers, value=begun.value, threshold=begun.threshold,
                            reading=begun.reading)  # fmt: skip
                where = name_layers(begun.layers)
                log.warning(
                    "%sstep %d: alarm %s in %s: %s",
                    self._name,
                    step,
                    alarm.rule,
                    where,
                    begun.reading,
                )
        self._quiet = {
            place: intervals + 1 for place, intervals in self._quiet.items()
        } | dict.fromkeys(holding, 0)
        ended = sorted(place for place, intervals in self._quiet.items() if intervals >= PATIENCE)
        for rule in dict.fromkeys(rule for rule, _ in ended):
            layers = [layer for other, layer in ended if other == rule]
            self._write(step, rule, "off", layers)
            log.info(
                "%sstep %d: alarm %s has ended in %s", self._name, step, rule, name_layers(layers)
            )
        self._quiet = {place: quiet for place, quiet in self._quiet.items() if place not in ended}
        return [alarm for alarm in found if alarm.rule in self._config.alarms.stopping]

    def _lasting(self, found: Sequence[Alarm]) -> list[Alarm]:
        """Without what did not yet hold for long enough to begin."""
        places = [(alarm.rule, layer) for alarm in found for layer in alarm.layers]
        self._held = {place: self._held.get(place, 0) + 1 for place in places}
        kept = (
            alarm.within(
                layer
                for layer in alarm.layers
                if alarm.rule not in LASTING
                or (alarm.rule, layer) in self._quiet
                or self._held[alarm.rule, layer] >= PATIENCE
            )
            for alarm in found
        )
        return [alarm for alarm in kept if alarm.layers]

    def _write(self, step: int, rule: str, state: str, layers: Iterable[int], **more: Any) -> None:
        finite = {key: value for key, value in more.items() if value != math.inf}
        self._file.append(
            {"step": step, "rule": rule, "state": state, "layers": list(layers), **finite}
        )


def read_alarms(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of `workdir/alarms.jsonl`, without a last one that a crash cut off; none if there is no such file.

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
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        values = parse_line(line)
        fault = "no JSON object with a step" if values is None else _fault(values)
        if fault and not line.endswith(b"\n"):
            break
        if values is None or fault:
            raise AlarmFileError(f"{path}: line {number} is damaged ({fault}); delete that line")
        lines.append(values)
    return lines


def _fault(line: Mapping[str, Any]) -> str:
    """What an alarm's line lacks; empty if it is sound."""
    if line.get("state") not in ("on", "off"):
        return "no state"
    if not isinstance(line.get("rule"), str):
        return "no rule"
    layers = line.get("layers")
    is_listed = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    return "" if is_listed else "layers that are not integers"


def active(lines: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Rules and layers of the alarms that have begun and not ended, in the order of their beginning."""
    places: dict[tuple[str, int], None] = {}
    for line in lines:
        for layer in line["layers"]:
            places.pop((line["rule"], layer), None)
            if line["state"] == "on":
                places[line["rule"], layer] = None
    return list(places)


def name_layers(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 1, 2`, or the first eight of many and how many they are."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    shown = ", ".join(map(str, layers[:8]))
    return f"layers {shown}" + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")


Counts: TypeAlias = dict[tuple[str, int], int]
"""By rule and layer."""


def _counted(counts: Mapping[str, Any] | None) -> tuple[Counts, Counts | None]:
    """For how many intervals rules have held, and since how many not; ({}, None) if nobody has counted."""
    if counts is None:
        return {}, None
    try:
        held, quiet = (
            {(str(rule), int(layer)): int(number) for rule, layer, number in counts[name]}
            for name in ("held", "quiet")
        )
    except (KeyError, TypeError, ValueError):
        log.warning("the checkpoint's counts of alarms are damaged: intervals are counted anew")
        return {}, None
    return held, quiet


def stop_message(step: int, alarms: Sequence[Alarm]) -> str:
    """Why an alarm ended a run, and what to do."""
    seen = "; ".join(
        f"{alarm.rule} in {name_layers(alarm.layers)}: {alarm.reading}" for alarm in alarms
    )
    rules = ", ".join(alarm.rule for alarm in alarms)
    return (
        f"alarms.stop: {seen}; saved step {step}; take {rules} out of alarms.stop to go on from there, or begin "
        "another run with other moe or optimizer settings"
    )
