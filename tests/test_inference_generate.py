"""Generation: prompts of a batch do not disturb each other, sampling obeys its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from moejax.data.tokenizers import ByteTokenizer
from moejax.inference.generate import generate, generate_text, sample
from moejax.models import Decoder
from training_cases import case_config, small_config


@pytest.fixture(scope="module")
def model():
    """A model whose attention is strong, so that a wrong position or cache slot changes what it writes."""
    model = Decoder(small_config(), rngs=nnx.Rngs(params=0))
    for stack in model.stacks:
        for name in ("query", "key", "value", "out"):
            weight = getattr(stack.block.attention, name)
            weight[...] = 3 * weight[...]
    return model


def test_greedy_generation_equals_repeated_full_forward_passes(model):
    tokenizer = ByteTokenizer()
    (text,) = generate_text(model, tokenizer, ["to be"], max_tokens=9, temperature=0.0)
    ids = [tokenizer.bos_id, *tokenizer.encode("to be")]
    forward = jax.jit(lambda t: model(t, jnp.ones_like(t), jnp.arange(t.shape[1])[None])[0])
    length = len(ids)
    for _ in range(9):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(forward(padded)[0, len(ids) - 1].argmax()))
    assert text == tokenizer.decode(ids[length:])


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "hierarchical", "hash", "random", "balanced"])
def test_routers_route_alike_token_by_token_and_all_at_once(router):
    model = Decoder(case_config(router, model={"num_layers": 1}), rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(model)
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 6)), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    forward = jax.jit(lambda s: nnx.merge(graphdef, s)(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)[0])
    extend = jax.jit(lambda s, t, p, c: nnx.merge(graphdef, s).extend(t, p, c))
    cache, found = model.init_cache(2, 8), []
    for i in range(6):
        logits_B1V, cache = extend(state, tokens_BL[:, i : i + 1], positions_BL[:, i : i + 1], cache)
        found.append(logits_B1V[:, 0])
    oracle.assert_close(jnp.stack(found, axis=1), forward(state))


def test_what_stands_behind_a_prompt_takes_no_slot_where_evaluation_has_capacity(caplog):
    moe = {"dispatch": "capacity", "capacity_group": "global", "eval_capacity_factor": 1.0}
    model = Decoder(case_config("softmax_topk", moe=moe), rngs=nnx.Rngs(params=0))
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (1, 32)), jnp.int32)
    positions_BL = jnp.arange(32, dtype=jnp.int32)[None]
    is_token_BL = positions_BL < 12
    found = [
        model.extend(t, positions_BL, model.init_cache(1, 32), is_token_BL)[0][:, :12]
        for t in (tokens_BL, jnp.where(is_token_BL, tokens_BL, 7))
    ]
    np.testing.assert_array_equal(*found)
    with caplog.at_level("WARNING", logger="moejax"):
        next(generate(model, ByteTokenizer(), ["a"], max_tokens=1))
    assert "moe.eval_capacity_factor drops tokens here" in caplog.text


def test_generating_with_a_router_that_looks_ahead_says_so(caplog):
    model = Decoder(case_config("expert_choice"), rngs=nnx.Rngs(params=0))
    with caplog.at_level("WARNING", logger="moejax"):
        next(generate(model, ByteTokenizer(), ["a"], max_tokens=1))
    assert "moe.router=expert_choice looks at later tokens" in caplog.text


def test_a_sequence_does_not_depend_on_the_others_of_its_batch(model):
    prompts = ["a", "some longer prompt", "mid"]
    together = generate_text(model, ByteTokenizer(), prompts, max_tokens=8, seed=3)
    reordered = generate_text(model, ByteTokenizer(), [prompts[0], "other", "words"], max_tokens=8, seed=3)
    assert together[0] == reordered[0]
    assert len(set(together)) == 3


def test_the_seed_decides_the_samples(model):
    first, again, other = (generate_text(model, ByteTokenizer(), ["x"], max_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_finished_document_stays_finished(model):
    class Stops(ByteTokenizer):
        eos_id = property(lambda self: self.stop)

    greedy = next(generate(model, ByteTokenizer(), ["q"], max_tokens=1, temperature=0.0))[0]
    tokenizer = Stops()
    object.__setattr__(tokenizer, "stop", greedy)
    assert list(generate(model, tokenizer, ["q"], max_tokens=5, temperature=0.0)) == [[None]]


def draw(logits, temperature, top_p, count=2000):
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(jnp.log(jnp.array(logits)), (count, len(logits)))
    drawn = sample(logits, jnp.float32(temperature), jnp.float32(top_p), keys, jnp.zeros(count, jnp.int32))
    return np.bincount(np.asarray(drawn), minlength=logits.shape[1]) / count


def test_sampling_follows_the_distribution():
    np.testing.assert_allclose(draw([0.5, 0.2, 0.3], 1.0, 1.0), [0.5, 0.2, 0.3], atol=0.04)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    np.testing.assert_allclose(draw([0.5, 0.2, 0.3], 1.0, 0.6), [0.625, 0, 0.375], atol=0.04)
    np.testing.assert_allclose(draw([0.5, 0.2, 0.3], 1.0, 0.01), [1, 0, 0])


def test_temperature_sharpens_and_zero_is_greedy():
    np.testing.assert_allclose(draw([0.6, 0.4], 0.5, 1.0), [0.36 / 0.52, 0.16 / 0.52], atol=0.04)
    np.testing.assert_allclose(draw([0.4, 0.6], 0.0, 1.0), [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_tokens": 1, "top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model, ByteTokenizer(), ["x"], **arguments))
