"""How the configuration of a continued run differs from what it was, and whether it may."""

import dataclasses
import logging
from typing import Any, NamedTuple

from moejax.config import AlarmConfig, Config, is_of_weights, is_read, leaves, names_file, to_dict
from moejax.training.learning_rate import make_schedule

MAY_CHANGE = (
    "train.num_steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_nonfinite_steps",
    "train.step_limit_s",
    "train.check_memory",
    "data.directory",
    "data.files",
    "data.source_dir",
    "moe.grouped_matmul",
    "moe.exchange",
    "moe.exchange_buffer",
    "moe.exchange_chunks",
    "moe.save_exchanged",
    "model.remat",
    "model.scan_layers",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.context",
    "mesh.tensor",
    "mesh.dcn_data",
    "mesh.dcn_fsdp",
    "mesh.dcn_expert",
    *(f"alarms.{field.name}" for field in dataclasses.fields(AlarmConfig)),
)
"""Leaves that may differ when a run is continued.

They change neither the model nor what a step computes, except that `train.num_steps` stretches the
learning-rate schedule.
"""

log = logging.getLogger("moejax")


class Change(NamedTuple):
    """A leaf in which two configurations differ."""

    key: str
    saved: Any
    wanted: Any


def changes(saved: Config, wanted: Config) -> list[Change]:
    """Returns the leaves in which a run's configuration and another one differ."""
    before, after = to_dict(saved), to_dict(wanted)
    found = []
    for key, _ in leaves():
        section, name = key.split(".")
        change = Change(key, before[section][name], after[section][name])
        if change.saved != change.wanted:
            found.append(change)
    return found


def changes_of_weights(saved: Config, wanted: Config) -> list[Change]:
    """Returns the leaves with which the same weights mean something else, and that are read."""
    found = []
    for change in changes(saved, wanted):
        is_relevant = is_read(saved, change.key) or is_read(wanted, change.key)
        if is_relevant and is_of_weights(change.key) and not _is_moved_tokenizer(change):
            found.append(change)
    return found


def first_change(saved: Config, wanted: Config, *, has_begun: bool = True) -> Change | None:
    """Returns the first difference that makes it another run; None if there is none.

    A run that has not begun, for its weights were converted, may be trained in any way that fits
    the weights.

    A leaf that neither configuration reads makes none: a run of an earlier version may have been
    started with one.
    """
    for change in changes(saved, wanted):
        if not has_begun and not is_of_weights(change.key):
            continue
        is_relevant = is_read(saved, change.key) or is_read(wanted, change.key)
        if is_relevant and change.key not in MAY_CHANGE and not _is_moved_tokenizer(change):
            return change
    return None


def _is_moved_tokenizer(change: Change) -> bool:
    """Whether the tokenizer is a file in another place; `kept_tokenizer` compares its content."""
    is_of_files = names_file(change.saved) and names_file(change.wanted)
    return change.key == "data.tokenizer" and is_of_files


def log_changes(saved: Config, config: Config, step: int) -> None:
    """Logs how a continued run differs from what it was.

    If its length changed, it also logs what that means for its schedule.

    Args:
      saved: the configuration that it had.
      config: the configuration that it has now.
      step: from which it continues.
    """
    texts = [
        f"{change.key}={change.wanted} (was {change.saved})" for change in changes(saved, config)
    ]
    if texts:
        log.info("continuing with %s", ", ".join(texts))
    before, after = saved.train.num_steps, config.train.num_steps
    if step > after or (step == after and before != after):
        log.info(
            "train.num_steps=%d: the run is already at step %d, and nothing is trained", after, step
        )
    elif before != after:
        log.info(
            "train.num_steps=%d stretches the schedules: the learning rate goes on at %.3g, "
            "where %d steps had %.3g",
            after,
            _learning_rate(config, after, step),
            before,
            _learning_rate(config, before, step),
        )


def _learning_rate(config: Config, num_steps: int, step: int) -> float:
    """Returns the learning rate of a step if the run has that many."""
    factor = float(make_schedule(config.optimizer, num_steps)(step))
    return factor * config.optimizer.learning_rate
