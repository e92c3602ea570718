"""Every leaf with what is declared of it: for `moejax config`, and as docs/settings.md."""

from collections.abc import Mapping
from typing import Any

from moejax.config.schema.leaf import LARGEST_INT, choices_of, range_text, type_text
from moejax.config.schema.tree import Declared, declared
from moejax.config.schema.unread import is_read
from moejax.config.sections.root import SECTIONS, Config

COMMAND = "moejax config --markdown > docs/settings.md"

INTRODUCTION = f"""\
# Settings

Every leaf of a configuration. This page is written by `{COMMAND}` from
what is declared at each leaf in `moejax/config`, and a test compares the two.

- A recipe sets a leaf by `config.moe.num_experts = 16`, the command line by
  `--config.moe.num_experts=16`, and a sweep varies it by `moe.num_experts=8,16,32`.
- `moejax config --config=configs/tiny_moe.py` shows what a recipe changes, `--all` every leaf,
  `--json` the same as one JSON document.
- A number outside of its range is refused. Bounds hold in float32, in which numbers are used:
  `optimizer.beta1` may not be 0.999999999, which is 1 there. Whole numbers may be as large as
  {LARGEST_INT:,}, others 1e30.
- **A leaf that differs from its default and that nothing reads is refused.** The column "needs"
  says when it is read; a leaf of `moe` is read if any layer reads it. The rule is for what is
  written or typed: the configuration of an existing run may hold leaves that do nothing.
- Leaves marked "may be unread" may stay in a recipe although nothing reads them, because what they
  need is chosen when a run starts, such as the mesh. If they are typed on the command line, or
  varied by a sweep, they are refused as well.
- A dense model (`moe.num_experts=0`) reads nothing else of `moe`, and nothing of `alarms`. What a
  recipe says of both is ignored, so that its dense twin is the recipe with
  `--config.moe.num_experts=0` (and without its `moe.per_layer` and schedules); what is typed for
  experts is refused there.
- In a sweep, a point may only set leaves that its arm reads. Leaves of the recipe may be for some
  of the arms: they are refused if nothing that they need varies. Points without experts are one
  arm, their dense control.
"""


def rows_of(config: Config, given: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns all information about every leaf, ready for JSON.

    Args:
      config: resolved.
      given: the recipe before it was resolved: sections of leaves.
    """
    return [_row(each, config, given) for each in declared().values()]


def _row(each: Declared, config: Config, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    value = each.value(config)
    section = given.get(each.section, {})
    written = section.get(each.name, each.default)
    return {
        "key": each.key,
        "value": value,
        "default": each.default,
        "differs": written != each.default,
        "derived": value != written,
        "read": is_read(config, each.key),
        "takes": takes(each),
        "choices": list(choices_of(each.leaf, each.annotation)),
        "range": range_text(each.leaf, each.annotation),
        "needs": each.needs_text,
        "meaning": each.leaf.meaning,
    }


def takes(each: Declared) -> str:
    """Returns the type of a leaf and its range, in words: "a whole number, at least 0"."""
    limits = range_text(each.leaf, each.annotation)
    kind = type_text(each.leaf, each.annotation)
    return f"{kind}, {limits}" if limits else kind


def settings_page() -> str:
    """Returns the text of docs/settings.md."""
    parts = [INTRODUCTION]
    for section, section_class in SECTIONS.items():
        summary = (section_class.__doc__ or "").strip().splitlines()[0]
        lines = [
            f"## {section}",
            "",
            summary,
            "",
            "| leaf | default | takes | needs | meaning |",
            "|---|---|---|---|---|",
        ]
        lines += [_line(each) for each in declared().values() if each.section == section]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(each: Declared) -> str:
    """Returns the row of a leaf in its section's table."""
    default = f"`{each.default}`" if each.default != "" else "empty"
    needs = each.needs_text
    if each.leaf.may_be_unread:
        needs += " (may be unread)"
    cells = [f"`{each.key}`", default, takes(each), needs, each.leaf.meaning]
    # A bar would end the cell.
    text = " | ".join(cell.replace("|", "/") for cell in cells)
    return f"| {text} |"
