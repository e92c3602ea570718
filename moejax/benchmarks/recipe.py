"""What benchmarks give the processes that they start: a recipe, and a compilation cache."""

import json
import os
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
    """Writes a recipe that returns a configuration, with the data directory of this process."""
    recipe = folder / "recipe.py"
    content = to_dict(config)
    data_directory = Path(config.data.directory).resolve()
    content["data"]["directory"] = str(data_directory)
    recipe.write_text(RECIPE)
    text = json.dumps(content, allow_nan=False)
    recipe.with_suffix(".json").write_text(text)
    return recipe


def with_cache(folder: Path) -> dict[str, str]:
    """Returns the environment with `folder` as the user's cache, where moejax keeps programs."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would take precedence
    return environment


class ChildError(RuntimeError):
    """A process that a benchmark started has failed; the message ends with its error output."""
