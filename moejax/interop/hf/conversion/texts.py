"""What a released model's folder holds besides weights, kept in the run directory.

It is copied as it is: the configuration, the tokenizer and its chat template, the defaults of
generation. With the types of the weights, it makes a folder again that equals the first one.
"""

import json
import shutil
from pathlib import Path

from moejax.interop.hf.files.stored import StoredTensor
from moejax.interop.hf.load import Checkpoint

SOURCE_FOLDER = "hf"
TYPES_FILE = "types.json"

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
        types[name] = source.type if isinstance(source, StoredTensor) else "BF16"
    (folder / TYPES_FILE).write_text(json.dumps(types, indent=1))


def read_types(folder: Path) -> dict[str, str]:
    """Returns the types of the released model's tensors by name; empty for another model."""
    path = folder / TYPES_FILE
    if not path.is_file():
        return {}
    return {str(name): str(kind) for name, kind in json.loads(path.read_bytes()).items()}
