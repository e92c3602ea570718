"""The text that ids add to what is there, as they come: a character may be spread over several."""

from collections.abc import Iterable, Sequence

from moejax.data.tokenizers.interface import Tokenizer

CONTEXT = 8
"""Ids of the context that are decoded with new ones: enough that no character is cut."""

UNFINISHED = "\ufffd"


class TextStream:
    """Decodes ids one at a time.

    Some tokenizers write a space before a text and take it away again, so that the text of a part
    of the ids is not a part of the text: ids are decoded together with some before them.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """Begins after ids whose text is known, such as those of a prompt."""
        self._tokenizer = tokenizer
        self._ids = list(context[-CONTEXT:])
        self._num_shown = len(self._ids)

    def add(self, id: int) -> str:
        """Returns the text that has become certain with one more id."""
        self._ids.append(id)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._show_all()
        return text

    def finish(self) -> str:
        """Returns the text that is left, with U+FFFD for characters that were not finished."""
        text = self._new_text()
        self._show_all()
        return text

    def _new_text(self) -> str:
        """Returns the text of the ids that are not shown yet."""
        before = self._tokenizer.decode(self._ids[: self._num_shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _show_all(self) -> None:
        self._ids = self._ids[-CONTEXT:]
        self._num_shown = len(self._ids)


def continuation(tokenizer: Tokenizer, context: Sequence[int], ids: Iterable[int]) -> str:
    """Returns the text that ids add to a context."""
    stream = TextStream(tokenizer, context)
    texts = [stream.add(id) for id in ids]
    return "".join(texts) + stream.finish()
