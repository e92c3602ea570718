"""Which leaves of a configuration decide what a token is, so that losses in nats per token cannot be compared.

Bits per byte of the original text do not depend on the tokenizer. Between different texts they
compare the texts, too.
"""

from collections.abc import Iterable

KEEP_TOKENS = ("data.directory", "data.seq_len")
"""Leaves of `data` that change neither the text nor its tokens; a leaf that is not named here may."""

KEEP_TEXT = (*KEEP_TOKENS, "data.tokenizer", "data.vocab_size")


def token_keys(keys: Iterable[str]) -> list[str]:
    """Those of these leaves that change tokens."""
    return [key for key in keys if key.startswith("data.") and key not in KEEP_TOKENS]


def comparison_note(keys: Iterable[str]) -> str:
    """Why runs that differ in these leaves are compared by bits per byte, in words; nothing if they need not be."""
    found = token_keys(keys)
    if not found:
        return ""
    said = (
        f"They differ in {', '.join(found)}, so in what a token is, and are compared by bits per byte: losses in nats "
        "per token would favour short tokens."
    )
    if all(key in KEEP_TEXT for key in found):
        return said
    return f"{said} If their texts differ, too, part of a difference is that of the texts."
