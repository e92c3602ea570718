"""What stands for the tokenizer of a model that came without one: text is token ids."""

from collections.abc import Iterable
from pathlib import Path

from moejax.data.errors import DataError
from moejax.data.tokenizers.interface import save_files


class IdTokenizer:
    """Text is token ids with spaces between them, such as `5 17 3`.

    Args:
      vocab_size: number of ids.
    """

    kind = "ids"
    pad_id = bos_id = eos_id = 0
    end_ids: tuple[int, ...] = ()
    adds_bos = False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.fingerprint = f"ids-{vocab_size}"

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`.

        Raises:
          DataError: the text is no list of ids.
        """
        ids = []
        for word in text.split():
            is_id = word.isascii() and word.isdigit() and int(word) < self.vocab_size
            if not is_id:
                raise DataError(
                    f"the model came without a tokenizer, so text must be token ids below "
                    f"{self.vocab_size}, such as 5 17 3, and {word[:20]!r} is none; put the "
                    "model's tokenizer.json or tokenizer.model beside its config.json"
                )
            ids.append(int(word))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return " ".join(str(id) for id in ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        return str(id)

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        save_files(directory, {"kind": self.kind, "vocab_size": self.vocab_size})
