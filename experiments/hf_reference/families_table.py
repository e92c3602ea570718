"""Writes the table of docs/families.md: what loads, what was compared, largest differences seen.

    python experiments/hf_reference/families_table.py   # two minutes

It compares every folder of tests/data/hf and replaces the table between its markers.
"""

import importlib
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from moejax.interop.hf import families
from moejax.interop.hf.conversion.compare import Comparison, compare, read_reference
from moejax.interop.hf.families import FAMILIES
from moejax.interop.hf.family import Family
from moejax.interop.hf.load import load_model, read_config

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "data" / "hf"
PAGE = REPOSITORY / "docs" / "families.md"
BEGIN, END = "<!-- table of families -->\n", "<!-- end of the table -->\n"
HEAD = (
    "| model_type | models | checkpoints compared | outputs | gradients | arrays |\n"
    + 6 * "|---"
    + "|\n"
)


def models_of(family: Family) -> str:
    """Returns which models a family is, from the first line of its file."""
    for module in _modules():
        if any(value is family for value in vars(module).values()):
            line = (module.__doc__ or "").partition("\n")[0]
            return line.rstrip(".")
    raise ValueError(f"{family.model_type} has no file")


def _modules() -> Iterator[object]:
    for found in pkgutil.walk_packages(families.__path__, f"{families.__name__}."):
        if not found.ispkg:
            yield importlib.import_module(found.name)


def fixtures_of(model_type: str) -> list[Path]:
    """Returns the folders of a family's checkpoints."""
    folders = sorted(path.parent for path in FIXTURES.glob("*/reference.npz"))
    return [folder for folder in folders if read_config(folder)[1].model_type == model_type]


def measure(folder: Path) -> Comparison:
    """Compares a checkpoint with its reference."""
    _, family = read_config(folder)
    return compare(load_model(folder), family, read_reference(folder / "reference.npz"))


def largest(comparisons: list[Comparison], *, of_gradients: bool) -> float:
    """Returns the largest relative difference of outputs, or of gradients; 0 without any."""
    found = [0.0]
    for comparison in comparisons:
        for each in comparison.differences:
            if each.name.startswith("grad") == of_gradients:
                found.append(each.relative)
    return max(found)


def shown(difference: float) -> str:
    """Returns a difference, rounded up to one digit: the next machine rounds otherwise."""
    if difference == 0:
        return ""
    exponent = math.floor(math.log10(difference))
    digit = math.ceil(difference / 10.0**exponent)
    return f"1e{exponent + 1}" if digit == 10 else f"{digit}e{exponent}"


def row(model_type: str, family: Family) -> str:
    """Returns a line of the table."""
    folders = fixtures_of(model_type)
    comparisons = [measure(folder) for folder in folders]
    for folder, comparison in zip(folders, comparisons, strict=True):
        if not comparison.agrees:
            raise ValueError(
                f"{folder} differs from its reference: moejax convert --compare says how"
            )
    cells = [
        f"`{model_type}`",
        models_of(family),
        ", ".join(folder.name for folder in folders) or "none of its own",
        shown(largest(comparisons, of_gradients=False)),
        shown(largest(comparisons, of_gradients=True)),
        str(sum(len(comparison.differences) for comparison in comparisons) or ""),
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Replaces the table."""
    table = HEAD + "".join(row(*entry) for entry in FAMILIES.items())
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table + END + after)


if __name__ == "__main__":
    main()
