"""Is the rule of `configs/ladder.py` a good one? Other sizes at the compute of two of its rungs.

moejax ladder --config=experiments/ladder/scan.py --dir=runs/ladder_scan --seeds=1
"""

import runpy
from pathlib import Path

LADDER = runpy.run_path(str(Path(__file__).parents[2] / "configs/ladder.py"))

BUDGETS = (5e11, 5e12)
WIDTHS = (32, 48, 64, 80)

get_config = LADDER["get_config"]
rung = LADDER["rung"]


def sweep():
    """Yields dense models and models with 8 experts of several widths."""
    for num_experts in (0, 8):
        for width in WIDTHS:
            yield {"moe.num_experts": num_experts, "model.d_model": width}
