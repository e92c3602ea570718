"""The learning rates that a sweep's trials have shown: `fair.json`, next to `sweep.json`."""

import json
import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from moejax.sweeps.fair import FairRate, Trials
from moejax.sweeps.store.record_files import RecordError, read_text
from moejax.sweeps.tables import SEED
from moejax.training.run_directory.layout import write_json

FAIR_FILE = "fair.json"
FAIR_FOLDER = "fair"
"""Of the trials, a sweep of its own in the folder of the sweep."""


def write_rates(
    directory: Path, trials: Mapping[Hashable, Trials], rates: Mapping[Hashable, FairRate]
) -> None:
    """Writes what was found for each setting."""
    rows = []
    for key, found in rates.items():
        overrides = dict(trials[key].arm.overrides)
        overrides.pop(SEED.removeprefix("override/"), None)
        losses = [loss if math.isfinite(loss) else None for loss in found.losses]
        rows.append(
            {
                "overrides": overrides,
                "learning_rate": found.rate,
                "is_bracketed": found.is_bracketed,
                "rates": list(found.rates),
                "losses": losses,
            }
        )
    write_json(directory / FAIR_FILE, {"settings": rows})


def read_rates(directory: str | Path) -> list[dict[str, Any]]:
    """Returns what `write_rates` wrote; nothing if the sweep had no trials.

    Raises:
      RecordError: the file is damaged.
    """
    path = Path(directory) / FAIR_FILE
    if not path.is_file():
        return []
    try:
        rows = json.loads(read_text(path))["settings"]
        return [_checked(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"{path} is damaged ({error}); the command of the sweep writes it again"
        ) from error


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row with values of the kinds that a page needs."""
    losses = [math.nan if loss is None else float(loss) for loss in row["losses"]]
    rates = [float(rate) for rate in row["rates"]]
    if len(losses) != len(rates):
        raise ValueError("rates and losses differ in number")
    return {
        "overrides": dict(row["overrides"]),
        "learning_rate": float(row["learning_rate"]),
        "is_bracketed": bool(row["is_bracketed"]),
        "rates": rates,
        "losses": losses,
    }
