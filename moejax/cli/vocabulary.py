"""A recipe's tokenizer, if it is a file: where it is, and how many rows of the embedding it needs.

The file is read here, before anything else, so that one that cannot be used leaves nothing behind.
"""

from typing import Any

from ml_collections import ConfigDict

from moejax.config import names_file
from moejax.data.tokenizers import check_rows, open_tokenizer
from moejax.data.tokenizers.beside import locate

LEAF = "data.tokenizer"


def complete_vocabulary(recipe: ConfigDict) -> None:
    """Sets the leaves of a recipe that follow from the file of its tokenizer.

    `data.tokenizer` becomes absolute, and `model.vocab_size=0` the number of its ids. A file that
    is gone is no error if the number is given: a run that is continued has a copy.

    Args:
      recipe: sections of leaves, which may lack some; it is changed.

    Raises:
      ConfigError: more ids than rows.
      DataError, PathError: the file cannot be used.
    """
    file = _leaf(recipe, "data", "tokenizer")
    if not names_file(file):
        return
    path = locate(file, LEAF)
    recipe.data.tokenizer = str(path)
    num_rows = _leaf(recipe, "model", "vocab_size") or 0
    if not isinstance(num_rows, int) or (num_rows and not path.exists()):
        return  # which `resolve` judges
    tokenizer = open_tokenizer(path, LEAF)
    if num_rows:
        check_rows(tokenizer, num_rows, f"{LEAF}={path}")
        return
    with recipe.unlocked():
        model = recipe.get("model", ConfigDict())
        model.vocab_size = tokenizer.vocab_size
        recipe.model = model


def _leaf(recipe: ConfigDict, section: str, name: str) -> Any:
    """Returns a leaf; None where there is none."""
    leaves = recipe.get(section)
    return leaves.get(name) if isinstance(leaves, ConfigDict) else None
