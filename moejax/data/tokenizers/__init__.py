"""Text to token ids and back: raw bytes, byte-pair encoding (BPE), or a released model's tokenizer.

BPE is learnt from the training split. Bytes and learnt BPE are lossless: `decode(encode(text)) ==
text` for every string, whatever its whitespace, because no text is normalised and a character
outside the vocabulary is written as its UTF-8 bytes. Ids 0, 1 and 2 are padding, begin of document
and end of document in both; `encode` never produces them. A released model's tokenizer has its own
special ids, and may normalise text.
"""

from moejax.data.tokenizers.interface import SPACE_MARK, SPECIAL_PIECES, Tokenizer, check_rows
from moejax.data.tokenizers.learned import SentencePieceTokenizer, train_sentencepiece
from moejax.data.tokenizers.load import load_tokenizer, open_tokenizer
from moejax.data.tokenizers.released import ReleasedTokenizer
from moejax.data.tokenizers.stream import TextStream, continuation
from moejax.data.tokenizers.utf8 import ByteTokenizer

__all__ = [
    "SPACE_MARK",
    "SPECIAL_PIECES",
    "ByteTokenizer",
    "ReleasedTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "Tokenizer",
    "check_rows",
    "continuation",
    "load_tokenizer",
    "open_tokenizer",
    "train_sentencepiece",
]
