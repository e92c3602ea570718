"""Text with a cache is the text of recomputation, for every family and any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.hf import FOLDER, each_family, reference
from moejax.inference.generate import decode, prefill
from moejax.inference.layered import LayeredDecoder
from moejax.inference.sampling import Sampling
from moejax.interop.hf.load import load_model

LENGTHS = (12, 5, 9)
"""Of prompts: windows and chunks of the checkpoints are shorter than what is written."""

STEPS = 8


def padded(prompts):
    tokens_BL = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = prompt
    return jnp.asarray(tokens_BL)


def with_cache(decoder, prompts):
    """Returns greedy tokens, `[B, S]`."""
    lengths_B = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    cache = decoder.init_cache(len(prompts), max(LENGTHS) + STEPS)
    sampling = Sampling.from_settings(0.0, 1.0, jax.random.split(jax.random.key(0), len(prompts)))
    next_B, positions_B, cache = prefill(decoder, padded(prompts), lengths_B, cache, sampling)
    found = [np.asarray(next_B)]
    for _ in range(STEPS - 1):
        next_B, positions_B, cache = decode(decoder, next_B, positions_B, cache, sampling)
        found.append(np.asarray(next_B))
    return np.stack(found, axis=1)


def recomputed(model, prompts):
    """Returns greedy tokens, each from a pass over all tokens before it."""
    graphdef, state = nnx.split(model)
    length = max(LENGTHS) + STEPS
    positions_BL = jnp.broadcast_to(jnp.arange(length), (len(prompts), length))

    @jax.jit
    def logits(tokens_BL, lengths_B):
        segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
        model = nnx.merge(graphdef, state)
        hidden_BLD, _ = model(tokens_BL, segments_BL, positions_BL)
        return model.logits(hidden_BLD)

    texts = [list(prompt) for prompt in prompts]
    for _ in range(STEPS):
        rows = [text + [0] * (length - len(text)) for text in texts]
        lengths_B = jnp.asarray([len(text) for text in texts])
        logits_BLV = np.asarray(logits(jnp.asarray(rows, jnp.int32), lengths_B))
        for text, logits_LV in zip(texts, logits_BLV, strict=True):
            text.append(int(logits_LV[len(text) - 1].argmax()))
    return np.array([text[-STEPS:] for text in texts])


@pytest.mark.parametrize("family", each_family())
def test_cached_decoding_gives_the_tokens_of_recomputation(family):
    model = load_model(FOLDER / family)
    ids = reference(family)["input_ids"].reshape(-1)
    prompts = [ids[start : start + length].tolist() for start, length in enumerate(LENGTHS)]
    expected_BS = recomputed(model, prompts)
    decoder = LayeredDecoder(model)
    np.testing.assert_array_equal(with_cache(decoder, prompts), expected_BS)
    alone_BS = [with_cache(decoder, [prompt])[0] for prompt in prompts]
    np.testing.assert_array_equal(alone_BS, expected_BS)
