"""From a run directory to its report: routes validation text, writes samples, renders the page."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moejax.data import Corpus
from moejax.data.labels import Labels
from moejax.data.packing import Row
from moejax.inference.generate import generate_text
from moejax.inference.load import LoadedRun, load_run
from moejax.inspection.analysis.attributes import Attribute, attributes_of
from moejax.inspection.analysis.expert_profile import domain_specialisation
from moejax.inspection.analysis.information import Information, expert_information
from moejax.inspection.analysis.specialisation import count_tokens_by_expert
from moejax.inspection.analysis.trace import RoutedTokens, route_corpus, trace
from moejax.inspection.analysis.trace_view import Trace
from moejax.inspection.report.assemble import render_report, write_report
from moejax.inspection.report.experts import ReportData
from moejax.inspection.report.page import drawn_layers
from moejax.inspection.report.training import Sample
from moejax.inspection.runs.errors import RunError
from moejax.inspection.runs.run import Run, open_run
from moejax.training.evaluation import domains_of
from moejax.training.run_directory.reader import RunDirectory
from moejax.training.run_directory.text import TextPlaces

TRACED_TOKENS = 65_536
MEASURED_TOKENS = 32_768  # of these, in which attributes are measured: more take long
NUM_PERMUTATIONS = 4
PASSAGE_TOKENS, PASSAGE_CELLS = 256, 1_600  # at most: tokens, and tokens times layers
NUM_SAMPLES = 3
PROMPT_TOKENS = 12
SAMPLE_TOKENS = 120
TEMPERATURE, TOP_P = 0.8, 0.95


def build_report(workdir: str | Path, places: TextPlaces | None = None) -> Path:
    """Writes `workdir/report.html`; validation rows are prepared again if they are gone.

    Args:
      workdir: the run directory.
      places: where the user says that the run's text is.

    Returns:
      The page's path.

    Raises:
      RunError: nothing was trained there.
    """
    record = open_run(workdir)
    _check_trained(record)
    loaded = load_run(workdir)
    corpus = loaded.corpus(places)
    token_counts_nEV, findings = None, ReportData()
    if loaded.config.num_moe_layers:
        max_rows = max(1, TRACED_TOKENS // corpus.seq_len)
        routed = route_corpus(loaded, corpus, max_rows=max_rows)
        token_counts_nEV = count_routed_tokens(routed, loaded.config.vocab_size)
        labels = domains_of(corpus)
        findings = find_specialisation(routed, loaded.tokenizer.piece, labels=labels)
        findings = dataclasses.replace(findings, trace=trace_passage(loaded, corpus))
    document = render_report(
        record,
        token_counts_nEV=token_counts_nEV,
        piece=loaded.tokenizer.piece,
        samples=write_samples(loaded, corpus),
        findings=findings,
    )
    return write_report(record.workdir, document)


def _check_trained(record: Run) -> None:
    """Raises `RunError` if there are no metrics to report, before the model is loaded."""
    files = RunDirectory(record.workdir)
    if not files.metrics.exists() and files.read_facts().get("corpus", "") is None:
        raise RunError(
            f"{record.workdir} holds converted weights that have trained nothing, so there is "
            "nothing to report; moejax inspect --workdir= shows what they do"
        )
    _ = record.keys  # reads the metrics


def count_routed_tokens(routed: RoutedTokens, vocab_size: int) -> np.ndarray:
    """Returns how often each expert of the `drawn_layers` got each token: `[n, E, V]`."""
    layers = drawn_layers(len(routed.layers))
    experts_nTK = routed.experts_NTK[layers]
    num_tokens = len(routed.tokens_T)
    is_token_T = np.ones(num_tokens, bool)
    return count_tokens_by_expert(
        routed.tokens_T,
        experts_nTK,
        vocab_size,
        routed.num_experts,
        is_token_T,
    )


def find_specialisation(
    routed: RoutedTokens,
    piece: Callable[[int], str],
    *,
    labels: Labels | None = None,
) -> ReportData:
    """Measures what attributes of tokens, and domains of documents, tell about the experts.

    Args:
      routed: validation tokens. Of deep models, evenly spaced layers are measured.
      piece: token id to text.
      labels: the domains of the split's documents; None if they have none.
    """
    layers = drawn_layers(len(routed.layers))
    experts_nTK = routed.experts_NTK[layers]
    num_tokens = len(routed.tokens_T)
    places = _measured_places(num_tokens)
    attributes = attributes_of(routed.tokens_T, routed.rows_T, routed.positions_T, piece)
    measure = functools.partial(_measure, experts_nTK=experts_nTK, num_experts=routed.num_experts)
    information = [measure(attribute, places) for attribute in attributes]
    found = ReportData(information, [routed.layers[n] for n in layers], num_tokens)
    if labels is None:
        return found
    is_labelled_T = routed.documents_T >= 0
    domains_T = np.where(is_labelled_T, labels.domain_of_document[routed.documents_T], -1)
    labelled = places[domains_T[places] >= 0]
    domain, token = Attribute("domain", domains_T), attributes[0]
    information += [
        measure(domain, labelled),
        measure(domain, labelled, given=token),
        measure(token, labelled, given=domain),
    ]
    domains = domain_specialisation(domains_T, experts_nTK, len(labels.domains), routed.num_experts)
    return dataclasses.replace(
        found, information=information, domains=domains, domain_names=labels.domains
    )


def _measured_places(num_tokens: int) -> np.ndarray:
    """Draws the places of at most `MEASURED_TOKENS` tokens, in order; all if there are no more."""
    if num_tokens <= MEASURED_TOKENS:
        return np.arange(num_tokens)
    rng = np.random.default_rng(0)
    return np.sort(rng.choice(num_tokens, MEASURED_TOKENS, replace=False))


def _measure(
    attribute: Attribute,
    places: np.ndarray,
    *,
    experts_nTK: np.ndarray,
    num_experts: int,
    given: Attribute | None = None,
) -> Information:
    """Measures what an attribute tells about experts, or adds to what `given` tells about them."""
    return expert_information(
        attribute.at(places),
        experts_nTK[:, places],
        num_experts,
        num_permutations=NUM_PERMUTATIONS,
        given=None if given is None else given.at(places),
    )


def trace_passage(loaded: LoadedRun, corpus: Corpus) -> Trace:
    """Routes the first words of the first validation row; of deep models evenly spaced layers."""
    layers = drawn_layers(loaded.config.num_moe_layers)
    tokens = passage_tokens(corpus, len(layers))
    return trace(loaded, tokens).of_layers(layers)


def passage_tokens(corpus: Corpus, num_layers: int) -> np.ndarray:
    """Returns the first words of the first validation row, fewer where many layers are shown."""
    length = min(PASSAGE_TOKENS, PASSAGE_CELLS // num_layers)
    return _first_tokens(corpus.rows("validation")[0], length)


def write_samples(loaded: LoadedRun, corpus: Corpus) -> list[Sample]:
    """Continues the first words of some validation rows."""
    rows = corpus.rows("validation")
    step = max(1, len(rows) // NUM_SAMPLES)
    chosen = range(0, len(rows), step)[:NUM_SAMPLES]
    prompts = [_beginning(rows[i], loaded.tokenizer.decode) for i in chosen]
    texts = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_tokens=SAMPLE_TOKENS,
        temperature=TEMPERATURE,
        top_p=TOP_P,
    )
    pairs = zip(prompts, texts, strict=True)
    return [Sample(prompt, text, TEMPERATURE, TOP_P) for prompt, text in pairs]


def _beginning(row: Row, decode: Callable[[list[int]], str]) -> str:
    """Returns the first words of a row's first document."""
    tokens = _first_tokens(row, PROMPT_TOKENS)
    return decode(tokens.tolist())


def _first_tokens(row: Row, length: int) -> np.ndarray:
    """Returns at most `length` tokens of a row's first document."""
    tokens = row["tokens"][:length]
    segments = row["segments"][:length]
    return tokens[segments == 1]
