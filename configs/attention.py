"""The tiny model with other attention, to compare it.

  moejax train --config=configs/attention.py --workdir=runs/attention
  moejax train --config=configs/attention.py:latent --workdir=runs/attention_latent

`windows`: three layers with a window, whose rotary positions turn a quarter of each head, and one
that sees all, with another base and slower frequencies; scores have a soft cap, and dense layers
biases. `chunks`: layers of chunks and of all without positions take turns, as in Llama 4. `latent`:
multi-head latent attention with biases. Everything else is as in `tiny_moe.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

KINDS = ("windows", "chunks", "latent")


def get_config(kind: str = "windows") -> ConfigDict:
    """Returns the recipe of a kind of attention: windows, chunks or latent."""
    if kind not in KINDS:
        raise ValueError(f"attention has no kind {kind}; use {', '.join(KINDS)}")
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    if kind == "windows":
        config.attention.window = 64
        config.attention.window_layers = "window, window, window, full"
        config.attention.rope_dim = 8
        config.attention.rope_theta = 1e6
        config.attention.rope_theta_window = 1e4
        config.attention.rope_scaling = "linear"
        config.attention.score_cap = 50.0
        config.model.ffn_bias = True
        config.moe.first_dense = 1
    if kind == "chunks":
        config.attention.chunk = 64
        config.attention.chunk_layers = "chunk, full"
        config.attention.rope_layers = "rope, none"
        config.attention.temperature = 0.1
        config.attention.temperature_length = 64
        config.attention.qk_norm = "unweighted"
        config.attention.qk_norm_after_rope = True
        config.attention.qk_norm_layers = "rope"
    if kind == "latent":
        config.attention.kind = "latent"
        config.attention.d_query_latent = 96
        config.attention.d_kv_latent = 64
        config.attention.d_nope = 32
        config.attention.d_rope = 16
        config.attention.d_value = 32
        config.attention.latent_bias = True
        config.attention.out_bias = True
    return config
