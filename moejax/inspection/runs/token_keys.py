"""Leaves of a configuration that decide what a token is.

Losses in nats per token cannot be compared between runs that differ in one of them. Bits per byte
of the original text do not depend on the tokenizer. Between different texts they compare the texts,
too.
"""

from collections.abc import Iterable

KEEP_TOKENS = ("data.directory", "data.seq_len")
"""Leaves of `data` that change neither the text nor its tokens; any other leaf may."""

KEEP_TEXT = (*KEEP_TOKENS, "data.tokenizer", "data.vocab_size")


def token_keys(keys: Iterable[str]) -> list[str]:
    """Returns those of these leaves that change tokens."""
    return [key for key in keys if key.startswith("data.") and key not in KEEP_TOKENS]


def comparison_note(keys: Iterable[str]) -> str:
    """Returns why runs that differ in these leaves are compared by bits per byte, in words.

    Empty if they need not be.
    """
    found = token_keys(keys)
    if not found:
        return ""
    note = (
        f"They differ in {', '.join(found)}, so in what a token is, and are compared by bits per "
        "byte: losses in nats per token would favour short tokens."
    )
    if all(key in KEEP_TEXT for key in found):
        return note
    return f"{note} If their texts differ, too, part of a difference is that of the texts."
