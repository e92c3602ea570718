"""A block is made of the mixer and the feed-forward part that it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.training import small_config
from moejax.models.blocks import Block, Context, Stack
from moejax.moe.experts.experts import FeedForward
from moejax.moe.token_info import TokenInfo
from moejax.nn.norms import Identity

B, L, WIDTH = 2, 5, 32


class MeanOfRow(nnx.Module):
    """A mixer: `scale` times the mean of the tokens of the row up to each."""

    def __init__(self, *, rngs):
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)), axes=("norm",))

    def __call__(self, x_BLD, positions_BL, segments_BL=None, cache=None):
        sums_BLD = jnp.cumsum(x_BLD, axis=1)
        return self.scale[...][None, None] * sums_BLD / (positions_BL[..., None] + 1), cache


def context_of_one_document():
    segments_BL = jnp.ones((B, L), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    return Context(positions_BL, segments_BL, TokenInfo(segments_BL > 0, segments_BL, positions_BL))


def make_block(rngs, **options):
    model = small_config(model=options).model
    ffn = FeedForward(WIDTH, 8, jnp.dtype("float32"), rngs=rngs)
    return Block(model, MeanOfRow(rngs=rngs), ffn)


def test_blocks_of_another_mixer_are_a_stack_as_those_of_attention():
    context = context_of_one_document()
    stack = Stack(make_block, 2, small_config(), rngs=nnx.Rngs(params=0))
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, WIDTH))
    y_BLD, stats = jax.jit(lambda x_BLD: stack(x_BLD, context))(x_BLD)
    assert stats is None
    expected_BLD = np.array(x_BLD)
    for block, _ in stack.walk():
        normed_BLD = np.asarray(block.mixer_norm(jnp.asarray(expected_BLD)))
        for row, place in np.ndindex(B, L):
            mean_D = normed_BLD[row, : place + 1].mean(0)
            expected_BLD[row, place] += np.asarray(block.mixer.scale[...]) * mean_D
        expected_BLD = expected_BLD + block.ffn(block.ffn_norm(jnp.asarray(expected_BLD)))
        expected_BLD = np.array(expected_BLD)
    oracle.assert_close(y_BLD, expected_BLD, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "num_norms"),
    [
        ({"norm_order": "post", "residual_multiplier": 0.3}, 2),
        ({"norm_order": "sandwich", "norm": "zero_centered_rms"}, 4),
        ({"parallel_residual": True, "norm": "layer", "residual_multiplier": 0.3}, 1),
    ],
)
def test_norms_before_and_after_the_parts_and_the_residual_are_those_of_the_formula(
    options, num_norms
):
    block = make_block(nnx.Rngs(params=0), **options)
    norms = ("mixer_norm", "mixer_post_norm", "ffn_norm", "ffn_post_norm")
    present = [name for name in norms if not isinstance(getattr(block, name), Identity)]
    assert len(present) == num_norms
    for name in present:
        norm = getattr(block, name)
        norm.scale[...] += jax.random.normal(jax.random.key(len(name)), (WIDTH,))
    context = context_of_one_document()
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, WIDTH))
    found_BLD, _, _ = block(x_BLD, context)
    factor = options.get("residual_multiplier", 1.0)

    def normed(name, y_BLD):
        return getattr(block, name)(y_BLD) if name in present else y_BLD

    mixed_BLD, _ = block.mixer(normed("mixer_norm", x_BLD), context.positions_BL)
    expected_BLD = x_BLD + factor * normed("mixer_post_norm", mixed_BLD)
    if options.get("parallel_residual"):
        inputs_BLD = block.mixer_norm(x_BLD)
    else:
        inputs_BLD = normed("ffn_norm", expected_BLD)
    expected_BLD += factor * normed("ffn_post_norm", block.ffn(inputs_BLD))
    oracle.assert_close(found_BLD, expected_BLD)


def test_a_dense_block_has_no_moe_layer():
    block = make_block(nnx.Rngs(params=0))
    assert not block.is_moe
    with pytest.raises(TypeError, match="no MoE layer; see is_moe"):
        _ = block.moe
