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
        "all",
        False,
        "show every setting, not only those that differ",
        flag_values=values,
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
    if has_recipe:
        rows = rows_of(read_config_flag(values), values.config.to_dict())
    else:
        rows = rows_of(resolve({}), default().to_dict())
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
        cells = [Text(cell, style=style) for cell in _cells(row)]
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for every column
        measured = Console(width=10_000).measure(table).maximum
        console = Console(width=max(console.width, measured + 10))
    console.print(table)
    differing = sum(row["differs"] for row in rows)
    num_settings = len(declared())
    more = "; --all shows the others" if len(rows) < num_settings else ""
    print(
        f"{differing} of {num_settings} settings differ from their default{more}; * is derived "
        "from others"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    """Returns a setting's key, value, default, range and meaning."""
    derived = " *" if row["derived"] else ""
    unread = f" (not read here: it needs {row['needs'] or 'experts'})"
    return [
        row["key"],
        f"{row['value']}{derived}",
        str(row["default"]),
        row["takes"],
        row["meaning"] + ("" if row["read"] else unread),
    ]
