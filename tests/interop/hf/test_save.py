"""Models written in the layout of released ones, and read back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from cases.hf import FAMILIES, FOLDER, model_type
from cases.training import small_config
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config
from moejax.interop.hf.save import save_model
from moejax.models import Decoder

of_each = pytest.mark.parametrize("family", FAMILIES)


@of_each
def test_a_model_that_is_written_has_every_tensor_bit_for_bit(family, tmp_path):
    model = load_model(FOLDER / family)
    save_model(model, tmp_path / "out", model_type(family))
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(FOLDER / family / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
        assert found[name].dtype == tensor.dtype
    assert read_config(tmp_path / "out")[0] == read_config(FOLDER / family)[0]
    with pytest.raises(HfError, match=r"holds config\.json; name a folder without a model"):
        save_model(model, tmp_path / "out", model_type(family))


@of_each
def test_both_spellings_of_a_configuration_are_one_model(family, tmp_path):
    published = FOLDER / family / "config.published.json"
    (tmp_path / "config.json").write_bytes(published.read_bytes())
    assert read_config(tmp_path)[0] == read_config(FOLDER / family)[0]


def test_a_model_with_dense_layers_and_experts_of_ours_is_read_back(tmp_path):
    config = small_config(
        model={"num_layers": 4, "tied_embeddings": False, "embedding_multiplier": 1.0},
        attention={"qk_norm": "head", "head_dim": 12},
        moe={"first_dense": 1, "every": 2, "router": "softmax_topk"},
    )
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    save_model(model, tmp_path, "qwen3_moe")
    assert json.loads((tmp_path / "config.json").read_text())["mlp_only_layers"] == [0, 1, 3]
    read = load_model(tmp_path)
    assert [kind is None for kind in read.config.layers] == [True, True, False, True]
    wanted = {layer for layer, _ in enumerate(model.walk())}
    blocks = zip(wanted, model.walk(), read.walk(), strict=True)
    for layer, (ours, _), (theirs, _) in blocks:
        for expected, found in zip(
            nnx.to_flat_state(nnx.state(ours, nnx.Param)),
            nnx.to_flat_state(nnx.state(theirs, nnx.Param)),
            strict=True,
        ):
            np.testing.assert_array_equal(found[1][...], expected[1][...], err_msg=str(layer))


def test_a_model_of_the_plain_configuration_is_written_as_granite(tmp_path):
    # The reference loads such a file, with logits within 4e-7 of ours.
    config = small_config()
    assert config.model.tied_embeddings and config.model.embedding_multiplier == 0
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    save_model(model, tmp_path, "granitemoe")
    keys = json.loads((tmp_path / "config.json").read_text())
    assert keys["architectures"] == ["GraniteMoeForCausalLM"]
    assert keys["embedding_multiplier"] == 32**0.5
    assert keys["attention_multiplier"] == pytest.approx(8**-0.5, rel=1e-15)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    block = next(model.walk())[0]
    fused_EPFD = np.einsum("EDPF->EPFD", block.moe.experts.gate_up[...])
    found_EXD = tensors["model.layers.0.block_sparse_moe.input_linear.weight"]
    np.testing.assert_array_equal(found_EXD, fused_EPFD.reshape(4, 32, 32))
    assert_same_logits(model, load_model(tmp_path))


def assert_same_logits(model, read):
    tokens_BL = jnp.arange(32).reshape(2, 16)
    positions_BL = tokens_BL % 16
    logits = []
    for each in (model, read):
        hidden_BLD, _ = each(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
        logits.append(np.asarray(each.logits(hidden_BLD))[..., : model.config.num_token_ids])
    np.testing.assert_array_equal(logits[1], logits[0])


def test_a_model_in_mup_is_written_with_its_multipliers(tmp_path):
    config = small_config(mup={"base_width": 8, "base_depth": 1})
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    save_model(model, tmp_path, "granitemoe")
    keys = json.loads((tmp_path / "config.json").read_text())
    found = [keys[k] for k in ("embedding_multiplier", "logits_scaling", "residual_multiplier")]
    assert found == [8**0.5, 4.0, 0.5]
    assert_same_logits(model, load_model(tmp_path))


@pytest.mark.parametrize(
    ("sections", "leaf"),
    [
        ({"moe": {"activation": "geglu"}}, "moe.activation=geglu"),
        ({"moe": {"router": "sigmoid_topk"}}, "moe.router=sigmoid_topk"),
        ({"attention": {"qk_norm": "head"}}, "attention.qk_norm=head"),
        ({"model": {"embedding_multiplier": 0.0}}, "model.embedding_multiplier=5.65685"),
        ({"moe": {"num_shared_experts": 1}}, "moe.num_shared_experts=1"),
    ],
)
def test_a_model_that_is_none_of_the_family_is_refused_by_its_leaf(sections, leaf, tmp_path):
    model = {"embedding_multiplier": 1.0, "tied_embeddings": False} | sections.pop("model", {})
    config = small_config(model=model, **sections)
    with pytest.raises(HfError, match=f"{leaf}.* does not fit the family mixtral"):
        save_model(Decoder(config, rngs=nnx.Rngs(params=0)), tmp_path / "out", "mixtral")
    assert not (tmp_path / "out").exists()
