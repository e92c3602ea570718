"""No leaf and no knob is dead: code outside of their validation reads each of them."""

import ast
import dataclasses
from pathlib import Path

from moejax.config import LOSS_WEIGHTS, Knobs, ScheduleConfig, leaves
from moejax.config.sections.alarms import RULES as ALARM_RULES

PACKAGE = Path(__file__).parents[2] / "moejax"

PERMISSIONS = {("moe", "allow_noncausal")}
"""Leaves that only decide whether a configuration is refused."""

KNOBS = {field.name for field in dataclasses.fields(Knobs)}
"""Leaves that are read under the name of their knob, see the test of knobs."""

SCHEDULED = {("schedule", field.name) for field in dataclasses.fields(ScheduleConfig)}
"""They are read in a loop (`training/schedules.py`); tests/training/test_schedules.py has each."""

WATCHED = {("alarms", rule) for rule in ALARM_RULES}
"""They are read in a loop over the rules (`training/health/alarms.py`); its test has each."""


def code_that_reads(path):
    """The syntax tree of a file, without validation.

    Functions of moejax/config only validate, apart from those that derive layers or multipliers
    from leaves, and so does all of moejax/config/schema.
    """
    tree = ast.parse(path.read_text())
    parts = path.relative_to(PACKAGE).parts
    if parts[:2] == ("config", "schema"):
        tree.body = []
    elif parts[0] == "config" and path.name not in ("layer_pattern.py", "transfer.py"):
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return tree


def attribute_reads():
    """(what it is read from, attribute) for each attribute read in moejax."""
    for path in sorted(PACKAGE.rglob("*.py")):
        is_config = path.is_relative_to(PACKAGE / "config")
        for node in ast.walk(code_that_reads(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                # The properties of a section read their own leaves.
                owner = "config" if owner == "self" and is_config else owner.lstrip("_")
                yield owner, node.attr


def dead_leaves(reads):
    """Leaves that are not read from something named after their section, or from `config`."""
    dead = []
    for key, _ in leaves():
        section, name = key.split(".")
        is_read = (section, name) in reads or ("config", name) in reads
        is_knob = section == "moe" and name in KNOBS
        if not is_read and not is_knob:
            dead.append(key)
    return dead


def test_every_leaf_is_read_somewhere_outside_of_its_validation():
    reads = set(attribute_reads())
    reads |= PERMISSIONS | SCHEDULED | WATCHED
    assert dead_leaves(reads) == []


def test_every_knob_is_read_somewhere():
    reads = {attribute for owner, attribute in attribute_reads() if owner == "knobs"}
    # Weights are read in a loop over the losses: getattr(knobs, f"{name}_weight").
    reads |= {*LOSS_WEIGHTS}
    assert {field.name for field in dataclasses.fields(Knobs)} <= reads


def test_a_leaf_that_nothing_reads_would_be_found():
    reads = {read for read in attribute_reads() if read[1] != "qk_norm"}
    reads |= PERMISSIONS | SCHEDULED | WATCHED
    assert dead_leaves(reads) == ["attention.qk_norm"]
