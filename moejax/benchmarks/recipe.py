"""A configuration as a recipe that other processes read."""

import json
from pathlib import Path

from moejax.config import Config, to_dict

RECIPE = """
import json
from pathlib import Path
from moejax import config as moejax_config

def get_config(arg=""):
    config = moejax_config.default()
    config.update(json.loads(Path(__file__).with_suffix(".json").read_text()))
    return config
"""


def write_recipe(config: Config, folder: Path) -> Path:
    """Writes a recipe that returns a configuration, whose data lie where this process has them."""
    recipe = folder / "recipe.py"
    content = to_dict(config)
    content["data"]["directory"] = str(Path(config.data.directory).resolve())
    recipe.write_text(RECIPE)
    recipe.with_suffix(".json").write_text(json.dumps(content, allow_nan=False))
    return recipe


class ChildError(RuntimeError):
    """A process that a benchmark has started failed; the message ends with what it said."""
