"""What routers see and what they return."""

import dataclasses
import enum
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.kernels.arrays import to_jax


class Stream(enum.Enum):
    """Everything that a layer draws at random.

    The names, not their order, keep the numbers of one apart from another's. Small integers would
    not do: splitting a key gives the keys that small integers give, and so parameters are drawn.
    """

    NOISE = "noise"
    GROUP_NOISE = "group noise"
    RANDOM = "random"
    GUMBEL = "gumbel"
    KEEP = "keep"
    JITTER = "jitter"
    DROPOUT = "dropout"

    @property
    def number(self) -> int:
        """Returns what a key is folded with: 32 bits of the name."""
        return zlib.crc32(self.value.encode())


@dataclasses.dataclass(frozen=True)
class RouterInputs:
    """What a router may look at; None is what it does not need.

    The T tokens are sequences of length L, one after the other.

    Attributes:
      logits_TE: router logits, float32, before noise and bias; routers that have none ignore them.
      mask_T: False where a token is padding: it is sent to no expert.
      length: L.
      tokens_T: token ids (hash, random); None if unknown.
      positions_T: position of each token in its document (balanced, random); None if unknown.
      bias_E: selection bias, float32 state; None without one.
      table_VK: the experts of each token id (hash).
      group_logits_TG: logits of groups of experts (hierarchical).
      noise_scale_TE: standard deviation of the noise on each logit (noisy_topk, hierarchical).
      group_noise_scale_TG: standard deviation of the noise on each group's logit.
      is_blocked_E: experts that must not be selected; the next in rank take their place.
        None: all may be.
      keys_B: a key per sequence, from which everything random is drawn, so that a draw depends
        neither on the mesh nor on the other sequences. None in evaluation: nothing is drawn.
      noise: multiplies the noise, float32 scalar.
    """

    logits_TE: jax.Array
    mask_T: jax.Array
    length: int
    tokens_T: Any = None
    positions_T: Any = None
    bias_E: Any = None
    table_VK: Any = None
    group_logits_TG: Any = None
    noise_scale_TE: Any = None
    group_noise_scale_TG: Any = None
    is_blocked_E: Any = None
    keys_B: Any = None
    is_training: bool = False
    noise: jax.Array | float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, to_jax(getattr(self, field.name)))

    def draw(
        self, stream: Stream, sampler: Callable[..., jax.Array], width: int, *, choice: int = 0
    ) -> Float[Array, "T width"]:
        """Draws random numbers, one row per token, for one of its choices where each has its own.

        Raises:
          ValueError: there are no keys.
        """
        if self.keys_B is None:
            raise ValueError(
                "this router draws random numbers in training: pass keys_B, a key per sequence"
            )
        values_BLX = draw(self.keys_B, stream, sampler, self.length, width, choice=choice)
        return values_BLX.reshape(-1, width)


def draw(
    keys_B: jax.Array,
    stream: Stream,
    sampler: Callable[..., jax.Array],
    length: int,
    width: int,
    *,
    choice: int = 0,
) -> Float[Array, "B L width"]:
    """Draws `sampler(key, (length, width))` for each sequence.

    Its own key is folded with stream and choice.
    """

    def draw_sequence(key):
        stream_key = jax.random.fold_in(key, stream.number)
        choice_key = jax.random.fold_in(stream_key, choice)
        return sampler(choice_key, (length, width))

    return jax.vmap(draw_sequence)(keys_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts a token visits and how much each counts.

    Attributes:
      logits_TE: raw router logits, float32.
      probs_TE: the router's distribution over all experts before selection, float32, rows sum to 1.
      experts_TK: selected experts, int32, without repetition, the best first; E where the token is
        masked, so that it belongs to no expert.
      weights_TK: combine weights, float32; 0 where the token is masked.
      ranking_TE: what the selection was made by, float32, -inf where an expert was not eligible;
        no gradient.
      log_scores_TE: logarithm of each expert's score, from which weights are made.
      log_weights_TK: logarithm of each weight, up to a summand common to its token: it
        distinguishes weights that are too small for float32. -1e30 where there is no expert.
      noisy_TE: logits with their noise (noisy_topk).
      noise_scale_TE: its standard deviation (noisy_topk).
    """

    logits_TE: jax.Array
    probs_TE: jax.Array
    experts_TK: jax.Array
    weights_TK: jax.Array
    ranking_TE: jax.Array
    log_scores_TE: jax.Array
    log_weights_TK: jax.Array
    noisy_TE: Any = None
    noise_scale_TE: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotRouting:
    """Which tokens fill the slots of each expert, where experts choose.

    Attributes:
      logits_TE: raw router logits, float32.
      probs_TE: the router's distribution over experts, float32.
      positions_BEC: position in its sequence of the token in a slot, int32; L where the
        slot is empty.
      weights_BEC: its combine weight, float32; 0 where the slot is empty.
    """

    logits_TE: jax.Array
    probs_TE: jax.Array
    positions_BEC: jax.Array
    weights_BEC: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftRouting:
    """How slots mix tokens and tokens mix slots.

    There are S = E * P slots, those of one expert in succession.

    Attributes:
      logits_BLS: of tokens and slots, float32.
      dispatch_BLS: weight of each token in a slot's input; sums to 1 over the real tokens,
        0 at padding.
      combine_BLS: weight of each slot's output in a token; sums to 1 over slots, 0 at padding.
    """

    logits_BLS: jax.Array
    dispatch_BLS: jax.Array
    combine_BLS: jax.Array


def no_expert(experts_TK: jax.Array, mask_T: jax.Array, num_choices: int) -> jax.Array:
    """Returns the experts, with the id that belongs to none where the token is masked."""
    experts_TK = jnp.where(mask_T[:, None], experts_TK, num_choices)
    return experts_TK.astype(jnp.int32)
