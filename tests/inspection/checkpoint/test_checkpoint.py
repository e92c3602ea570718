"""The inspection of released models: its figures, its page, and models of every structure."""

import dataclasses
import math
import re

import numpy as np
import pytest

from cases.hf import FOLDER, reference, write_released, write_texts
from cases.pages import Page
from moejax.data.tokenizers.ids import IdTokenizer
from moejax.inspection import trace
from moejax.inspection.analysis.expert_weights import expert_outputs
from moejax.inspection.checkpoint.measure import (
    MOST_TOKENS,
    InspectionError,
    affordable_rows,
    inspect_checkpoint,
)
from moejax.inspection.checkpoint.page import note_of, render_inspection, summary_rows
from moejax.inspection.counterfactuals.evaluate import counterfactuals
from moejax.inspection.counterfactuals.plan import KINDS
from moejax.interop.hf.load import read_config
from moejax.interop.hf.released import load_released
from moejax.training.run_directory.text import TextPlaces

slow = pytest.mark.slow
PROMPTS = ("5 17 3 9 9 100", "7 8 9")

OTHERS = [
    pytest.param("granitemoeshared", marks=slow),  # shared experts
    pytest.param("jetmoe", marks=slow),  # attention that is routed, too
    pytest.param("deepseek_v3", marks=slow),  # a dense layer first, shared experts, bias, groups
]
FAMILIES = ["longcat_flash", *OTHERS]  # identity experts, and two dense networks beside them


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released model with a tokenizer, and where text and rows are."""
    folder = tmp_path_factory.mktemp("released")
    model = load_released(write_released(folder / "model"))
    data = dataclasses.replace(model.config.data, seq_len=64)
    config = dataclasses.replace(model.config, data=data)
    places = TextPlaces(directory=str(folder / "data"), files=write_texts(folder / "texts"))
    return dataclasses.replace(model, config=config), places


@pytest.fixture(scope="module")
def inspection(released):
    model, places = released
    return inspect_checkpoint(model, ["The people of the town"], max_rows=6, places=places)


@pytest.fixture(scope="module")
def longcat():
    return load_released(FOLDER / "longcat_flash")


def test_figures_of_a_layer_are_those_counted_token_by_token(longcat):
    inspection = inspect_checkpoint(longcat, PROMPTS)
    assert inspection.num_rows is None
    assert inspection.text == "9 tokens of the prompts"
    traces = [trace(longcat, prompt) for prompt in PROMPTS]
    for n, layer in enumerate(inspection.layers):
        counts, firsts, entropies = [0] * 12, [], []
        for found in traces:
            for t in range(len(found.tokens_T)):
                for expert in found.experts_NTK[n, t]:
                    counts[expert] += 1
                firsts.append(found.weights_NTK[n, t, 0])
                probs = found.probs_NTE[n, t].tolist()
                entropies.append(-sum(p * math.log(p) for p in probs if p > 0))
        assert layer.layer == n
        assert layer.load_E == pytest.approx([12 * number / 27 for number in counts])
        assert layer.unvisited == tuple(e for e in range(12) if not counts[e])
        assert layer.first_weight == pytest.approx(sum(firsts) / 9)
        assert layer.entropy == pytest.approx(sum(entropies) / 9)
    table = summary_rows(inspection.layers)
    assert [row["layer"] for row in table] == ["0", "1"]
    assert table[0]["most load"] == f"{max(inspection.layers[0].load_E):.2f}"
    assert table[0]["unvisited"].startswith(f"{len(inspection.layers[0].unvisited)} (")


def test_rows_are_routed_as_their_documents_are_traced(released, inspection):
    model, places = released
    rows = model.corpus(places).rows("validation")
    experts, entropies, pairs_EE = [], [], np.zeros((4, 4), int)
    for index in np.unique(inspection.routed.rows_T):
        row = rows[int(index)]
        for segment in range(1, row["segments"][:-1].max() + 1):
            found = trace(model, row["tokens"][:-1][row["segments"][:-1] == segment])
            experts.append(found.experts_NTK)
            entropies.append(-(found.probs_NTE * np.log(found.probs_NTE)).sum(axis=2))
    experts_NTK = np.concatenate(experts, axis=1)
    assert inspection.num_rows == 6
    np.testing.assert_array_equal(inspection.routed.experts_NTK, experts_NTK)
    entropy_N = np.concatenate(entropies, axis=1).mean(axis=1)
    found_N = [layer.entropy for layer in inspection.layers]
    np.testing.assert_allclose(found_N, entropy_N, rtol=1e-5)
    for first, second in experts_NTK[1]:
        for pair in ((first, second), (second, first), (first, first), (second, second)):
            pairs_EE[pair] += 1
    np.testing.assert_array_equal(inspection.coactivation_NEE[1], pairs_EE)


def test_the_page_has_every_section_and_fetches_nothing(released, inspection, monkeypatch):
    model, _ = released
    page = Page(render_inspection(inspection, model, "model <b>"))
    assert page.ids == ["summary", "load", "text", "tokens", "attributes", "coactivation"]
    assert "model <b>" in page.text
    assert "4 experts, top 2, in 2 of 2 layers" in page.text
    assert f"{len(inspection.routed.tokens_T):,} tokens of 6 validation rows" in page.text
    assert "Routing goes most by" in page.text
    assert "people" in page.text
    for _, attributes in page.elements:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!data:)|@import", page.style)


def test_a_page_of_prompts_says_so_and_counterfactuals_have_a_section(longcat, released, tmp_path):
    page = Page(render_inspection(inspect_checkpoint(longcat, PROMPTS), longcat, "model"))
    assert "9 tokens of the prompts were routed" in page.text
    model, places = released
    wanted = inspect_checkpoint(model, ["a"], max_rows=2, places=places)
    changed = counterfactuals(
        model, max_rows=2, kinds=("capacity",), capacity_factors=(0.5,), places=places
    )
    assert changed.rows[1].dropped > 0.4
    shown = dataclasses.replace(wanted, counterfactuals=changed)
    page = Page(render_inspection(shown, model, "model"))
    assert page.ids[-1] == "counterfactuals"
    assert "2 validation rows" in page.text and "capacity factor 0.5" in page.text


def test_what_cannot_be_inspected_is_said_in_one_line(longcat):
    for prompts, settings, line in (
        ((), {}, "rows of text cannot be routed; give token ids"),
        (PROMPTS, {"max_rows": 3}, "--rows=3 needs rows of text"),
        (PROMPTS, {"with_counterfactuals": True}, "--counterfactuals needs rows of text"),
        (PROMPTS, {"places": TextPlaces(files="x")}, "--data.files=x needs rows of text"),
    ):
        with pytest.raises(InspectionError, match=re.escape(line)) as caught:
            inspect_checkpoint(longcat, prompts, **settings)
        assert "\n" not in str(caught.value)
    dense = load_released(FOLDER / "mistral")
    with pytest.raises(InspectionError, match="is dense: it has no experts"):
        inspect_checkpoint(dense, PROMPTS)


def test_attention_that_is_routed_is_said_not_to_be_shown():
    for family, said in (
        ("jetmoe", "Attention has experts, too, whose routing is"),
        ("mixtral", ""),
    ):
        config, _ = read_config(FOLDER / family)
        assert note_of(config).startswith(said)
        assert bool(note_of(config)) == bool(said)


def test_rows_by_default_are_fewer_the_larger_the_model():
    tiny, _ = read_config(FOLDER / "mixtral")
    assert affordable_rows(tiny, 1024) == MOST_TOKENS // 1024
    model = dataclasses.replace(tiny.model, d_model=4096)
    moe = dataclasses.replace(tiny.moe, d_expert=14_336)
    attention = dataclasses.replace(tiny.attention, num_heads=32, num_kv_heads=8, head_dim=128)
    large = dataclasses.replace(tiny, model=model, moe=moe, attention=attention)
    assert 1 <= affordable_rows(large, 64) < MOST_TOKENS // 64
    assert affordable_rows(large, 10**6) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_and_outputs_of_experts_are_what_the_reference_computes(family):
    loaded = load_released(FOLDER / family)
    expected = reference(family)
    tokens_BL = expected["input_ids"]
    found = trace(loaded, tokens_BL[0])
    length = tokens_BL.shape[1]
    for n, layer in enumerate(found.layers):
        combine_TE = np.zeros((length, found.num_experts))
        np.put_along_axis(combine_TE, found.experts_NTK[n], found.weights_NTK[n], axis=1)
        wanted_TE = expected[f"router.{layer}.combine"][:length]
        np.testing.assert_allclose(combine_TE, wanted_TE, atol=2e-5, err_msg=str(layer))
    if family == "deepseek_v3":
        return  # what its reference says of the layer has shared experts in it
    outputs_NETD = expert_outputs(loaded.model, tokens_BL)
    for n, layer in enumerate(found.layers):
        combine_TE = expected[f"router.{layer}.combine"]
        with_weights_TE, identity_Te = np.split(combine_TE, [outputs_NETD.shape[1]], axis=1)
        inputs_TD = expected[f"mlp_in.{layer}"].reshape(-1, outputs_NETD.shape[-1])
        y_TD = np.einsum("TE,ETD->TD", with_weights_TE, outputs_NETD[n])
        y_TD += identity_Te.sum(axis=1, keepdims=True) * inputs_TD
        rest_TD = expected[f"mlp_out.{layer}"].reshape(y_TD.shape) - y_TD
        # JetMoE adds a bias, the same for all tokens.
        rest_TD -= rest_TD.mean(axis=0) if family == "jetmoe" else 0
        np.testing.assert_allclose(rest_TD, 0, atol=3e-5, err_msg=str(layer))


class Letters(IdTokenizer):
    """Text by letters, in few ids."""

    kind = "letters"

    def encode(self, text):
        return [3 + ord(letter) % (self.vocab_size - 3) for letter in text]


def with_letters(family, tmp_path):
    """A released model that reads generated text."""
    loaded = load_released(FOLDER / family)
    data = dataclasses.replace(
        loaded.config.data, source="synthetic", seq_len=32, directory=str(tmp_path)
    )
    config = dataclasses.replace(loaded.config, data=data)
    tokenizer = Letters(loaded.config.num_token_ids)
    return dataclasses.replace(loaded, config=config, tokenizer=tokenizer)


def check_changes(loaded, kinds):
    """Asserts that changed routing changes the loss, where it is one; returns the result."""
    result = counterfactuals(loaded, max_rows=2, kinds=kinds, num_pairs=1)
    assert all(math.isfinite(row.loss) for row in result.rows)
    assert result.layers == tuple(loaded.config.moe_layers)
    for row in result.rows:
        if row.kind in ("uniform", "random", "swap"):
            assert row.change != 0, row
    return result


def test_a_shortcut_block_is_evaluated_under_other_routing(tmp_path):
    result = check_changes(with_letters("longcat_flash", tmp_path), ("uniform", "bias_off"))
    assert [row.layer for row in result.of_kind("uniform")] == [None, 0, 1]
    assert len(result.of_kind("bias_off")) == 1


@slow
@pytest.mark.parametrize("family", ["longcat_flash", "jetmoe", "deepseek_v3"])
def test_models_of_every_structure_have_all_counterfactuals(family, tmp_path):
    loaded = with_letters(family, tmp_path)
    result = check_changes(loaded, KINDS)
    (trained,) = [row for row in result.of_kind("top_k") if row.setting == result.top_k[0]]
    assert trained.change == pytest.approx(0, abs=1e-6)
    num_experts = loaded.config.moe.num_experts
    for expert in range(num_experts):
        assert np.isfinite(result.ablation_NE["output 0"][:, expert]).all()
    if family == "longcat_flash":
        assert result.left_out["ablate: output 0"] == "the output of identity experts is the token"
        assert np.isnan(result.ablation_NE["output 0"][:, num_experts:]).all()
