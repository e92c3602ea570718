"""Evaluation: the language-model loss over a whole split, padded and masked, dropless, without auxiliary losses."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from moejax.data.batches import Batch
from moejax.moe.balance import load_fractions
from moejax.moe.stats import join
from moejax.training.state import Trainable
from moejax.training.step import EvalOutput, Sums, add_sums, put_batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result over a split.

    Attributes:
      loss: mean cross-entropy, nats per token.
      perplexity: exp(loss).
      bits_per_byte: bits per byte of the original text, which does not depend on the tokenizer.
      num_targets: predicted tokens.
      load_NE: fraction of choices of each expert, by MoE layer; None for a dense model.
      coactivation_NEE: tokens that visit both experts of a pair, by MoE layer; None for a dense model.
      probe_NTK: the experts of each token of the split's first rows; None for a dense model.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_targets: int
    load_NE: np.ndarray | None
    coactivation_NEE: np.ndarray | None = None
    probe_NTK: np.ndarray | None = None

    def scalars(self) -> dict[str, float]:
        """As keys of `metrics.jsonl`."""
        values = {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
        }
        if self.load_NE is not None:
            values["eval/max_violation"] = float((self.load_NE.max(axis=1) * self.load_NE.shape[1] - 1).mean())
        return values


@jax.jit
def _add(total: tuple[Sums, jax.Array | None], more: tuple[Sums, jax.Array | None]) -> tuple[Sums, jax.Array | None]:
    """Sums and co-activations of two parts; one program, not one for each of dozens of small arrays."""
    coactivation_NEE = None if total[1] is None or more[1] is None else total[1] + more[1]
    return add_sums(total[0], more[0]), coactivation_NEE


def evaluate(
    eval_step: Callable[..., EvalOutput],
    trainable: Trainable,
    params: nnx.State,
    router_state: nnx.State,
    batches: Iterator[Batch],
    num_bytes: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates every batch.

    Args:
      eval_step: from `make_eval_step`.
      trainable: the run's fixed part.
      params: trained arrays.
      router_state: what routers carry besides.
      batches: this process's slices; padding is masked.
      num_bytes: UTF-8 bytes of the text behind the batches.
      should_stop: asked before each batch; once it says True the evaluation is given up and None returned.
    """
    total: Sums | None = None
    coactivation_NEE = probe_NTK = None
    for batch in batches:
        if should_stop():
            return None
        output = eval_step(params, router_state, put_batch(batch, trainable))
        if total is None:
            total, coactivation_NEE, probe_NTK = output.sums, output.coactivation_NEE, output.probe_NTK
        else:
            total, coactivation_NEE = _add((total, coactivation_NEE), (output.sums, output.coactivation_NEE))
    if total is None:
        raise ValueError("nothing to evaluate: the split has no rows")
    nats, num_targets = float(total.nats), float(total.num_targets)
    routing = join(total.routing)
    load_NE = None if routing is None else np.asarray(load_fractions(routing))
    loss = nats / num_targets
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_targets=int(num_targets),
        load_NE=load_NE,
        coactivation_NEE=None if coactivation_NEE is None else np.asarray(coactivation_NEE),
        probe_NTK=None if probe_NTK is None else np.asarray(probe_NTK),
    )
