"""A text that grows over the length up to which it is rotated in another way is computed again."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import oracle
from cases.training import small_config
from moejax.inference.layered import LayeredDecoder, TextCache
from moejax.models import Decoder

LENGTHS = np.array([6, 3])
NUM_STEPS = 5
LONGROPE = {
    "rope_scaling": "longrope",
    "rope_wavelengths": "1, 1.2, 2, 3.5",
    "rope_original_length": 8,
    "rope_magnitude": 1.0,
    "rope_long_magnitude": 3.0,
}


def whole(model, tokens_BL, lengths_B):
    """Returns the logits of the last token of each row from one pass over all of them."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    segments_BL = jnp.asarray(positions_BL < lengths_B[:, None], jnp.int32)
    hidden_BLD, _ = model(jnp.asarray(tokens_BL), segments_BL, positions_BL)
    last_B11 = jnp.asarray(lengths_B - 1)[:, None, None]
    return model.logits(jnp.take_along_axis(hidden_BLD, last_B11, axis=1))


def test_every_step_gives_what_a_pass_over_the_text_so_far_gives():
    model = Decoder(small_config(attention=LONGROPE), rngs=nnx.Rngs(params=0))
    decoder = LayeredDecoder(model)
    cache = decoder.init_cache(2, 16)
    assert isinstance(cache[-1], TextCache)
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(3, 200, (2, 16)).astype(np.int32)
    longest = LENGTHS.max()
    positions_BL = jnp.broadcast_to(jnp.arange(longest), (2, longest))
    is_token_BL = positions_BL < LENGTHS[:, None]
    first_BL = jnp.asarray(tokens_BL[:, :longest])
    x_BLD, cache = decoder.extend(first_BL, positions_BL, cache, is_token_BL)
    x_B1D = jnp.take_along_axis(x_BLD, jnp.asarray(LENGTHS - 1)[:, None, None], axis=1)
    lengths_B = LENGTHS.copy()
    jumps = []
    for _ in range(NUM_STEPS):
        oracle.assert_close(decoder.logits(x_B1D), whole(model, tokens_BL, lengths_B), rtol=1e-5)
        # In the batch, the longer text decides for both.
        jumps.append(decoder._makes_long(jnp.asarray(lengths_B)[:, None], None))
        next_B1 = jnp.asarray(np.take_along_axis(tokens_BL, lengths_B[:, None], axis=1))
        x_B1D, cache = decoder.extend(next_B1, jnp.asarray(lengths_B)[:, None], cache)
        lengths_B += 1
    assert jumps == [False, False, True, False, False]


def test_other_models_remember_no_text():
    for attention in ({}, LONGROPE | {"rope_long_magnitude": 1.0}):
        model = Decoder(small_config(attention=attention), rngs=nnx.Rngs(params=0))
        assert len(LayeredDecoder(model).init_cache(1, 4)) == model.config.model.num_layers
