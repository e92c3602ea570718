"""The tiny model with LongRoPE, whose slow rotations are stretched for longer texts.

  moejax train --config=configs/long_rope.py --workdir=runs/long_rope

Ding et al. 2024: each pair of dimensions has a factor on its wavelength. Here they grow from 1 to 4
from the fastest pair to the slowest; the published ones were searched for. Everything else is as in
`tiny_moe.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

STRETCH = 4.0


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    num_pairs = config.model.d_model // config.attention.num_heads // 2
    factors = [STRETCH ** (pair / (num_pairs - 1)) for pair in range(num_pairs)]
    config.attention.rope_scaling = "longrope"
    config.attention.rope_wavelengths = ", ".join(f"{factor:.4f}" for factor in factors)
    config.attention.rope_original_length = 128
    config.attention.rope_magnitude = 1.0
    config.attention.rope_long_magnitude = 1.15
    return config
