"""Everything about text that is in the folder of a released model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.config import ConfigError
from moejax.data.tokenizers import ReleasedTokenizer, check_rows, open_tokenizer
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.text.chat import ChatTemplate, read_chat
from moejax.interop.hf.text.generation import GenerationDefaults, read_generation
from moejax.paths import resolve_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""The first that is there is read."""


@dataclasses.dataclass(frozen=True)
class ReleasedText:
    """The text side of a released model.

    Attributes:
      folder: of the model.
      tokenizer: what it generates ends with any of the ids that the folder names.
      template: of its chats; None if it has none.
      generation: how it wants to be sampled.
    """

    folder: Path
    tokenizer: ReleasedTokenizer
    template: ChatTemplate | None
    generation: GenerationDefaults

    def check_rows(self, num_rows: int) -> None:
        """Raises `ConfigError` if the tokenizer has more ids than the embedding has rows.

        Args:
          num_rows: `Config.vocab_size` of the model.
        """
        check_rows(self.tokenizer, num_rows, f"the tokenizer of {self.folder}")
        for id in self.tokenizer.end_ids:
            if id >= num_rows:
                raise ConfigError(
                    f"{self.folder}: eos_token_id={id} is beyond the {num_rows} rows of the "
                    "embedding; take all files from the same model"
                )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> list[int]:
        """Returns the ids of a chat, after which the model's answer follows.

        Args:
          messages: such as `{"role": "user", "content": "Hello"}`, in order.
          **variables: see `ChatTemplate.render`.

        Raises:
          HfError: the model has no template, or see `ChatTemplate.render`.
        """
        if self.template is None:
            raise HfError(
                f"{self.folder} has no chat template, in tokenizer_config.json or "
                "chat_template.jinja; give the model a plain prompt"
            )
        text = self.template.render(messages, **variables)
        return self.tokenizer.encode_markup(text)


def find_text(folder: Path) -> ReleasedText | None:
    """Returns the text side of the model in a folder; None if it has no tokenizer.

    Raises:
      HfError, DataError: a file is damaged, or makes no sense.
    """
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    return read_text(folder) if has_tokenizer else None


def read_text(folder: str | Path) -> ReleasedText:
    """Returns the text side of the model in a folder.

    Raises:
      HfError: it has no tokenizer that is known, or something in it makes no sense.
      DataError: a file is missing or damaged.
    """
    path = resolve_path(folder)
    names = [name for name in TOKENIZER_FILES if (path / name).exists()]
    if not names:
        raise HfError(
            f"{path} has no {' and no '.join(TOKENIZER_FILES)}; put the model's own there"
        )
    generation = read_generation(path)
    tokenizer = open_tokenizer(path / names[0])
    return ReleasedText(
        folder=path,
        tokenizer=tokenizer.with_ends(generation.end_ids),
        template=read_chat(path),
        generation=generation,
    )
