"""The run that a recipe begins with, `init.source`: where it is, before anything else is done."""

from absl.flags import FlagValues
from ml_collections import ConfigDict

from moejax.cli.errors import UsageError
from moejax.paths import resolve_path
from moejax.training.forking.source import split_source


def take_init_flag(values: FlagValues) -> None:
    """Sets `init.source` of the recipe to what `--init` gives.

    Raises:
      UsageError: the recipe names another source.
    """
    if not values.init:
        return
    section = values.config.get("init", ConfigDict())
    given = section.get("source", "")
    if given and given != values.init:
        raise UsageError(
            f"--init={values.init} and config.init.source={given} name two sources; leave one out"
        )
    with values.config.unlocked():
        section.source = values.init
        values.config.init = section


def complete_source(recipe: ConfigDict) -> None:
    """Makes the folder of `init.source` absolute, so that the run may continue from elsewhere."""
    section = recipe.get("init")
    source = section.get("source") if isinstance(section, ConfigDict) else None
    if not isinstance(source, str) or not source:
        return  # or `resolve` judges it
    folder, step = split_source(source)
    absolute = str(resolve_path(folder, "init.source"))
    section.source = absolute if step is None else f"{absolute}:{step}"
