"""SparseMixer: experts close to the best one compete, sampled in training (Phi-3.5-MoE, GRIN).

  moejax train --config=configs/routers/sparse_mixer.py --workdir=runs/routers/sparse_mixer

Liu et al. 2023 and 2024. The threshold is wider than the published 0.01, so that a short run
samples at all. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "sparse_mixer"
    config.moe.mixer_threshold = 0.1
    config.moe.jitter = 0.01
    config.schedule.jitter = "linear:0"
    return config
