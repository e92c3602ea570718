"""Traces: what the model did with each token, for any router, padding and mesh."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.pages import HOSTILE, Page
from cases.training import case_config, initial_state, make, small_config
from moejax.config import ConfigError, MeshConfig
from moejax.data import Corpus, prepare
from moejax.data.packing import lay_out
from moejax.data.tokenizers import ByteTokenizer
from moejax.inference import route
from moejax.inference.load import LoadedRun
from moejax.inspection import Trace, open_run
from moejax.inspection.analysis.trace import route_corpus, spread_rows, trace
from moejax.inspection.report.build import count_routed_tokens
from moejax.models import Decoder
from moejax.models.parameters import count_parameters
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.run_directory.layout import write_run_directory

TEXT = "To be, or not to be"


def untrained(config):
    """A model with strong attention: a wrong position, mask or neighbour changes the routing."""
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    for block in (stack.block for stack in model.stacks):
        for name in ("query", "key", "value", "out"):
            weight = getattr(block.mixer, name)
            weight[...] = 3 * weight[...]
    return LoadedRun(config, model, ByteTokenizer(), 0)


@pytest.fixture(scope="module")
def loaded():
    return untrained(small_config())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a run with a checkpoint of step 0."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    setup = make(small_config(data={"directory": str(workdir.parent / "data")}, mesh={"data": 1}))
    state = initial_state(setup)
    write_run_directory(workdir, setup.config, count_parameters(setup.config), "", "moejax train")
    ByteTokenizer().save(workdir)
    with Checkpoints(workdir, setup) as checkpoints:
        checkpoints.save(state)
    return workdir


def made(num_tokens=3, num_layers=2, num_experts=4, top_k=2, pieces=None):
    """A trace of random numbers; layers are 1, 3, 5, ..."""
    rng = np.random.default_rng(0)
    logits_NTE = rng.normal(size=(num_layers, num_tokens, num_experts)).astype(np.float32)
    probs_NTE = np.exp(logits_NTE) / np.exp(logits_NTE).sum(axis=-1, keepdims=True)
    experts_NTK = np.argsort(-probs_NTE, axis=-1)[..., :top_k].astype(np.int32)
    return Trace(
        tokens_T=np.arange(num_tokens, dtype=np.int32) + 50,
        pieces=pieces or tuple(f"w{t}" for t in range(num_tokens)),
        layers=tuple(range(1, 2 * num_layers, 2)),
        experts_NTK=experts_NTK,
        weights_NTK=np.take_along_axis(probs_NTE, experts_NTK, axis=-1),
        logits_NTE=logits_NTE,
        probs_NTE=probs_NTE,
        num_experts=num_experts,
    )


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def assert_equal(first, second, tokens=slice(None)):
    np.testing.assert_array_equal(first.experts_NTK[:, tokens], second.experts_NTK[:, tokens])
    for name in ("weights_NTK", "logits_NTE", "probs_NTE"):
        np.testing.assert_allclose(
            getattr(first, name)[:, tokens], getattr(second, name)[:, tokens], atol=1e-5
        )


def test_a_trace_is_what_top_k_makes_of_its_logits(loaded):
    found = trace(loaded, TEXT)
    assert found.tokens_T.tolist() == [1, *ByteTokenizer().encode(TEXT)]
    assert found.tokens_T.dtype == np.int32
    assert found.pieces[:4] == ("<bos>", "T", "o", "▁")
    assert found.layers == (0, 1)
    assert found.num_experts == 4
    np.testing.assert_allclose(found.probs_NTE, softmax(found.logits_NTE), rtol=1e-5)
    np.testing.assert_array_equal(
        found.experts_NTK, np.argsort(-found.logits_NTE, axis=-1)[..., :2]
    )
    chosen_NTK = np.take_along_axis(found.probs_NTE, found.experts_NTK, axis=-1)
    np.testing.assert_allclose(
        found.weights_NTK, chosen_NTK / chosen_NTK.sum(axis=-1, keepdims=True), rtol=1e-5
    )
    in_order_NTE = np.sort(found.probs_NTE, axis=-1)
    np.testing.assert_allclose(
        found.margins_NT, in_order_NTE[..., 2] - in_order_NTE[..., 1], rtol=1e-5
    )


def test_a_trace_is_that_of_the_model_on_the_text_alone(loaded):
    tokens = jnp.array([[1, *ByteTokenizer().encode(TEXT)]], jnp.int32)
    graphdef, state = nnx.split(loaded.model)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    forward = jax.jit(
        lambda s: nnx.merge(graphdef, s)(tokens, jnp.ones_like(tokens), positions, trace=True)[1]
    )
    (stats,) = forward(state)
    found = trace(loaded, np.asarray(tokens[0]))
    np.testing.assert_array_equal(found.experts_NTK, stats.routing.experts_TK)
    np.testing.assert_allclose(found.logits_NTE, stats.routing.logits_TE, atol=1e-5)


def test_how_long_the_row_is_padded_changes_nothing(monkeypatch):
    model = untrained(case_config("soft"))  # its slots mix all tokens of the row
    found = trace(model, TEXT)
    monkeypatch.setattr(route, "SHORTEST", 32)
    assert_equal(found, trace(model, TEXT))


def test_earlier_tokens_are_routed_alike_whatever_follows(loaded):
    tokens = [1, *ByteTokenizer().encode(TEXT)]
    prefix = trace(loaded, tokens[:9])
    assert_equal(prefix, trace(loaded, tokens), tokens=slice(9))


def test_a_text_of_another_length_needs_no_new_program(loaded):
    trace(loaded, TEXT)
    num_programs = route._route._cache_size()
    trace(loaded, "another text, and a longer one")
    assert route._route._cache_size() == num_programs


def test_a_text_may_be_longer_than_the_rows_of_training(loaded):
    found = trace(loaded, 5 * TEXT)
    assert len(found.tokens_T) == 96 > loaded.config.data.seq_len
    assert_equal(trace(loaded, TEXT), found, tokens=slice(20))


@pytest.mark.parametrize("case", ["experts", "layers that differ", "hierarchical", "random"])
def test_choices_of_any_router_come_best_first_and_none_after_them(case):
    model = untrained(case_config(case))
    found = trace(model, TEXT)
    E = model.config.moe.num_choices
    assert (
        found.experts_NTK.shape
        == found.weights_NTK.shape
        == (len(found.layers), 20, model.config.moe.top_k)
    )
    assert found.logits_NTE.shape == found.probs_NTE.shape == (len(found.layers), 20, E)
    assert found.num_experts == E
    is_none_NTK = found.experts_NTK == E
    assert found.experts_NTK.min() >= 0
    assert found.experts_NTK.max() <= E
    assert not (is_none_NTK[..., :-1] & ~is_none_NTK[..., 1:]).any()
    assert not found.weights_NTK[is_none_NTK].any()
    assert (found.weights_NTK[~is_none_NTK] > 0).all()
    np.testing.assert_allclose(found.probs_NTE.sum(axis=-1), 1, rtol=1e-5)
    if case == "layers that differ":  # hash with two experts a token; dense; one expert a token
        assert found.layers == (0, 2)
        assert is_none_NTK.mean(axis=1).tolist() == [[0, 0], [0, 1]]
    else:
        assert not is_none_NTK.any()
    if case == "experts":
        assert E == 8
        assert found.experts_NTK.max() >= 4


def test_experts_that_choose_take_as_many_tokens_as_the_text_allows():
    model = untrained(case_config("expert_choice"))
    assert route.padded_length(model, 20) == 20  # a longer row would give each expert more slots
    found = trace(model, TEXT)
    for n in range(2):
        order = np.argsort(-found.probs_NTE[n], axis=0)
        wanted = order[:10]  # 20 tokens, 2 choices each, 4 experts
        for e in range(4):
            is_taken = (found.experts_NTK[n] == e).any(axis=-1)
            assert np.flatnonzero(is_taken).tolist() == sorted(wanted[:, e])
    assert (np.diff(found.weights_NTK, axis=-1) <= 0).all()
    is_choice_NTK = found.experts_NTK < 4
    chosen_NTK = np.take_along_axis(found.probs_NTE, np.minimum(found.experts_NTK, 3), axis=-1)
    np.testing.assert_allclose(found.weights_NTK, np.where(is_choice_NTK, chosen_NTK, 0), rtol=1e-6)


def test_where_evaluation_has_a_capacity_the_row_is_no_longer_than_the_text(loaded):
    moe = {"dispatch": "capacity", "eval_capacity_factor": 1.0}
    limited = dataclasses.replace(loaded, config=case_config("softmax_topk", moe=moe))
    assert route.padded_length(limited, 20) == 20
    assert route.padded_length(loaded, 20) == 64


def test_soft_routing_has_no_expert_but_says_how_much_of_each():
    model = untrained(case_config("soft"))
    found = trace(model, TEXT)
    assert (found.experts_NTK == 4).all()
    assert not found.weights_NTK.any()
    assert np.isnan(found.margins_NT).all()
    np.testing.assert_allclose(found.probs_NTE, softmax(found.logits_NTE), rtol=1e-5)
    assert np.ptp(found.probs_NTE, axis=1).min() > 1e-3  # they differ between tokens
    frame = found.to_frame()
    assert len(frame) == 2 * 20
    assert frame["expert"].isna().all()
    assert frame["prob"].isna().all()
    assert "mixes all experts; expert " in found._repr_html_()
    assert "none" not in repr(found)


def test_a_model_without_experts_and_tokens_it_cannot_know_are_refused(loaded):
    for tokens, message in (
        ([], "at least one"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([0.5], "type float64"),
        ([-1], r"from -1 to -1 must be in \[0, 320\)"),
        ([320], r"must be in \[0, 320\)"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(loaded, np.array(tokens))
    dense = small_config(moe={"num_experts": 0})
    with pytest.raises(ConfigError, match=r"moe.num_experts=0.* has no experts"):
        trace(dataclasses.replace(loaded, config=dense), TEXT)


def test_a_frame_has_a_row_for_each_choice_and_keeps_tokens_without_any():
    found = made()
    found.experts_NTK[1, 2], found.weights_NTK[1, 2] = 4, 0  # no expert
    found.experts_NTK[0, 1, 1], found.weights_NTK[0, 1, 1] = 4, 0  # one
    frame = found.to_frame()
    columns = ["token", "piece", "position", "layer", "rank", "expert", "weight", "prob", "logit"]
    assert frame.columns.tolist() == columns
    assert len(frame) == 12 - 2
    lone = frame[(frame["layer"] == 3) & (frame["position"] == 2)]
    assert lone["rank"].tolist() == [0]
    assert lone["expert"].isna().all()
    assert lone["prob"].isna().all()
    assert frame["expert"].notna().sum() == 9
    for row in frame[frame["expert"].notna()].itertuples():
        n, t, e = (1, 3).index(row.layer), row.position, row.expert
        assert (row.token, row.piece, e) == (50 + t, f"w{t}", found.experts_NTK[n, t, row.rank])
        assert row.weight == found.weights_NTK[n, t, row.rank]
        assert (row.prob, row.logit) == (found.probs_NTE[n, t, e], found.logits_NTE[n, t, e])


def test_margins_are_negative_where_something_overrules_the_probabilities():
    found = made(num_tokens=3, num_layers=1)
    found.probs_NTE[0] = [[0.5, 0.3, 0.15, 0.05]] * 3
    found.experts_NTK[0] = [[0, 1], [0, 3], [4, 4]]
    np.testing.assert_allclose(found.margins_NT, [[0.3 - 0.15, 0.05 - 0.3, np.nan]], rtol=1e-6)
    assert dataclasses.replace(made(top_k=4)).margins_NT == pytest.approx(
        made().probs_NTE.min(axis=-1)
    )


def test_the_text_of_a_trace_is_a_table_of_limited_width():
    found = made(num_tokens=40, num_layers=12, pieces=("<bos>", "a\nb", *["long" * 9] * 38))
    lines = repr(found).splitlines()
    assert lines[0] == "Trace of 40 tokens through 12 MoE layers of 4 experts"
    assert max(map(len, lines)) <= 100
    assert len(lines) == 2 + 24 + 1
    assert lines[1].split() == [
        "token",
        "piece",
        "layer",
        "1",
        "layer",
        "3",
        "layer",
        "5",
        "layer",
        "7",
    ]
    experts, weights = found.experts_NTK[0, 1], found.weights_NTK[0, 1]
    assert lines[3].startswith(
        f"1      a⏎b             {experts[0]} {weights[0]:.2f}, {experts[1]} {weights[1]:.2f}  "
    )
    assert lines[-1] == "... 16 more tokens and 8 more layers; to_frame() has all"
    assert "more" not in repr(made())


def test_the_page_of_a_trace_shows_each_layer_and_escapes_pieces():
    found = made(num_experts=40, pieces=(HOSTILE, "\n", "ok"))
    found.experts_NTK[1, 2] = 40
    html = found._repr_html_()
    page = Page(html)
    assert "\x00" not in html
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    switches = [attributes for tag, attributes in page.elements if tag == "input"]
    assert [(s["type"], s["value"], "checked" in s) for s in switches] == [
        ("radio", "0", True),
        ("radio", "1", False),
    ]
    assert all(
        f'input[value="{n}"]:checked) .layer-{n}{{display:block}}' in page.style for n in range(2)
    )
    tokens = [attributes for tag, attributes in page.elements if tag == "span"]
    expert, weight, prob = (
        found.experts_NTK[0, 0, 0],
        found.weights_NTK[0, 0, 0],
        found.probs_NTE[0, 0].max(),
    )
    assert tokens[0]["title"].startswith(
        f"token 50 at position 0; expert {expert}: weight {weight:.3f}, "
    )
    assert tokens[0]["title"].endswith(f"margin {found.margins_NT[0, 0]:.3f}")
    assert f"{prob:.3f}" in tokens[0]["title"]
    first_experts = found.experts_NTK[:, :, 0].ravel()[:5]  # the last token has none
    classes = [f"token s{expert % 32}" for expert in first_experts]
    assert [token["class"] for token in tokens] == [*classes, "token"]
    assert tokens[5]["title"] == "token 52 at position 2; no expert"
    assert "Layer 3" in page.text
    # The number of the expert follows the token's text.
    assert f"⏎ {found.experts_NTK[0, 1, 0]}" in page.text


def test_a_page_of_very_many_tokens_says_how_many_it_leaves_out():
    found = made(num_tokens=1100, num_layers=1)
    assert "76 more tokens are not shown" in Page(found._repr_html_()).text
    assert found._repr_html_().count("<span") == 1024


@dataclasses.dataclass(frozen=True)
class Stored(Corpus):
    """A corpus in memory."""

    stored: tuple = ()

    def rows(self, split):
        assert split == "validation"
        return self.stored


def packed_corpus(seq_len, num_rows=5):
    """Rows of two documents and then padding; `documents` from 7 on."""
    rng = np.random.default_rng(0)
    rows = []
    for row in range(num_rows):
        pieces = [
            (rng.integers(3, 200, size).astype(np.int32), 7 + 2 * row + i)
            for i, size in enumerate((6, 4))
        ]
        rows.append(lay_out(pieces, seq_len))
    return Stored(ByteTokenizer(), seq_len, {}, {}, {}, {}, None, stored=tuple(rows))


def test_rows_of_a_corpus_are_routed_as_the_model_routes_each_alone(loaded):
    found = route_corpus(loaded, corpus := packed_corpus(16))
    assert len(found.tokens_T) == 5 * 10
    assert found.layers == (0, 1)
    assert found.num_experts == 4
    assert found.positions_T.tolist() == [*range(6), *range(4)] * 5
    assert found.rows_T.tolist() == np.repeat(range(5), 10).tolist()
    assert found.documents_T.tolist() == np.repeat(np.arange(10) + 7, [6, 4] * 5).tolist()
    for row, stored in enumerate(corpus.stored):
        for piece, first in ((slice(0, 6), 0), (slice(6, 10), 6)):
            alone = trace(loaded, stored["tokens"][piece])
            here = slice(10 * row + first, 10 * row + first + len(alone.tokens_T))
            np.testing.assert_array_equal(found.tokens_T[here], alone.tokens_T)
            np.testing.assert_array_equal(found.experts_NTK[:, here], alone.experts_NTK)
            np.testing.assert_allclose(found.weights_NTK[:, here], alone.weights_NTK, atol=1e-5)
    assert "50 tokens of 5 rows through 2 MoE layers of 4 experts" in repr(found)


def test_rows_may_be_a_sample_and_come_in_batches(loaded, monkeypatch):
    corpus = packed_corpus(16)
    everything = route_corpus(loaded, corpus)
    module = sys.modules["moejax.inspection.analysis.trace"]
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 2 * 16)  # two rows, then one
    some = route_corpus(loaded, corpus, max_rows=3, seed=1)
    rows = np.unique(some.rows_T)
    assert len(rows) == 3
    is_there = np.isin(everything.rows_T, rows)
    np.testing.assert_array_equal(some.tokens_T, everything.tokens_T[is_there])
    np.testing.assert_array_equal(some.documents_T, everything.documents_T[is_there])
    np.testing.assert_array_equal(some.experts_NTK, everything.experts_NTK[:, is_there])


@pytest.mark.parametrize(("num_rows", "max_rows"), [(100, 7), (8, 7), (7, 7), (3, 7), (5, None)])
def test_sampled_rows_are_spread_over_the_split_in_order(num_rows, max_rows):
    draws = np.array([spread_rows(num_rows, max_rows, seed) for seed in range(50)])
    num = min(num_rows, max_rows or num_rows)
    assert draws.shape == (50, num)
    assert (np.diff(draws, axis=1) > 0).all()
    edges = np.linspace(0, num_rows, num + 1)
    assert ((draws > edges[:-1] - 1) & (draws < edges[1:])).all()
    assert (len(np.unique(draws, axis=0)) > 1) == (num < num_rows)
    np.testing.assert_array_equal(draws[3], spread_rows(num_rows, max_rows, 3))


def test_no_rows_at_all_are_refused():
    with pytest.raises(ValueError, match="max_rows=0 must be at least 1"):
        spread_rows(10, 0, 0)


def test_a_saved_run_is_traced_alike_on_one_device_and_split_over_a_mesh(saved):
    run = open_run(saved)
    alone, split = run.load(), run.load(mesh=MeshConfig(data=2, expert=4))
    assert (alone.step, alone.mesh, run.checkpoints, run.settings) == (0, None, (0,), alone.config)
    assert dict(split.mesh.shape) | {"data": 2, "expert": 4} == dict(split.mesh.shape)
    weights = split.model.stacks[0].block.ffn.experts.down[...]
    experts_per_device = {shard.data.shape[1] for shard in weights.addressable_shards}
    assert experts_per_device == {1}
    assert_equal(trace(alone, TEXT), trace(split, TEXT))
    corpus = prepare(alone.config.data, alone.tokenizer)
    one, other = (route_corpus(loaded, corpus, max_rows=6) for loaded in (alone, split))
    np.testing.assert_array_equal(one.rows_T, other.rows_T)
    np.testing.assert_array_equal(one.experts_NTK, other.experts_NTK)
    with pytest.raises(ConfigError, match=r"mesh\.expert"):
        run.load(mesh=MeshConfig(data=1, expert=3))


def test_tokens_counted_for_the_report_are_those_of_the_routed_rows(saved):
    loaded = open_run(saved).load()
    corpus = prepare(loaded.config.data, loaded.tokenizer)
    routed = route_corpus(loaded, corpus, max_rows=256)
    counts_NEV = count_routed_tokens(routed, 320)
    assert counts_NEV.shape == (2, 4, 320)
    assert counts_NEV.sum() == routed.experts_NTK.size
    expected_V = 2 * np.bincount(routed.tokens_T, minlength=320)  # top 2
    np.testing.assert_array_equal(counts_NEV.sum(axis=1), [expected_V] * 2)
