"""From documents to batches: what a step trains on is a pure function of (seed, step, process).

The path: `sources` yields documents, `tokenizers` turns them into ids, `packing` lays the ids out
in fixed rows, `rows` prepares those rows once on disk, `batches` shuffles and stacks them. Nothing
here loads `tensorflow_datasets` or `grain` before it is used.
"""

from moejax.data.batches import Batch, TrainBatches, eval_batches
from moejax.data.errors import DataError
from moejax.data.rows import Corpus, find_rows, prepare
from moejax.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "DataError",
    "Tokenizer",
    "TrainBatches",
    "eval_batches",
    "find_rows",
    "load_tokenizer",
    "prepare",
]
