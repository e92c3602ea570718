"""Evaluation: the language-model loss over a whole split, padded and masked, dropless, without auxiliary losses."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.data import Corpus
from moejax.data.batches import Batch
from moejax.data.labels import Labels
from moejax.moe.balancing.load import load_fractions
from moejax.moe.balancing.stats import join
from moejax.training.eval_step import EvalOutput
from moejax.training.losses import add_sums
from moejax.training.state import TrainSetup
from moejax.training.step import put_batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result over a split.

    Attributes:
      loss: mean cross-entropy, nats per token.
      perplexity: exp(loss).
      bits_per_byte: bits per byte of the original text, which does not depend on the tokenizer.
      num_targets: predicted tokens.
      load_NE: fraction of choices of each expert, by MoE layer; None for a dense model.
      coactivation_NEE: tokens that visit both experts of a pair, by MoE layer; None for a
        dense model.
      probe_NTK: the experts of each token of some rows spread over the split, always the same ones;
        None for a dense model.
      loss_by_domain: mean cross-entropy of the targets of each domain, nats per token; empty unless
        the corpus names several domains.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_targets: int
    load_NE: np.ndarray | None
    coactivation_NEE: np.ndarray | None = None
    probe_NTK: np.ndarray | None = None
    loss_by_domain: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """As keys of `metrics.jsonl`."""
        values = {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
        }
        values |= {f"eval/loss/{domain}": loss for domain, loss in self.loss_by_domain.items()}
        if self.load_NE is not None:
            values["eval/max_violation"] = float(
                (self.load_NE.max(axis=1) * self.load_NE.shape[1] - 1).mean()
            )
        return values


PROBE_ROWS = 16
"""At most so many rows of the split, and at least half as many if it has so many batches, tell how routing changes."""

MAX_DOMAINS = 16
"""Of more, the smallest are one: the number of metrics stays bounded."""


@jax.jit
def _add(total: EvalOutput, more: EvalOutput) -> EvalOutput:
    """Routing of two parts, without probes; one program, not one for each of dozens of small arrays."""

    def plus(first, second):
        return jax.tree.map(jnp.add, first, second)  # None has no leaves

    return EvalOutput(
        add_sums(total.sums, more.sums),
        plus(total.coactivation_NEE, more.coactivation_NEE),
    )


def domains_of(corpus: Corpus) -> Labels | None:
    """The domains of the validation split by which its loss is reported; None if it has fewer than two."""
    labels = corpus.labels("validation")
    return labels.largest(MAX_DOMAINS) if len(labels.domains) > 1 else None


def evaluate(
    eval_step: Callable[..., EvalOutput],
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    batches: Iterator[Batch],
    num_bytes: int,
    should_stop: Callable[[], bool] = lambda: False,
    domains: Labels | None = None,
) -> Evaluation | None:
    """Evaluates every batch.

    Args:
      eval_step: from `make_eval_step`, with as many domains as `domains` names.
      setup: the run's fixed part.
      params: trained arrays.
      router_state: what routers carry besides.
      batches: this process's slices; padding is masked.
      num_bytes: UTF-8 bytes of the text behind the batches.
      should_stop: asked before each batch; once it says True the evaluation is given up and
        None returned.
      domains: from `domains_of`.
    """
    sums = EvaluationSums(domains)
    for batch in batches:
        if should_stop():
            return None
        inputs = eval_inputs(batch, domains)
        sums.add(eval_step(params, router_state, *(put_batch(x, setup) for x in inputs)))
    return sums.result(num_bytes)


def eval_inputs(batch: Batch, domains: Labels | None) -> tuple[Any, ...]:
    """What an evaluation step takes of a batch: the batch itself and, if there are domains, that of each target."""
    bare = dataclasses.replace(batch, documents_BL=None)
    return (bare,) if domains is None else (bare, _look_up(domains, batch.documents_BL))


class EvaluationSums:
    """Adds up what evaluation steps give. Their outputs may have a leading axis of arms: runs evaluated side by side.

    Args:
      domains: from `domains_of`.
    """

    def __init__(self, domains: Labels | None):
        self._domains = domains
        self._total: EvalOutput | None = None
        self._targets: list[tuple[jax.Array, jax.Array]] = []  # summed up in 64 bits at the end
        self._by_domain: list[jax.Array | None] = []
        self._probes: list[jax.Array] = []
        self._every = 1  # batch gives a probe

    def add(self, output: EvalOutput) -> None:
        """Takes the output of the next batch."""
        if output.probe_NTK is not None and len(self._targets) % self._every == 0:
            self._probes.append(output.probe_NTK)
            if len(self._probes) > PROBE_ROWS:
                self._probes, self._every = self._probes[::2], 2 * self._every
        self._targets.append((output.sums.nats, output.sums.num_targets))
        self._by_domain.append(output.nats_by_domain_G2)
        output = dataclasses.replace(output, probe_NTK=None, nats_by_domain_G2=None)
        self._total = output if self._total is None else _add(self._total, output)

    def result(self, num_bytes: int, arm: int | None = None) -> Evaluation:
        """The evaluation of the batches so far.

        Args:
          num_bytes: UTF-8 bytes of the text behind them.
          arm: which one, if outputs have an axis of arms.
        """
        if self._total is None:
            raise ValueError("nothing to evaluate: the split has no rows")
        found = (self._total, self._targets, self._by_domain, self._probes)
        if arm is not None:
            found = jax.tree.map(lambda x: x[arm], jax.device_get(found))
        total, targets, by_domain, probes = found
        nats, num_targets = np.array(jax.device_get(targets), np.float64).sum(axis=0)
        routing = join(total.sums.routing)
        load_NE = None if routing is None else np.asarray(load_fractions(routing))
        loss = float(nats / num_targets)
        return Evaluation(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            bits_per_byte=float(nats / math.log(2) / num_bytes),
            num_targets=int(num_targets),
            load_NE=load_NE,
            coactivation_NEE=None
            if total.coactivation_NEE is None
            else np.asarray(total.coactivation_NEE),
            probe_NTK=np.concatenate(jax.device_get(probes), axis=1) if probes else None,
            loss_by_domain={}
            if self._domains is None
            else _means(self._domains, jax.device_get(by_domain)),
        )


def _look_up(domains: Labels, documents_BL: np.ndarray) -> np.ndarray:
    """The domain of each target, which is of its input's document; -1 at padding."""
    return np.where(documents_BL >= 0, domains.domain_of_document[documents_BL], -1).astype(
        np.int32
    )


def _means(domains: Labels, nats_G2: Sequence[np.ndarray]) -> dict[str, float]:
    """By domain that has targets, from the sums of each batch."""
    rows = zip(domains.domains, np.array(nats_G2, np.float64).sum(axis=0).tolist(), strict=True)
    unnamed = "unnamed" if "unnamed" not in domains.domains else "without a name"
    return {domain or unnamed: nats / number for domain, (nats, number) in rows if number}
