"""Keys of `config.json` that fixtures lack: which leaves they set, and how they are written.

Models with most of them were compared with the reference, too (logits within 5e-6).
"""

import json

import pytest

from cases.hf import FOLDER
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import read_config
from moejax.interop.hf.save import published_keys
from moejax.interop.hf.shared.sparse_layers import layers_with_experts
from moejax.interop.hf.shared.windows import shortest_pattern

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES = [
    ("llama", {"rope_scaling": None}, {"attention.rope_scaling": "none"}),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 3}},
        {"attention.rope_scaling": "linear", "attention.rope_factor": 3.0},
    ),
    (
        "llama",
        {"rope_scaling": YARN | {"attention_factor": 1.3, "truncate": False}},
        {"attention.rope_magnitude": 1.3, "attention.rope_truncate": False},
    ),
    ("llama", {"attention_bias": True}, {"attention.qkv_bias": True, "attention.out_bias": True}),
    ("llama", {"mlp_bias": True}, {"model.ffn_bias": True}),
    ("mistral", {"sliding_window": None}, {"attention.window": 0}),
    ("mistral", {"sliding_window": "absent"}, {"attention.window": 4096}),
    (
        "mixtral",
        {"sliding_window": 9},
        {"attention.window": 9, "attention.window_layers": "window"},
    ),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 9}, {"attention.window": 0}),
    ("qwen3", {"max_window_layers": 9}, {"attention.window": 0}),
    ("qwen3", {"max_window_layers": 0}, {"attention.window_layers": "window"}),
    ("qwen3", {"layer_types": [FULL, SLIDING] * 2}, {"attention.window_layers": "full, window"}),
    ("qwen3", {"head_dim": "absent"}, {"attention.head_dim": 128}),
    (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 5},
        {"attention.window": 5, "attention.window_layers": "window"},
    ),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, {"moe.every": 2}),
    (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 28,
            "layer_types": "absent",
        },
        {"attention.window": 5, "attention.window_layers": "window, full"},
    ),
    ("gpt_oss", {"attention_bias": False}, {"attention.out_bias": False}),
    ("dots1", {"sliding_window": None}, {"attention.window": 0}),
    ("dots1", {"sliding_window": "absent", "max_window_layers": 0}, {"attention.window": 4096}),
    ("glm4_moe", {"use_qk_norm": False}, {"attention.qk_norm": "none"}),
    ("glm4_moe", {"partial_rotary_factor": 0.25}, {"attention.rope_dim": 4}),
    ("glm4_moe", {"partial_rotary_factor": 1.0}, {"attention.rope_dim": 0}),
    ("glm4_moe", {"partial_rotary_factor": "absent"}, {"attention.rope_dim": 8}),
    ("glm4_moe", {"head_dim": 20, "partial_rotary_factor": 0.3334}, {"attention.rope_dim": 6}),
    # 30 / 44 of 44 dimensions are rounded down to 29.
    ("glm4_moe", {"head_dim": 44, "partial_rotary_factor": 0.69}, {"attention.rope_dim": 30}),
    ("minimax_m2", {"rotary_dim": 16}, {"attention.rope_dim": 0}),
    ("minimax_m2", {"rotary_dim": 4}, {"attention.rope_dim": 4}),
    (
        "ernie4_5_moe",
        {"moe_layer_start_index": 2, "moe_layer_end_index": 2, "moe_layer_interval": 1},
        {"dense": [0, 1, 3]},
    ),
    (
        "ernie4_5_moe",
        {"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        {"dense": []},
    ),
    ("ernie4_5_moe", {"moe_norm_min": 0.5}, {"moe.renormalize_floor": 0.5}),
    (
        "ernie4_5_moe",
        {"use_bias": True},
        {
            "attention.qkv_bias": True,
            "attention.out_bias": True,
            "model.ffn_bias": True,
            "model.logits_bias": True,
            "moe.shared_bias": True,
        },
    ),
    (
        "ernie4_5_moe",
        {"use_bias": True, "moe_num_shared_experts": 0},
        {"moe.num_shared_experts": 0, "moe.shared_bias": False},
    ),
    # theta * alpha^(A / (A - 2)) with A = 12
    ("hunyuan_v1_moe", {}, {"attention.rope_theta": 1e4 * 50 ** (12 / 10)}),
    ("hunyuan_v1_moe", {"rope_scaling": None}, {"attention.rope_theta": 1e4}),
    ("hunyuan_v1_moe", {"moe_topk": [3, 2, 4]}, {"moe.top_k": 3, "top_k": [3, 2, 4]}),
    ("deepseek_v2", {"q_lora_rank": None}, {"attention.d_query_latent": 0}),
    ("deepseek_v2", {"topk_method": "greedy"}, {"moe.num_groups": 1}),
    ("deepseek_v2", {"mlp_bias": True}, {"model.ffn_bias": True, "moe.shared_bias": True}),
    ("deepseek_v3", {"attention_bias": True}, {"attention.latent_bias": True}),
]


def read(tmp_path, family, changes):
    """Returns the configuration of a fixture's published keys with changes, and the family."""
    keys = json.loads((FOLDER / family / "config.published.json").read_text()) | changes
    kept = {key: value for key, value in keys.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    return read_config(tmp_path)


def found_in(config, name):
    if name == "dense":
        return [layer for layer, kind in enumerate(config.layers) if kind is None]
    if name == "top_k":
        return [kind.top_k for kind in config.layers]
    section, leaf = name.split(".")
    return getattr(getattr(config, section), leaf)


@pytest.mark.parametrize(("family", "changes", "expected"), CASES, ids=str)
def test_keys_set_leaves_and_are_written_so_that_they_set_them_again(
    tmp_path, family, changes, expected
):
    config, table = read(tmp_path, family, changes)
    assert {name: found_in(config, name) for name in expected} == expected
    (tmp_path / "config.json").write_text(json.dumps(published_keys(config, table)))
    assert read_config(tmp_path)[0].attention == config.attention
    assert read_config(tmp_path)[0].layers == config.layers


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ("llama", {"rope_scaling": YARN | {"alpha": 2.0}}, "rope_scaling has alpha"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("hunyuan_v1_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "=dynamic"),
        ("hunyuan_v1_moe", {"moe_topk": [3, 2]}, "moe_topk=[3, 2] must have a number for each"),
        ("hunyuan_v1_moe", {"num_shared_expert": [1, 2, 1]}, "num_shared_expert=[1, 2, 1]"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=True"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list=[1, 0, 1]"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias=False"),
        ("glm4_moe", {"partial_rotary_factor": 0.05}, "partial_rotary_factor=0.05 rotates 0"),
        ("glm4_moe", {"partial_rotary_factor": 0.2}, "attention.rope_dim=3 must be even"),
        ("qwen3", {"layer_types": [FULL]}, "layer_types="),
        ("qwen3", {"use_sliding_window": False, "layer_types": [SLIDING] * 4}, "does not fit"),
        ("qwen3_moe", {"layer_types": [SLIDING] * 4}, "does not fit the other keys of windows"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method=noaux_tc is not implemented"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2 must be"),
        ("ernie4_5_moe", {"moe_layer_start_index": 9}, "no layer has experts"),
    ],
    ids=str,
)
def test_keys_of_what_is_not_implemented_are_refused_by_name(tmp_path, family, changes, words):
    with pytest.raises(HfError) as caught:
        read(tmp_path, family, changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_patterns_are_as_short_as_they_can_be():
    assert shortest_pattern(["a", "b", "a", "b"]) == "a, b"
    assert shortest_pattern(["a", "b", "a"]) == "a, b"
    assert shortest_pattern(["a", "a", "b"]) == "a, a, b"
    assert shortest_pattern(["a"] * 5) == "a"


def test_layers_with_experts_are_a_pattern_if_there_is_one():
    def leaves(text):
        return layers_with_experts([letter == "E" for letter in text])

    assert leaves("EEE") == {"moe.first_dense": 0, "moe.every": 1}
    assert leaves("..EE") == {"moe.first_dense": 2, "moe.every": 1}
    assert leaves(".E.E.") == {"moe.first_dense": 0, "moe.every": 2}
    assert leaves("...E.E") == {"moe.first_dense": 2, "moe.every": 2}
    assert leaves("E.EE") == {"moe.per_layer": "1: dense"}
