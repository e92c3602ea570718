"""A ladder: dense, 8 and 32 experts at four budgets of equal active compute.

  moejax ladder --config=configs/ladder.py --dry-run
  moejax ladder --config=configs/ladder.py --dir=runs/ladder

The text is presidential addresses in bytes, so that the vocabulary costs little. `rung` is the rule
from a budget to a shape: width grows with the sixth root of the compute and depth with the width,
so that parameters and tokens grow alike; the learning rate falls as the width grows. Arms whose
`sweep` sets a width, as a scan does, keep the rule for everything else.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config

BUDGETS = (5e11, 1.5e12, 5e12, 1.5e13)


def get_config() -> ConfigDict:
    """Returns what all runs have in common."""
    config = moejax_config.default()
    config.model.remat = False
    config.moe.top_k = 2
    config.data.source = "speeches"
    config.data.tokenizer = "bytes"
    config.data.seq_len = 256
    config.train.batch_size = 8
    config.train.log_every = 50
    config.train.eval_every = 0
    config.optimizer.learning_rate = 0.01
    config.mup.base_width = 64
    return config


def rung(budget: float, arm: dict) -> dict:
    """Returns the shape of a model at a budget."""
    width = arm.get("model.d_model") or 16 * round(3 * (budget / 1.5e12) ** 0.25)
    return {
        "model.d_model": width,
        "model.num_layers": max(2, round(width / 32)),
        "model.d_ff": 4 * width,
        "attention.num_heads": width // 16,
        "attention.num_kv_heads": width // 16,
    }


def sweep():
    """Yields the arms."""
    for num_experts in (0, 8, 32):
        yield {"moe.num_experts": num_experts}


def gate() -> dict:
    """Returns what an arm must reach, and the noise of differences in nats.

    The noise is the standard deviation over three seeds of 8 experts over dense, at the two lower
    rungs: 0.0048 and 0.0058.
    """
    return {"speedup": 1.0, "noise": 0.0053}
