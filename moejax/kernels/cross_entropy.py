"""Cross-entropy of the next token from hidden states, without the logits of all tokens at once.

Logits `[B, L, V]` in float32 are the largest array of a step whose vocabulary is large. Here
positions take turns in chunks whose logits are computed, used and forgotten; the backward pass
computes those of a chunk again. Fused kernels can take the place of `cross_entropy`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.matmul import dense

LARGEST_CHUNK = 2**23
"""The most logits that a device computes at once: 34 MB in float32.

So many that all tokens of a step with a small vocabulary are one chunk, and nothing is computed
twice.
"""

NO_TOKEN = -1e30
"""The logit of an id that is no token.

It is finite, and its probability is 0 at any temperature that `generate` takes.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: c tanh((hidden @ weight + bias) / divisor / c).

    Attributes:
      weight_VD: a vector for each id, in the compute dtype.
      num_tokens: ids from this one on are no tokens; they fill up the vocabulary.
      bias_V: float32; None without.
      divisor: of the logits.
      cap: c, the largest magnitude; 0: logits have no soft cap.
    """

    weight_VD: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    bias_V: Any = None
    divisor: float = dataclasses.field(default=1.0, metadata={"static": True})
    cap: float = dataclasses.field(default=0.0, metadata={"static": True})

    def logits(self, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns logits, float32; those of ids that are no token are `NO_TOKEN`."""
        logits_BLV = dense(hidden_BLD, self.weight_VD.T, out_dtype=jnp.float32)
        if self.bias_V is not None:
            logits_BLV += self.bias_V[None, None]
        if self.divisor != 1:
            logits_BLV /= self.divisor
        if self.cap:
            logits_BLV = self.cap * jnp.tanh(logits_BLV / self.cap)
        vocab_size = self.weight_VD.shape[0]
        if self.num_tokens == vocab_size:
            return logits_BLV
        is_token_V = jnp.arange(vocab_size) < self.num_tokens
        return jnp.where(is_token_V[None, None], logits_BLV, NO_TOKEN)


class TokenLosses(NamedTuple):
    """What the logits say of each target, float32.

    Attributes:
      nats_BL: its cross-entropy.
      log_z_BL: the log-sum-exp of its logits, of whose square a z-loss is the mean.
    """

    nats_BL: jax.Array
    log_z_BL: jax.Array


def cross_entropy(
    hidden_BLD: Float[Array, "B L D"],
    head: Head,
    targets_BL: Int[Array, "B L"],
    *,
    num_parts: int = 1,
    length_parts: int = 1,
) -> TokenLosses:
    """Returns the cross-entropy of each target in nats, and its log-sum-exp.

    Args:
      hidden_BLD: normalised hidden states, in the compute dtype.
      head: from hidden states to logits.
      targets_BL: ids of the tokens that follow.
      num_parts: into how many parts the mesh splits the logits `[B, L, V]`.
      length_parts: into how many parts it splits the axis L; they stay where they are.
    """
    batch, length = targets_BL.shape
    num_logits = batch * length * head.weight_VD.shape[0] // num_parts
    num_chunks = min(-(-num_logits // LARGEST_CHUNK), length // length_parts)
    if num_chunks <= 1:
        return _cross_entropy_at_once(hidden_BLD, head, targets_BL)
    missing = -length % (num_chunks * length_parts)
    hidden_NBlD = _split_positions(hidden_BLD, num_chunks, missing)
    targets_NBl = _split_positions(targets_BL, num_chunks, missing)
    chunks = _cross_entropy_in_turn(hidden_NBlD, head, targets_NBl)
    return TokenLosses(*(_join_positions(x_NBl)[:, :length] for x_NBl in chunks))


def _cross_entropy_at_once(hidden_BLD, head: Head, targets_BL) -> TokenLosses:
    logits_BLV = head.logits(hidden_BLD)
    of_target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    return TokenLosses(log_z_BL - of_target_BL1[..., 0], log_z_BL)


def _cross_entropy_in_turn(hidden_NBlD, head: Head, targets_NBl) -> TokenLosses:
    """Returns the cross-entropy of N chunks of positions, one chunk after the other."""
    dtype = head.weight_VD.dtype
    # The gradient of the weight is a sum over chunks, which must be kept in float32.
    weight_VD = head.weight_VD.astype(jnp.float32)

    @jax.checkpoint
    def one_chunk(hidden_BlD, targets_Bl):
        chunk_head = dataclasses.replace(head, weight_VD=weight_VD.astype(dtype))
        return _cross_entropy_at_once(hidden_BlD, chunk_head, targets_Bl)

    def body(carry, chunk):
        return carry, one_chunk(*chunk)

    _, losses = jax.lax.scan(body, None, (hidden_NBlD, targets_NBl))
    return losses


def _split_positions(x_BLX: jax.Array, num_chunks: int, missing: int) -> jax.Array:
    """Returns chunks `[N, B, l, ...]` of positions, with `missing` zeros added at the end.

    A chunk takes every N-th position, so that each device has an equal part of every chunk of the
    positions that it holds.
    """
    widths = [(0, 0)] * x_BLX.ndim
    widths[1] = (0, missing)
    padded_BMX = jnp.pad(x_BLX, widths)
    batch, length = padded_BMX.shape[:2]
    split_BlNX = padded_BMX.reshape(batch, length // num_chunks, num_chunks, *x_BLX.shape[2:])
    return jnp.moveaxis(split_BlNX, 2, 0)


def _join_positions(x_NBl: jax.Array) -> jax.Array:
    """Undoes `_split_positions`, but for the positions that it added."""
    batch = x_NBl.shape[1]
    return jnp.moveaxis(x_NBl, 0, 2).reshape(batch, -1)
