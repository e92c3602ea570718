"""Values of keys that a family does not have, or that do not go together, are refused by name."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from cases.hf import FOLDER
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config

LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.4, 2.0],
    "long_factor": [1.0, 1.1, 1.4, 2.0],
    "short_mscale": 1.15,
    "long_mscale": 1.25,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("flex_olmo", {"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ("granitemoe", {"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ("granitemoe", {"logits_scaling": 0.0}, "model.logits_divisor=0.0 must be above 0"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok=3 is not implemented"),
        (
            "phimoe",
            {"rope_parameters": LONG_ROPE | {"short_factor": [1.0, 2.0]}},
            "attention.rope_wavelengths has 2 factors; it must have 4",
        ),
        (
            "phimoe",
            {"rope_parameters": LONG_ROPE | {"rope_type": "yarn"}},
            "rope_type=yarn, which is not implemented; longrope is",
        ),
        (
            "phimoe",
            {"rope_parameters": LONG_ROPE | {"attention_factor": 1.5}},
            "rope_scaling has attention_factor, which is not implemented",
        ),
        ("dbrx", {"attn_config": {"kv_n_heads": 1}}, "num_key_value_heads=2 must be attn_config."),
        ("dbrx", {"attn_config": {"bias": True}}, "attn_config has bias=True, which is not"),
        (
            "dbrx",
            {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}},
            "ffn_act_fn={'name': 'gelu'}, which is not implemented; silu is",
        ),
        ("dbrx", {"ffn_config": {"hidden_size": 64}}, "ffn_config.hidden_size=64 must be d_model"),
        ("longcat_flash", {"attention_bias": True}, "attention_bias=True is not implemented"),
        ("longcat_flash", {"mla_scale_q_lora": False}, "mla_scale_q_lora=False is not implemented"),
        ("longcat_flash", {"zero_expert_type": "copy"}, "zero_expert_type='copy' is not"),
        ("jetmoe", {"activation_function": "gelu"}, "activation_function='gelu' is not"),
        ("jetmoe", {"num_attention_heads": 2}, "num_attention_heads=2 must be 4"),
    ],
)
def test_another_value_is_refused_by_its_key(family, changes, words, tmp_path):
    published = json.loads((FOLDER / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | changes))
    with pytest.raises(HfError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert words in message and "\n" not in message


def test_norms_of_weights_are_read_as_the_reference_counts_them(tmp_path):
    published = json.loads((FOLDER / "dbrx" / "config.json").read_text())
    for norm, expected in ((None, (False, 1.0)), (1.0, (True, 1.0)), (2.0, (True, 2.0))):
        published["ffn_config"]["moe_normalize_expert_weights"] = norm
        (tmp_path / "config.json").write_text(json.dumps(published))
        moe = read_config(tmp_path)[0].moe
        assert (moe.renormalize, moe.weight_norm) == expected


def test_what_longcat_never_reads_is_left_out(tmp_path):
    folder = FOLDER / "longcat_flash"
    expected = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.mlp."
    stray = tensors[f"{prefix}experts.7.gate_proj.weight"]
    tensors[f"{prefix}experts.8.gate_proj.weight"] = stray
    tensors[f"{prefix}router.classifier.bias"] = stray[:12, 0].copy()
    tensors["model.mtp.norm.weight"] = stray[0].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    published = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | {"router_bias": True}))
    found = load_model(tmp_path)
    assert found.config == expected.config
    del tensors[f"{prefix}experts.7.gate_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HfError, match=r"has no tensor model\.layers\.0\.mlp\.experts\.7\.gate"):
        load_model(tmp_path)
