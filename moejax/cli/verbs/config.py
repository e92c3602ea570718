"""Show every setting of a recipe: its value, its default, its range, and what it means.

  moejax config --config=configs/tiny_moe.py
  moejax config --config=configs/tiny_moe.py --config.moe.router=sinkhorn --all

Without --all, the settings that the recipe changes; without --config, the defaults of all.
Nothing is trained.
"""

from typing import Any

from absl import flags
from absl.flags import FlagValues
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moejax.cli import UsageError
from moejax.cli.options import define_config, define_json, read_config_flag
from moejax.cli.tables import print_result
from moejax.config import declared, default, resolve, rows_of, settings_page


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_json(values)
    flags.DEFINE_bool(
        "all", False, "show every setting, not only those that differ", flag_values=values
    )
    flags.DEFINE_bool(
        "markdown",
        False,
        "print docs/settings.md, which describes every setting",
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Prints the settings."""
    if values.markdown:
        if values["config"].value is not None or values.all or values.json:
            raise UsageError(
                "--markdown prints the same page for every recipe; leave the other flags out"
            )
        print(settings_page(), end="")
        return
    has_recipe = values["config"].value is not None
    config = read_config_flag(values) if has_recipe else resolve({})
    rows = rows_of(config, values.config.to_dict() if has_recipe else default().to_dict())
    if has_recipe and not values.all:
        rows = [row for row in rows if row["differs"]]
    if values.json:
        print_result({row.pop("key"): row for row in rows}, is_json=True)
    else:
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("setting", "value", "default", "takes", "meaning"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = "bold" if row["differs"] else ""
        unread = (
            f" (not read here: it needs {row['needs'] or 'experts'})" if not row["read"] else ""
        )
        cells = [
            row["key"],
            _value(row),
            str(row["default"]),
            row["takes"],
            row["meaning"] + unread,
        ]
        table.add_row(*(Text(cell, style=style) for cell in cells))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for every column
        console = Console(
            width=max(console.width, Console(width=10_000).measure(table).maximum + 10)
        )
    console.print(table)
    differing = sum(row["differs"] for row in rows)
    more = "; --all shows the others" if len(rows) < len(declared()) else ""
    print(
        f"{differing} of {len(declared())} settings differ from their default{more}; * is derived from others"
    )


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']}{' *' if row['derived'] else ''}"
