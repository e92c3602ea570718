"""Generation: prompts of a batch do not disturb each other, sampling obeys its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.training import case_config, small_config
from moejax.cli.verbs.generate import TEMPERATURE, TOP_P
from moejax.data.tokenizers import ByteTokenizer
from moejax.inference.generate import HOTTEST, generate, generate_text, prompt_ids
from moejax.inference.layered import LayeredDecoder
from moejax.inference.sampling import CANDIDATES, Sampling, sample
from moejax.models import Decoder


@pytest.fixture(scope="module")
def model():
    """A model of strong attention, so that a wrong position or cache slot changes its text."""
    model = Decoder(small_config(), rngs=nnx.Rngs(params=0))
    for stack in model.stacks:
        for name in ("query", "key", "value", "out"):
            weight = getattr(stack.block.mixer, name)
            weight[...] = 3 * weight[...]
    return model


def test_greedy_generation_equals_repeated_full_forward_passes(model):
    tokenizer = ByteTokenizer()
    (text,) = generate_text(model, tokenizer, ["to be"], max_tokens=9, temperature=0.0)
    ids = [tokenizer.bos_id, *tokenizer.encode("to be")]
    prompt_length = len(ids)

    @jax.jit
    def forward(tokens_BL):
        positions_BL = jnp.arange(tokens_BL.shape[1])[None]
        hidden_BLD, _ = model(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
        return model.logits(hidden_BLD)

    for _ in range(9):
        padded_BL = np.zeros((1, 16), np.int32)
        padded_BL[0, : len(ids)] = ids
        last_logits_V = forward(padded_BL)[0, len(ids) - 1]
        ids.append(int(last_logits_V.argmax()))
    assert text == tokenizer.decode(ids[prompt_length:])


def token_by_token(model, tokens_BL, positions_BL):
    """Returns the logits of tokens that are given one after the other."""
    decoder = LayeredDecoder(model)
    cache = decoder.init_cache(*tokens_BL.shape)
    found = []
    for i in range(tokens_BL.shape[1]):
        token_B1 = tokens_BL[:, i : i + 1]
        position_B1 = positions_BL[:, i : i + 1]
        x_B1D, cache = decoder.extend(token_B1, position_B1, cache)
        logits_B1V = decoder.logits(x_B1D)
        found.append(logits_B1V[:, 0])
    return jnp.stack(found, axis=1)


@pytest.mark.parametrize(
    "router", ["softmax_topk", "sigmoid_topk", "hierarchical", "hash", "random", "balanced"]
)
def test_routers_route_alike_token_by_token_and_all_at_once(router):
    model = Decoder(case_config(router, model={"num_layers": 1}), rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(model)
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 6)), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    segments_BL = jnp.ones_like(tokens_BL)

    @jax.jit
    def forward(state):
        model = nnx.merge(graphdef, state)
        hidden_BLD, _ = model(tokens_BL, segments_BL, positions_BL)
        return model.logits(hidden_BLD)

    oracle.assert_close(token_by_token(model, tokens_BL, positions_BL), forward(state))


def test_padding_after_a_prompt_takes_no_slot_of_the_eval_capacity(caplog):
    moe = {"dispatch": "capacity", "capacity_group": "global", "eval_capacity_factor": 1.0}
    model = Decoder(case_config("softmax_topk", moe=moe), rngs=nnx.Rngs(params=0))
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (1, 32)), jnp.int32)
    positions_BL = jnp.arange(32, dtype=jnp.int32)[None]
    is_token_BL = positions_BL < 12
    other_padding_BL = jnp.where(is_token_BL, tokens_BL, 7)
    decoder = LayeredDecoder(model)

    def prompt_of(row_BL):
        x_BLD, _ = decoder.extend(row_BL, positions_BL, decoder.init_cache(1, 32), is_token_BL)
        return x_BLD[:, :12]

    np.testing.assert_array_equal(prompt_of(tokens_BL), prompt_of(other_padding_BL))
    with caplog.at_level("WARNING", logger="moejax"):
        next(generate(model, ByteTokenizer(), ["a"], max_tokens=1))
    assert "moe.eval_capacity_factor drops choices here as well" in caplog.text


def test_a_token_alone_in_its_step_is_never_dropped_and_the_log_says_so(caplog):
    moe = {"dispatch": "capacity", "capacity_group": "sequence", "eval_capacity_factor": 0.5}
    limited = Decoder(case_config("softmax_topk", moe=moe), rngs=nnx.Rngs(params=0))
    dropless = Decoder(case_config("softmax_topk"), rngs=nnx.Rngs(params=0))
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 8)), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))

    def at_once(model):
        hidden_BLD, _ = model(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
        return model.logits(hidden_BLD)

    oracle.assert_close(token_by_token(limited, tokens_BL, positions_BL), at_once(dropless))
    assert np.abs(at_once(limited) - at_once(dropless)).max() > 0.01
    with caplog.at_level("WARNING", logger="moejax"):
        next(generate(limited, ByteTokenizer(), ["a"], max_tokens=1))
    assert "drops choices of the prompt, never of what is written" in caplog.text
    assert "depends on the batch" not in caplog.text


def test_generating_with_a_router_that_looks_ahead_says_so(caplog):
    model = Decoder(case_config("expert_choice"), rngs=nnx.Rngs(params=0))
    with caplog.at_level("WARNING", logger="moejax"):
        next(generate(model, ByteTokenizer(), ["a"], max_tokens=1))
    assert "moe.router=expert_choice looks at later tokens" in caplog.text


def test_a_sequence_does_not_depend_on_the_others_of_its_batch(model):
    prompts = ["a", "some longer prompt", "mid"]
    together = generate_text(model, ByteTokenizer(), prompts, max_tokens=8, seed=3)
    reordered = generate_text(
        model, ByteTokenizer(), [prompts[0], "other", "words"], max_tokens=8, seed=3
    )
    assert together[0] == reordered[0]
    assert len(set(together)) == 3


def test_the_seed_decides_the_samples(model):
    def text(seed):
        return generate_text(model, ByteTokenizer(), ["x"], max_tokens=12, seed=seed)

    first = text(seed=1)
    assert text(seed=1) == first
    assert text(seed=2) != first


def test_a_finished_document_stays_finished(model):
    class Stops(ByteTokenizer):
        end_ids = property(lambda self: (self.stop,))

    greedy = next(generate(model, ByteTokenizer(), ["q"], max_tokens=1, temperature=0.0))[0]
    tokenizer = Stops()
    object.__setattr__(tokenizer, "stop", greedy)
    assert list(generate(model, tokenizer, ["q"], max_tokens=5, temperature=0.0)) == [[None]]


class Released(ByteTokenizer):
    """As those of some released models: no token begins a text, and any of two ends one."""

    adds_bos = False
    ends = (2,)
    end_ids = property(lambda self: self.ends)

    def decode(self, ids):
        """Without the first space, as sentencepiece does it."""
        return super().decode(ids).removeprefix(" ")


def test_prompts_are_ids_or_texts_that_begin_as_the_tokenizer_says():
    own, released = ByteTokenizer(), Released()
    ids = own.encode("ab")
    assert prompt_ids(own, "ab") == [own.bos_id, *ids]
    assert prompt_ids(released, "ab") == ids
    assert prompt_ids(released, ids) == prompt_ids(own, ids) == ids
    for tokenizer in (own, released):  # a model needs one token
        assert prompt_ids(tokenizer, "") == prompt_ids(tokenizer, []) == [own.bos_id]


def test_a_text_and_its_ids_are_the_same_prompt(model):
    tokenizer = ByteTokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode("to be")]
    texts = generate_text(model, tokenizer, ["to be", ids], max_tokens=6, temperature=0.0)
    assert texts[0] == texts[1] != ""
    without_begin = generate_text(model, Released(), [ids[1:]], max_tokens=6, temperature=0.0)
    assert without_begin == generate_text(
        model, Released(), ["to be"], max_tokens=6, temperature=0.0
    )


def test_any_of_several_ids_ends_a_text(model):
    steps = generate(model, ByteTokenizer(), ["q"], max_tokens=3, temperature=0.0)
    ids = [id for (id,) in steps]
    tokenizer = Released()
    prompt = [tokenizer.bos_id, *tokenizer.encode("q")]
    tokenizer.ends = (999, ids[2])
    found = [id for (id,) in generate(model, tokenizer, [prompt], max_tokens=9, temperature=0.0)]
    assert found == [*ids[: ids.index(ids[2])], None]


def test_a_continuation_keeps_the_space_that_a_text_of_its_own_would_lose(model):
    tokenizer = Released()
    logits = model.logits
    space = tokenizer.encode(" ")[0]
    decoder = LayeredDecoder(model)
    decoder.logits = lambda x: logits(x).at[..., space].add(1e4)
    assert generate_text(decoder, tokenizer, ["a"], max_tokens=2, temperature=0.0) == ["  "]


sample = jax.jit(sample)


def draw(probs, temperature, top_p, count=2000):
    """Returns how often each token is drawn, as a share of `count` draws."""
    keys_B = jax.random.split(jax.random.key(0), count)
    sampling = Sampling.from_settings(temperature, top_p, keys_B)
    logits_V = jnp.log(jnp.array(probs))
    logits_BV = jnp.broadcast_to(logits_V, (count, len(probs)))
    drawn_B = sample(logits_BV, sampling, jnp.zeros(count, jnp.int32))
    return np.bincount(np.asarray(drawn_B), minlength=len(probs)) / count


def test_sampling_follows_the_distribution():
    np.testing.assert_allclose(draw([0.5, 0.2, 0.3], 1.0, 1.0), [0.5, 0.2, 0.3], atol=0.04)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    np.testing.assert_allclose(draw([0.5, 0.2, 0.3], 1.0, 0.6), [0.625, 0, 0.375], atol=0.04)
    np.testing.assert_allclose(draw([0.5, 0.2, 0.3], 1.0, 0.01), [1, 0, 0])


def test_the_defaults_of_the_command_neither_invent_nor_repeat():
    """Ten likely tokens and a long tail share the probability, and the tail is hardly drawn."""
    probabilities = np.r_[np.full(10, 0.085), np.full(300, 0.15 / 300)]
    shares = draw(probabilities, TEMPERATURE, TOP_P)
    assert shares[10:].sum() < 0.02  # at temperature 1 and without a cut 0.15
    assert shares[:10].min() > 0.05  # at temperature 0 one of them is always drawn


def test_temperature_sharpens_and_zero_is_greedy():
    np.testing.assert_allclose(draw([0.6, 0.4], 0.5, 1.0), [0.36 / 0.52, 0.16 / 0.52], atol=0.04)
    np.testing.assert_allclose(draw([0.4, 0.6], 0.0, 1.0), [0, 1])


def sorted_nucleus(logits_V, top_p, top_k=None):
    """Returns the nucleus as defined, and the distance of `top_p` from the nearest edge.

    Tokens are taken by probability, of equals the first ones first, until their mass is reached.
    With `top_k` the mass of as many tokens is 1.
    """
    float64_V = np.asarray(logits_V, np.float64)
    exp_V = np.exp(float64_V - float64_V.max())
    order_V = np.argsort(-exp_V, kind="stable")[:top_k]
    sorted_V = exp_V[order_V] / exp_V[order_V].sum()
    mass_before_V = np.cumsum(sorted_V) - sorted_V
    distance = np.abs(mass_before_V - top_p).min()
    return order_V[mass_before_V < top_p], distance


PARTS = [
    *[(0, top_p) for top_p in (0.0507, 0.3007, 0.9007)],
    *[(7, 0.9007), (7, 1.0), (CANDIDATES, 0.3007)],
    *[(300, 0.2008), (300, 0.9003), (300, 1.0), (1000, 0.9007), (1000, 1.0)],
]
"""Masses that are not those of a whole number of equal tokens."""


@pytest.mark.parametrize(("top_k", "top_p"), PARTS)
def test_partial_selection_draws_what_the_sorted_vocabulary_gives(top_k, top_p):
    rng = np.random.default_rng(0)
    # Of 600 tokens: peaked rows, flat ones whose nucleus is larger than the candidates, and ties.
    scaled = [rng.normal(size=(8, 600)) * scale for scale in (6, 1, 0.01)]
    distinct_BV = np.concatenate(scaled).astype(np.float32)
    equal_BV = np.zeros((2, 600), np.float32)
    logits_BV = np.concatenate([distinct_BV, np.round(distinct_BV), equal_BV])
    keys_B = jax.random.split(jax.random.key(1), len(logits_BV))
    positions_B = jnp.arange(len(logits_BV), dtype=jnp.int32)
    sampling = Sampling.from_settings(1.0, top_p, keys_B, top_k)
    drawn_B = sample(jnp.asarray(logits_BV), sampling, positions_B)
    draw_keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (600,)))(draw_keys_B)
    is_larger = set()
    for row, noise_V in enumerate(np.asarray(noise_BV)):
        logits_V = logits_BV[row]
        nucleus, distance = sorted_nucleus(logits_V, top_p, top_k or None)
        # No token is on the edge, where rounding decides.
        assert distance > 1e-6 or top_p == 1
        noisy = logits_V[nucleus] + noise_V[: len(nucleus)]
        assert drawn_B[row] == nucleus[np.argmax(noisy)]
        is_larger.add(len(nucleus) > CANDIDATES)
    assert True in is_larger or top_p < 0.9 or 0 < top_k <= CANDIDATES
    assert False in is_larger or top_p == 1


def test_a_nucleus_larger_than_the_candidates_changes_no_other_sequence():
    peaked_V = np.linspace(30, 0, 600, dtype=np.float32)
    flat_V = np.zeros(600, np.float32)
    sampling = Sampling.from_settings(1.0, 0.999, jax.random.split(jax.random.key(1), 2))
    positions_B = jnp.zeros(2, jnp.int32)
    alone_B = sample(jnp.stack([peaked_V, peaked_V]), sampling, positions_B)
    with_flat_B = sample(jnp.stack([peaked_V, flat_V]), sampling, positions_B)
    assert alone_B[0] == with_flat_B[0]


@pytest.mark.parametrize(("temperature", "top_p", "sorts"), [(0, 0.9, 0), (1, 1.0, 0), (1, 0.9, 2)])
def test_nothing_is_sorted_where_nothing_is_cut(temperature, top_p, sorts):
    keys_B = jax.random.split(jax.random.key(0), 2)
    sampling = Sampling.from_settings(temperature, top_p, keys_B)
    logits_BV = jnp.zeros((2, 600))
    positions_B = jnp.zeros(2, jnp.int32)
    program = jax.make_jaxpr(sample)(logits_BV, sampling, positions_B)
    names = oracle.primitives(program)
    assert names.count("top_k") + names.count("sort") == sorts


def test_temperatures_and_masses_share_the_programs_of_their_method():
    keys_B = jax.random.split(jax.random.key(0), 2)
    settings = {
        "nucleus": [(0.5, 0.9), (0.7, 0.5)],
        "all": [(0.5, 1), (2, 1)],
        "greedy": [(0, 0.9), (0, 1)],
    }
    for method, (first, second) in settings.items():
        one = Sampling.from_settings(*first, keys_B)
        other = Sampling.from_settings(*second, keys_B)
        assert one.method == other.method == method
        assert jax.tree.structure(one) == jax.tree.structure(other)


def test_ids_that_are_no_token_are_never_drawn(model):
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 8)), jnp.int32)
    hidden_BLD, _ = model(tokens_BL, jnp.ones_like(tokens_BL), jnp.zeros_like(tokens_BL))
    logits_BLV = model.logits(hidden_BLD)
    assert logits_BLV.shape[-1] == 320
    keys_B = jax.random.split(jax.random.key(0), 500)
    # The highest temperature makes all tokens equally probable.
    for temperature, top_p in [(0.0, 1.0), (HOTTEST, 1.0), (HOTTEST, 0.999)]:
        sampling = Sampling.from_settings(temperature, top_p, keys_B)
        logits_BV = jnp.broadcast_to(logits_BLV[0, 0], (500, 320))
        drawn_B = sample(logits_BV, sampling, jnp.zeros(500, jnp.int32))
        assert drawn_B.max() < ByteTokenizer.vocab_size
        assert temperature == 0 or len(set(drawn_B.tolist())) > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        (
            {"max_tokens": 1, "temperature": 1e7},
            r"--temperature=10000000.0 must be between 0 and 1e\+06",
        ),
        ({"max_tokens": 1, "temperature": float("nan")}, "--temperature=nan must be between 0"),
        ({"max_tokens": 1, "top_p": 0.0}, "top_p=0.0"),
        ({"max_tokens": 1, "top_k": -1}, "top_k=-1"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model, ByteTokenizer(), ["x"], **arguments))
