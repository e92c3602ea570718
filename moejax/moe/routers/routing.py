"""What every token-choice router returns."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts a token visits and how much each counts.

    Attributes:
      logits_TE: raw router logits, float32.
      probs_TE: the router's distribution over all experts before selection, float32, rows sum to 1.
      experts_TK: selected experts, int32, in falling order of score, without repetition; E where the token is masked,
        so that it belongs to no expert.
      weights_TK: combine weights, float32; 0 where the token is masked.
    """

    logits_TE: jax.Array
    probs_TE: jax.Array
    experts_TK: jax.Array
    weights_TK: jax.Array
