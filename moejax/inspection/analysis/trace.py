"""Routes the tokens of a text, or of many rows of a corpus.

`trace` shows one text in full: experts, weights, logits and probabilities of every token in every
MoE layer. A `Trace` shows itself in a notebook and becomes a table. `route_corpus` keeps only
experts and weights, of many tokens.

Routing is that of evaluation: nothing is drawn at random, and choices are those before any
capacity drops some.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32

from moejax.data.packing import FEATURES
from moejax.inspection.analysis.trace_view import Trace
from moejax.seeds import check_seed

if TYPE_CHECKING:  # imported where they are needed
    from moejax.data import Corpus
    from moejax.inference.load import LoadedRun
    from moejax.inference.route import RoutedRows

TOKENS_AT_ONCE = 8192  # of a corpus, on the device
PER_TOKEN = ("tokens", "rows", "positions", "documents")
PER_CHOICE = ("experts", "weights")


class TraceError(ValueError):
    """Tokens that cannot be traced."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RoutedTokens:
    """Real tokens of rows of a split in reading order, padding left out.

    Attributes:
      tokens_T: ids, int32.
      rows_T: row of the split, int32.
      positions_T: position in its piece of a document, int32; 0 starts a piece.
      documents_T: document of the split, int32, in the order of its labels.
      experts_NTK: the experts of each token, the best first, int32; `num_experts` where there is no
        (further) expert.
      weights_NTK: their combine weights, float32; 0 where there is no expert.
      entropy_N: mean entropy of the router's distribution over experts, nats.
      num_experts: width of the router, E.
      layers: model layer of each MoE layer.
    """

    tokens_T: Int32[np.ndarray, "T"]
    rows_T: Int32[np.ndarray, "T"]
    positions_T: Int32[np.ndarray, "T"]
    documents_T: Int32[np.ndarray, "T"]
    experts_NTK: Int32[np.ndarray, "N T K"]
    weights_NTK: Float32[np.ndarray, "N T K"]
    entropy_N: Float64[np.ndarray, "N"]
    num_experts: int
    layers: tuple[int, ...]

    def __repr__(self) -> str:
        num_tokens = len(self.tokens_T)
        num_rows = len(np.unique(self.rows_T))
        return (
            f"RoutedTokens({num_tokens:,} tokens of {num_rows:,} rows "
            f"through {len(self.layers)} MoE layers of {self.num_experts} experts)"
        )


def trace(model: "LoadedRun", text_or_tokens: str | Sequence[int] | np.ndarray) -> Trace:
    """Routes a text.

    It may be longer than the rows that the model was trained on: rotary positions and
    attention have no limit, but the model has seen no such positions. Memory grows with the
    square of the length.

    Args:
      model: from `Run.load` or `load_run`.
      text_or_tokens: a text, before which the begin-of-document token is put if the model was
        trained so (`inference.generate.prompt_ids`); or token ids as they are.

    Raises:
      TraceError: no tokens, or ids outside the vocabulary.
      ConfigError: the model has no experts.
    """
    from moejax.inference.route import padded_length, route_rows, rows_at_once

    tokens_T = _as_tokens(model, text_or_tokens)
    length = len(tokens_T)
    padded = padded_length(model, length)
    shape = (rows_at_once(model, 1), padded)  # the text is in the first row
    tokens_BL = np.zeros(shape, np.int32)
    tokens_BL[0, :length] = tokens_T
    segments_BL = np.zeros(shape, np.int32)
    segments_BL[0, :length] = 1
    positions_BL = np.zeros(shape, np.int32)
    positions_BL[:] = np.arange(padded)
    routed = route_rows(model, tokens_BL, segments_BL, positions_BL, with_scores=True)
    return Trace(
        tokens_T=tokens_T,
        pieces=tuple(model.tokenizer.piece(int(token)) for token in tokens_T),
        layers=model.config.moe_layers,
        # Rows are flattened, so the first tokens are those of the text.
        experts_NTK=np.asarray(routed.experts_NTK)[:, :length],
        weights_NTK=np.asarray(routed.weights_NTK)[:, :length],
        logits_NTE=np.asarray(routed.logits_NTE)[:, :length],
        probs_NTE=np.asarray(routed.probs_NTE)[:, :length],
        num_experts=model.config.moe.num_choices,
    )


def route_corpus(
    model: "LoadedRun",
    corpus: "Corpus",
    *,
    split: str = "validation",
    max_rows: int | None = None,
    seed: int = 0,
) -> RoutedTokens:
    """Routes rows of a corpus, as evaluation does.

    Memory grows with the rows: about 8 N K bytes a token.

    Args:
      model: from `Run.load` or `load_run`.
      corpus: rows made with the model's tokenizer.
      split: which of its splits.
      max_rows: at most that many rows, spread over the split; None routes all.
      seed: of the choice of rows.

    Raises:
      TraceError: `max_rows` is below 1.
      ConfigError: the model has no experts.
    """
    from moejax.inference.route import route_rows, rows_at_once

    stored = corpus.rows(split)
    chosen = spread_rows(len(stored), max_rows, seed)
    wanted = max(1, TOKENS_AT_ONCE // corpus.seq_len)
    at_once = rows_at_once(model, min(len(chosen), wanted))
    parts = []
    entropy_N = np.zeros(model.config.num_moe_layers)
    for first in range(0, len(chosen), at_once):
        indices = chosen[first : first + at_once]
        stored_rows = [stored[int(index)] for index in indices]
        rows = _stack(stored_rows, at_once, corpus.seq_len)
        routed = route_rows(model, rows["tokens"], rows["segments"], rows["positions"])
        parts.append(_real_tokens(rows, indices, routed))
        entropy_N += np.asarray(routed.entropy_N)
    found = _concatenate(parts)
    return RoutedTokens(
        **found,
        entropy_N=entropy_N / len(found["tokens_T"]),
        num_experts=model.config.moe.num_choices,
        layers=model.config.moe_layers,
    )


def _real_tokens(
    rows: Mapping[str, np.ndarray],
    indices: np.ndarray,
    routed: "RoutedRows",
) -> dict[str, np.ndarray]:
    """Returns what `RoutedTokens` holds of some rows, without padding.

    Args:
      rows: inputs of the model; rows of padding follow after the real ones.
      indices: of the real rows in the split.
      routed: from `route_rows`.
    """
    shape = rows["tokens"].shape
    segments_T = rows["segments"].reshape(-1)
    is_token_T = segments_T > 0
    num_padding_rows = shape[0] - len(indices)
    row_B = np.pad(indices, (0, num_padding_rows))
    row_BL = np.broadcast_to(row_B[:, None], shape)
    found = {}
    for name in PER_TOKEN:
        values_BL = row_BL if name == "rows" else rows[name]
        values_T = values_BL.reshape(-1)
        values_t = values_T[is_token_T]
        found[name] = values_t.astype(np.int32)
    for name in PER_CHOICE:
        values_NTK = np.asarray(getattr(routed, f"{name}_NTK"))
        found[name] = values_NTK[:, is_token_T]
    return found


def _concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Returns the arrays of all parts by the names of `RoutedTokens`."""
    found = {}
    for name in PER_TOKEN:
        arrays_T = [part[name] for part in parts]
        found[f"{name}_T"] = np.concatenate(arrays_T)
    for name in PER_CHOICE:
        arrays_NTK = [part[name] for part in parts]
        found[f"{name}_NTK"] = np.concatenate(arrays_NTK, axis=1)
    return found


def spread_rows(num_rows: int, max_rows: int | None, seed: int) -> Int[np.ndarray, "R"]:
    """Draws increasing rows, one from each of `max_rows` equal parts of the split.

    Returns all rows if there are no more than that.

    Raises:
      TraceError: `max_rows` is below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise TraceError(f"max_rows={max_rows} must be at least 1, or None for all rows")
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows)
    check_seed("seed", seed)
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, num_rows, max_rows + 1).astype(int)
    starts = edges[:-1]
    ends = edges[1:]
    return rng.integers(starts, ends)


def _stack(
    rows: Sequence[dict[str, np.ndarray]],
    num_rows: int,
    seq_len: int,
) -> dict[str, np.ndarray]:
    """Returns the inputs of rows, `[num_rows, seq_len]`, filled up with rows of padding."""
    stacked = {}
    for name in FEATURES:
        inputs = [row[name][:-1] for row in rows]
        values_BL = np.zeros((num_rows, seq_len), np.int32)
        values_BL[: len(rows)] = inputs
        stacked[name] = values_BL
    return stacked


def _as_tokens(
    model: "LoadedRun",
    text_or_tokens: str | Sequence[int] | np.ndarray,
) -> Int32[np.ndarray, "T"]:
    """Returns the token ids of a text, or those that were given, checked."""
    from moejax.inference.generate import prompt_ids

    if isinstance(text_or_tokens, str):
        ids = prompt_ids(model.tokenizer, text_or_tokens)
        return np.array(ids, np.int32)
    tokens = np.asarray(text_or_tokens)
    is_integer = np.issubdtype(tokens.dtype, np.integer)
    if tokens.ndim != 1 or not tokens.size or not is_integer:
        raise TraceError(
            f"tokens of shape {tokens.shape} and type {tokens.dtype} must be integers [T], "
            "at least one; trace one text"
        )
    vocab_size = model.config.vocab_size
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= vocab_size:
        raise TraceError(f"token ids from {low} to {high} must be in [0, {vocab_size})")
    return tokens.astype(np.int32)
