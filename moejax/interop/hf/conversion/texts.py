"""What a released model's folder holds besides weights, kept in the run directory.

It is copied as it is: the configuration, the tokenizer and its chat template, the defaults of
generation. With the types of the weights, it makes a folder again that equals the first one.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from moejax.config import Config
from moejax.data import Tokenizer
from moejax.data.tokenizers.ids import IdTokenizer
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.files.stored import DTYPES, StoredTensor
from moejax.interop.hf.load import Checkpoint
from moejax.interop.hf.text.folder import TOKENIZER_FILES, find_text

TYPES_FILE = "types.json"

TYPE_OF_QUANTIZED = "BF16"
"""As which weights in blocks of few bits are written: what is left of their scales is rounded."""

TEXTS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that are kept, where they are."""


def keep_texts(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies what a released model's folder holds besides weights, and the types of these.

    Args:
      checkpoint: the released model.
      folder: is made.
    """
    folder.mkdir()
    for name in TEXTS:
        path = checkpoint.folder / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
    types = {}
    for name in checkpoint.weights.names:
        source = checkpoint.weights.source(name)
        types[name] = source.type if isinstance(source, StoredTensor) else TYPE_OF_QUANTIZED
    (folder / TYPES_FILE).write_text(json.dumps(types, indent=1))


def released_tokenizer(config: Config, folder: Path) -> tuple[Config, Tokenizer]:
    """Returns the configuration with the tokenizer of a folder, and that tokenizer.

    Without a tokenizer in the folder, text is token ids.

    Args:
      config: of the model.
      folder: of the released model.

    Raises:
      ConfigError: the tokenizer has more ids than the embedding has rows.
      DataError, HfError: its files are damaged.
    """
    text = find_text(folder)
    if text is None:
        tokenizer: Tokenizer = IdTokenizer(config.vocab_size)
        file = TOKENIZER_FILES[0]
    else:
        text.check_rows(config.vocab_size)
        tokenizer = text.tokenizer
        file = next(str(folder / name) for name in TOKENIZER_FILES if (folder / name).exists())
    data = dataclasses.replace(config.data, tokenizer=file)
    return dataclasses.replace(config, data=data), tokenizer


def read_types(folder: Path) -> dict[str, str]:
    """Returns the types of the released model's tensors by name; empty for another model."""
    path = folder / TYPES_FILE
    if not path.is_file():
        return {}
    try:
        types = json.loads(path.read_bytes())
        are_known = all(kind in DTYPES for kind in types.values())
    except (ValueError, RecursionError, AttributeError) as error:
        raise HfError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not are_known:
        raise HfError(f"{path} is damaged: it has types that are none; restore it from a copy")
    return types
