"""Evaluates the language-model loss over a split: masked, dropless, without auxiliary losses."""

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
from moejax.training.program import Program


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
      of_average: the same of the moving average of the weights; None where none is kept.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_targets: int
    load_NE: np.ndarray | None
    coactivation_NEE: np.ndarray | None = None
    probe_NTK: np.ndarray | None = None
    loss_by_domain: Mapping[str, float] = dataclasses.field(default_factory=dict)
    of_average: "Evaluation | None" = None

    def scalars(self) -> dict[str, float]:
        """Returns the values by their keys in `metrics.jsonl`."""
        values = {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
        }
        if self.of_average is not None:
            values["eval/average_loss"] = self.of_average.loss
            values["eval/average_bits_per_byte"] = self.of_average.bits_per_byte
        for domain, loss in self.loss_by_domain.items():
            values[f"eval/loss/{domain}"] = loss
        if self.load_NE is not None:
            num_experts = self.load_NE.shape[1]
            violation_N = self.load_NE.max(axis=1) * num_experts - 1
            values["eval/max_violation"] = float(violation_N.mean())
        return values


PROBE_ROWS = 16
"""The largest number of rows whose experts are kept, to see how routing changes.

There are at least half as many if the split has that many batches.
"""

MAX_DOMAINS = 16
"""If there are more, the smallest count as one, so that the number of metrics stays bounded."""


@jax.jit
def _add(total: EvalOutput, more: EvalOutput) -> EvalOutput:
    """Adds the sums of two parts, without probes.

    It is one program, not one for each of dozens of small arrays.
    """
    # A tree map, since None, of a dense model, has no leaves.
    coactivation_NEE = jax.tree.map(jnp.add, total.coactivation_NEE, more.coactivation_NEE)
    return EvalOutput(add_sums(total.sums, more.sums), coactivation_NEE)


def domains_of(corpus: Corpus) -> Labels | None:
    """Returns the domains by which the validation loss is reported; None if there is only one."""
    labels = corpus.labels("validation")
    return labels.largest(MAX_DOMAINS) if len(labels.domains) > 1 else None


def evaluate(
    program: Program,
    eval_step: Callable[..., EvalOutput],
    params: nnx.State,
    router_state: nnx.State,
    batches: Iterator[Batch],
    num_bytes: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    domains: Labels | None = None,
) -> list[Evaluation]:
    """Evaluates every batch.

    Args:
      program: of the runs that are evaluated.
      eval_step: from `program.make_eval_step`, with as many domains as `domains` names.
      params: trained arrays.
      router_state: what routers carry besides.
      batches: this process's slices; padding is masked.
      num_bytes: UTF-8 bytes of the text that the batches hold.
      should_stop: called before each batch; once it returns True the evaluation is given up.
      domains: from `domains_of`.

    Returns:
      The evaluation of each run; none if it was given up.
    """
    sums = EvaluationSums(domains)
    output = None
    for batch in batches:
        if should_stop():
            return []
        inputs = [program.put_batch(x) for x in eval_inputs(batch, domains)]
        # Batches do not depend on each other. On several CPU devices their programs would all
        # start, and wait for ever for threads that the others hold.
        jax.block_until_ready(output)
        output = eval_step(params, router_state, *inputs)
        sums.add(output)
    return [sums.result(num_bytes, own) for own in program.outputs(sums.collected)]


def eval_inputs(batch: Batch, domains: Labels | None) -> tuple[Any, ...]:
    """Returns an evaluation step's inputs: the batch and, if any, the domain of each target."""
    without_documents = dataclasses.replace(batch, documents_BL=None)
    if domains is None:
        return (without_documents,)
    return without_documents, _domain_of_targets(domains, batch.documents_BL)


class EvaluationSums:
    """Adds up the outputs of evaluation steps.

    The outputs may have a leading axis of arms: runs that are evaluated side by side.

    Args:
      domains: from `domains_of`.
    """

    def __init__(self, domains: Labels | None):
        self._domains = domains
        self._total: EvalOutput | None = None
        # Of each batch: they are added up in 64 bits at the end.
        self._targets: list[tuple[jax.Array, jax.Array]] = []
        self._nats_by_domain_G2: list[jax.Array | None] = []
        self._probes: list[jax.Array] = []
        self._probe_every = 1  # batches

    def add(self, output: EvalOutput) -> None:
        """Takes the output of the next batch."""
        self._add_probe(output.probe_NTK)
        self._targets.append((output.sums.nats, output.sums.num_targets))
        self._nats_by_domain_G2.append(output.nats_by_domain_G2)
        # What is left of it has one sum for all batches.
        rest = dataclasses.replace(output, probe_NTK=None, nats_by_domain_G2=None)
        if self._total is None:
            self._total = rest
        else:
            self._total = _add(self._total, rest)

    def _add_probe(self, probe_NTK: jax.Array | None) -> None:
        """Keeps the probe of every n-th batch; once there are too many, of every 2n-th."""
        index = len(self._targets)
        if probe_NTK is None or index % self._probe_every:
            return
        self._probes.append(probe_NTK)
        if len(self._probes) > PROBE_ROWS:
            self._probes = self._probes[::2]
            self._probe_every *= 2

    @property
    def collected(self) -> tuple[Any, ...]:
        """The sums of the batches so far, as arrays."""
        if self._total is None:
            raise ValueError("nothing to evaluate: the split has no rows")
        return self._total, self._targets, self._nats_by_domain_G2, self._probes

    def result(self, num_bytes: int, collected: tuple[Any, ...]) -> Evaluation:
        """Returns the evaluation of one run.

        Args:
          num_bytes: UTF-8 bytes of the text that the batches hold.
          collected: what that run has of `collected`.
        """
        total, targets, nats_by_domain_G2, probes = collected
        nats, num_targets = np.array(jax.device_get(targets), np.float64).sum(axis=0)
        loss = float(nats / num_targets)
        loss_by_domain = {}
        if self._domains is not None:
            loss_by_domain = _mean_by_domain(self._domains, jax.device_get(nats_by_domain_G2))
        return Evaluation(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),  # exp(710) overflows
            bits_per_byte=float(nats / math.log(2) / num_bytes),
            num_targets=int(num_targets),
            load_NE=_load(total),
            coactivation_NEE=_to_host(total.coactivation_NEE),
            probe_NTK=np.concatenate(jax.device_get(probes), axis=1) if probes else None,
            loss_by_domain=loss_by_domain,
        )


def _load(total: EvalOutput) -> np.ndarray | None:
    """Returns the fraction of choices of each expert, [N, E]; None for a dense model."""
    routing = join(total.sums.routing)
    return None if routing is None else np.asarray(load_fractions(routing))


def _to_host(array: jax.Array | np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.asarray(array)


def _domain_of_targets(domains: Labels, documents_BL: np.ndarray) -> np.ndarray:
    """Returns the domain of each target, which is its input's document's; -1 at padding."""
    domain_BL = np.where(documents_BL >= 0, domains.domain_of_document[documents_BL], -1)
    return domain_BL.astype(np.int32)


def _mean_by_domain(domains: Labels, nats_by_domain_G2: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns the mean loss of each domain that has targets.

    Args:
      domains: their names, one for each row.
      nats_by_domain_G2: of each batch, the sum of the loss and the number of targets.
    """
    totals_G2 = np.array(nats_by_domain_G2, np.float64).sum(axis=0)
    unnamed = "unnamed" if "unnamed" not in domains.domains else "without a name"
    means = {}
    for domain, (nats, num_targets) in zip(domains.domains, totals_G2.tolist(), strict=True):
        if num_targets:
            means[domain or unnamed] = nats / num_targets
    return means
