"""Measures the routing of a checkpoint: by layer over validation rows, and token by token.

Nothing but the model, its tokenizer and a text is needed, so a released model is inspected from its
folder alone. One that came without a tokenizer routes prompts of token ids, and no rows.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config import Config
from moejax.data import Corpus
from moejax.data.labels import Labels
from moejax.data.tokenizers.ids import IdTokenizer
from moejax.inference.load import LoadedRun
from moejax.inspection.analysis.expert_profile import coactivation_ratio
from moejax.inspection.analysis.trace import RoutedTokens, route_corpus, trace
from moejax.inspection.analysis.trace_view import Trace
from moejax.inspection.counterfactuals.evaluate import counterfactuals
from moejax.inspection.counterfactuals.result import Counterfactuals
from moejax.inspection.figures.load import load_ratio
from moejax.inspection.report.build import passage_tokens
from moejax.inspection.report.page import drawn_layers
from moejax.kernels.device import platform
from moejax.moe.router.by_token import coactivation
from moejax.planning.count import count
from moejax.training.evaluation import domains_of
from moejax.training.run_directory.text import TextPlaces

SECONDS = 60.0
"""How long routing rows is to take, unless the user says how many."""

CPU_SPEED, OTHER_SPEED = 5e10, 2e13
"""FLOPs a second, for guessing how long a pass takes."""

MOST_TOKENS = 65_536
"""Of the rows that are routed, unless the user says how many."""

ROWS_PER_COUNTERFACTUAL_ROW = 16
"""Counterfactuals take a pass for each change, so they are of fewer rows."""

log = logging.getLogger("moejax")


class InspectionError(ValueError):
    """A model that cannot be inspected as asked: one line names the reason and the remedy."""


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer routed the tokens.

    Attributes:
      layer: of the model.
      load_E: choices of each expert over the uniform load; 1 is an even share.
      entropy: mean entropy of the router's distribution, nats.
      first_weight: mean combine weight of a token's first choice; None if no token has one.
      unvisited: experts that no token visits.
      coactivation: of the pair of experts that goes together most, the tokens that visit both over
        chance; None where all pairs are too rare to tell.
    """

    layer: int
    load_E: tuple[float, ...]
    entropy: float
    first_weight: float | None
    unvisited: tuple[int, ...]
    coactivation: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What is seen of a checkpoint.

    Attributes:
      step: of the checkpoint.
      num_rows: validation rows that were routed; None if only prompts were.
      routed: the tokens of those rows, or of the prompts.
      layers: how each MoE layer routed them.
      coactivation_NEE: tokens that visit both experts of a pair.
      traces: of each prompt, or of the beginning of a row.
      labels: the domains of the rows; None if there are none.
      counterfactuals: if they were asked for.
    """

    step: int
    num_rows: int | None
    routed: RoutedTokens
    layers: tuple[LayerRouting, ...]
    coactivation_NEE: Int[np.ndarray, "N E E"]
    traces: tuple[Trace, ...]
    labels: Labels | None = None
    counterfactuals: Counterfactuals | None = None

    @property
    def counts_NE(self) -> Int[np.ndarray, "N E"]:
        """Choices of each expert."""
        return count_choices(self.routed)

    @property
    def text(self) -> str:
        """What was routed, in words."""
        tokens = f"{len(self.routed.tokens_T):,} tokens"
        if self.num_rows is None:
            return f"{tokens} of the prompts"
        return f"{tokens} of {self.num_rows:,} validation rows"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON: figures by layer, traces, and counterfactuals."""
        changed = self.counterfactuals
        return {
            "step": self.step,
            "rows": self.num_rows,
            "tokens": len(self.routed.tokens_T),
            "experts": self.routed.num_experts,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "traces": [_trace_to_dict(found) for found in self.traces],
            "counterfactuals": None if changed is None else changed.to_dict(),
        }


def inspect_checkpoint(
    loaded: LoadedRun,
    prompts: Sequence[str] = (),
    *,
    max_rows: int | None = None,
    places: TextPlaces | None = None,
    with_counterfactuals: bool = False,
) -> Inspection:
    """Routes validation rows and prompts.

    Args:
      loaded: a run's checkpoint or a released model, on one device.
      prompts: texts to trace; without any, the beginning of a validation row.
      max_rows: validation rows to route; None takes what is done in about a minute, at least one.
      places: where the user says that text is.
      with_counterfactuals: whether to evaluate the rows under other routing, too, which takes many
        passes.

    Raises:
      InspectionError: a model without experts, or without a tokenizer and asked for rows.
      DataError: there is no text, or a prompt that is none for this model.
    """
    if not loaded.config.num_moe_layers:
        raise InspectionError(no_experts("this model"))
    if isinstance(loaded.tokenizer, IdTokenizer):
        check_without_tokenizer(prompts, max_rows, places, with_counterfactuals)
        log.warning("without a tokenizer, no rows are routed: all figures are of the prompts")
        return _inspect_prompts(loaded, prompts)
    corpus = loaded.corpus(places)
    num_rows = max_rows or affordable_rows(loaded.config, corpus.seq_len)
    routed = route_corpus(loaded, corpus, max_rows=num_rows)
    changed = None
    if with_counterfactuals:
        changed = _change_routing(loaded, corpus, max_rows, num_rows, places)
    return dataclasses.replace(
        _measure(loaded, routed, _trace_all(loaded, prompts, corpus)),
        num_rows=len(np.unique(routed.rows_T)),
        labels=domains_of(corpus),
        counterfactuals=changed,
    )


def check_without_tokenizer(
    prompts: Sequence[str],
    max_rows: int | None,
    places: TextPlaces | None,
    with_counterfactuals: bool,
) -> None:
    """Checks what is asked of a model that came without a tokenizer, as `inspect_checkpoint` does.

    Raises:
      InspectionError: something that only rows of text can show.
    """
    asked = [f"--data.{leaf}={place}" for leaf, place in (places or TextPlaces()).said().items()]
    if max_rows is not None:
        asked.append(f"--rows={max_rows}")
    if with_counterfactuals:
        asked.append("--counterfactuals")
    if asked:
        raise InspectionError(
            f"{asked[0]} needs rows of text, and the model came without a tokenizer; put its "
            "tokenizer.json or tokenizer.model beside its config.json, or leave it out"
        )
    if not prompts:
        raise InspectionError(
            "the model came without a tokenizer, so rows of text cannot be routed; give token ids "
            'to trace, such as --prompt="5 17 3"'
        )


def no_experts(what: str) -> str:
    """Returns why a dense model is refused, in one line."""
    return f"{what} is dense: it has no experts and routes nothing; give a model with experts"


def affordable_rows(config: Config, seq_len: int) -> int:
    """Returns how many rows are routed in about a minute, as far as it can be guessed."""
    flops_per_token = count(config).flops_per_token / 3  # of the forward pass alone
    speed = CPU_SPEED if platform() == "cpu" else OTHER_SPEED
    num_tokens = min(MOST_TOKENS, SECONDS * speed / flops_per_token)
    return max(1, int(num_tokens // seq_len))


def count_choices(routed: RoutedTokens) -> Int[np.ndarray, "N E"]:
    """Returns the choices of each expert, by MoE layer."""
    num_rows = routed.num_experts + 1  # the last one counts choices of no expert
    counts = []
    for experts_TK in routed.experts_NTK:
        counts_e = np.bincount(experts_TK.ravel(), minlength=num_rows)
        counts.append(counts_e[: routed.num_experts])
    return np.stack(counts)


def _inspect_prompts(loaded: LoadedRun, prompts: Sequence[str]) -> Inspection:
    """Inspects how prompts are routed, and nothing else."""
    traces = [trace(loaded, prompt) for prompt in prompts]
    return _measure(loaded, _join(traces), traces)


def _trace_all(loaded: LoadedRun, prompts: Sequence[str], corpus: Corpus) -> list[Trace]:
    """Traces the prompts, or else the beginning of a row."""
    if prompts:
        return [trace(loaded, prompt) for prompt in prompts]
    num_layers = len(drawn_layers(loaded.config.num_moe_layers))
    return [trace(loaded, passage_tokens(corpus, num_layers))]


def _change_routing(
    loaded: LoadedRun,
    corpus: Corpus,
    max_rows: int | None,
    num_rows: int,
    places: TextPlaces | None,
) -> Counterfactuals:
    """Evaluates some rows under other routing: those that were asked for, or fewer."""
    wanted = max_rows or max(2, num_rows // ROWS_PER_COUNTERFACTUAL_ROW)
    available = len(corpus.rows("validation"))
    return counterfactuals(loaded, max_rows=min(wanted, available), places=places)


def _join(traces: Sequence[Trace]) -> RoutedTokens:
    """Returns the tokens of several traces; each trace is a row and a document."""
    tokens = [found.tokens_T for found in traces]
    number = [np.full(len(tokens_T), row, np.int32) for row, tokens_T in enumerate(tokens)]
    positions = [np.arange(len(tokens_T), dtype=np.int32) for tokens_T in tokens]
    entropies = [_entropy(found.probs_NTE) for found in traces]
    first = traces[0]
    return RoutedTokens(
        tokens_T=np.concatenate(tokens),
        rows_T=np.concatenate(number),
        positions_T=np.concatenate(positions),
        documents_T=np.concatenate(number),
        experts_NTK=_join_tokens([found.experts_NTK for found in traces], first.num_experts),
        weights_NTK=_join_tokens([found.weights_NTK for found in traces], 0.0),
        entropy_N=np.concatenate(entropies, axis=1).mean(axis=1),
        num_experts=first.num_experts,
        layers=first.layers,
    )


def _join_tokens(parts: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Joins `[N, T, K]` by tokens, which may visit different numbers of experts."""
    widest = max(part.shape[-1] for part in parts)
    padded = []
    for part in parts:
        padding = ((0, 0), (0, 0), (0, widest - part.shape[-1]))
        padded.append(np.pad(part, padding, constant_values=fill))
    return np.concatenate(padded, axis=1)


def _entropy(probs_NTE: Float[np.ndarray, "N T E"]) -> Float[np.ndarray, "N T"]:
    """Returns the entropy of each distribution, nats."""
    probs_NTE = probs_NTE.astype(np.float64)
    safe_probs_NTE = np.where(probs_NTE > 0, probs_NTE, 1.0)
    return -(probs_NTE * np.log(safe_probs_NTE)).sum(axis=-1)


def _measure(loaded: LoadedRun, routed: RoutedTokens, traces: Sequence[Trace]) -> Inspection:
    """Returns the figures of each layer."""
    experts_NTK = jnp.asarray(routed.experts_NTK)
    pairs_NEE = np.asarray(coactivation(experts_NTK, routed.num_experts))
    counts_NE = count_choices(routed)
    load_NE = load_ratio(counts_NE)
    layers = []
    for n, layer in enumerate(routed.layers):
        has_choices = bool(counts_NE[n].any())  # soft routing makes none
        unvisited = np.flatnonzero(counts_NE[n] == 0).tolist() if has_choices else []
        found = LayerRouting(
            layer=layer,
            load_E=tuple(load_NE[n].tolist()),
            entropy=float(routed.entropy_N[n]),
            first_weight=_first_weight(routed, n),
            unvisited=tuple(unvisited),
            coactivation=_largest_ratio(pairs_NEE[n]),
        )
        layers.append(found)
    return Inspection(
        step=loaded.step,
        num_rows=None,
        routed=routed,
        layers=tuple(layers),
        coactivation_NEE=pairs_NEE,
        traces=tuple(traces),
    )


def _first_weight(routed: RoutedTokens, n: int) -> float | None:
    """Returns the mean weight of the first choice in MoE layer n; None if there is none."""
    has_expert_T = routed.experts_NTK[n, :, 0] < routed.num_experts
    weights_t = routed.weights_NTK[n, has_expert_T, 0]
    return float(weights_t.mean()) if weights_t.size else None


def _largest_ratio(pairs_EE: Int[np.ndarray, "E E"]) -> float | None:
    """Returns the largest co-activation over chance; None where all pairs are too rare."""
    ratio_EE = coactivation_ratio(pairs_EE)
    return None if np.isnan(ratio_EE).all() else float(np.nanmax(ratio_EE))


def _layer_to_dict(layer: LayerRouting) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "load": list(layer.load_E),
        "entropy": layer.entropy,
        "first_weight": layer.first_weight,
        "unvisited": list(layer.unvisited),
        "coactivation": layer.coactivation,
    }


def _trace_to_dict(found: Trace) -> dict[str, Any]:
    """Returns experts and weights by MoE layer, token and choice."""
    return {
        "tokens": found.tokens_T.tolist(),
        "pieces": list(found.pieces),
        "experts": found.experts_NTK.tolist(),
        "weights": found.weights_NTK.tolist(),
    }
