"""From a run directory to its report: routes validation text, writes samples, renders the page."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moejax.data import Corpus, prepare
from moejax.inference.generate import generate_text
from moejax.inference.load import LoadedRun, load_run
from moejax.inspection.report import Sample, render_report, write_report
from moejax.inspection.run import open_run
from moejax.inspection.specialisation import count_tokens_by_expert
from moejax.inspection.trace import route_corpus

TRACED_ROWS = 256
NUM_SAMPLES = 3
PROMPT_TOKENS = 12
SAMPLE_TOKENS = 120
TEMPERATURE, TOP_P = 0.8, 0.95

log = logging.getLogger("moejax")


def build_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html`, from the run directory alone; validation rows are prepared again if they are gone.

    Returns:
      The page's path.
    """
    record = open_run(workdir)
    loaded = load_run(workdir)
    corpus = prepare(loaded.config.data, loaded.tokenizer)
    token_counts_NEV = count_routed_tokens(loaded, corpus) if loaded.config.num_moe_layers else None
    html = render_report(
        record, token_counts_NEV=token_counts_NEV, piece=loaded.tokenizer.piece, samples=write_samples(loaded, corpus)
    )
    return write_report(workdir, html)


def count_routed_tokens(loaded: LoadedRun, corpus: Corpus) -> np.ndarray:
    """How often each expert of each MoE layer got each token of the vocabulary, on validation rows: `[N, E, V]`."""
    routed = route_corpus(loaded, corpus, max_rows=TRACED_ROWS)
    is_token_T = np.ones(len(routed.tokens_T), bool)
    return count_tokens_by_expert(
        routed.tokens_T, routed.experts_NTK, loaded.config.vocab_size, routed.num_experts, is_token_T
    )


def write_samples(loaded: LoadedRun, corpus: Corpus) -> list[Sample]:
    """Continues the first words of some validation rows."""
    rows = corpus.rows("validation")
    step = max(1, len(rows) // NUM_SAMPLES)
    prompts = [_beginning(rows[i], loaded.tokenizer.decode) for i in range(0, len(rows), step)][:NUM_SAMPLES]
    texts = generate_text(
        loaded.model, loaded.tokenizer, prompts, max_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, top_p=TOP_P
    )
    return [Sample(prompt, text, TEMPERATURE, TOP_P) for prompt, text in zip(prompts, texts, strict=True)]


def _beginning(row: dict[str, np.ndarray], decode: Callable[[list[int]], str]) -> str:
    is_first = row["segments"][:PROMPT_TOKENS] == 1
    return decode(row["tokens"][:PROMPT_TOKENS][is_first].tolist())
