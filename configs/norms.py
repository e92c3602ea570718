"""The tiny model with other norms and another residual, to compare them.

  moejax train --config=configs/norms.py --workdir=runs/norms
  moejax train --config=configs/norms.py:post --workdir=runs/norms_post

`sandwich`: zero-centred RMSNorm before and after each part, and capped logits, as in Gemma 2
(Gemma Team 2024). `post`: norms after each part, within the residual, as in OLMo 2 and FlexOlmo.
`parallel`: attention and experts read the same LayerNorm, as in Command (Cohere 2024). `granite`:
the multipliers of Granite 3.0 (IBM 2024). Everything else is as in `tiny_moe.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

KINDS = ("sandwich", "post", "parallel", "granite")


def get_config(kind: str = "sandwich") -> ConfigDict:
    """Returns the recipe of one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"norms has no kind {kind}; use {', '.join(KINDS)}")
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    if kind == "sandwich":
        config.model.norm = "zero_centered_rms"
        config.model.norm_order = "sandwich"
        config.model.logits_cap = 30.0
    elif kind == "post":
        config.model.norm_order = "post"
        config.attention.qk_norm = "whole"
    elif kind == "parallel":
        config.model.norm = "layer_without_bias"
        config.model.parallel_residual = True
    else:
        config.model.embedding_multiplier = 12.0
        config.model.residual_multiplier = 0.22
        config.model.logits_divisor = 6.0
        config.attention.score_factor = 0.5
    return config
