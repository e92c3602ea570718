"""A recipe's tokenizer, if it is a file: where it is, and how many rows of the embedding it needs.

The file is read here, before anything else, so that one that cannot be used leaves nothing behind.
"""

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
      recipe: sections of leaves; it is changed.

    Raises:
      ConfigError: more ids than rows.
      DataError, PathError: the file cannot be used.
    """
    file = recipe.get("data", {}).get("tokenizer")
    if not names_file(file):
        return
    path = locate(file, LEAF)
    recipe.data.tokenizer = str(path)
    num_rows = recipe.get("model", {}).get("vocab_size")
    if num_rows and not path.exists():
        return
    tokenizer = open_tokenizer(path, LEAF)
    if not num_rows:
        recipe.model.vocab_size = tokenizer.vocab_size
        return
    check_rows(tokenizer, num_rows, f"{LEAF}={path}")
