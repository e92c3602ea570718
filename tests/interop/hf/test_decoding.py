"""Text with a cache is the text of recomputation, for every family and any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.hf import FOLDER, each_family, reference
from moejax.data.tokenizers.ids import IdTokenizer
from moejax.inference.generate import generate
from moejax.inference.layered import LayeredDecoder
from moejax.interop.hf.load import load_model

LENGTHS = (12, 5, 9)
"""Of prompts: windows and chunks of the checkpoints are shorter than what is written."""

STEPS = 8


def with_cache(model, prompts):
    """Returns greedy tokens, `[B, S]`."""
    tokenizer = IdTokenizer(model.config.vocab_size)
    return np.array(list(generate(model, tokenizer, prompts, max_tokens=STEPS, temperature=0.0))).T


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
    for prompt, expected_S in zip(prompts, expected_BS, strict=True):
        if model.config.attention.rope_long_magnitude:
            # With LongRoPE the longest text of a batch decides for all, as in the reference.
            (expected_S,) = recomputed(model, [prompt])
        (found_S,) = with_cache(decoder, [prompt])
        np.testing.assert_array_equal(found_S, expected_S)
