"""Routers, balancing, experts and K at equal active parameters.

There are 36 settings with three seeds each, and dense controls.

  moejax sweep --config=experiments/routing_sweep/sweep.py --match=active_params --seeds=3 \
      --pack=3 --runner=pool --processes=2 --dir=runs/routing_sweep
  python experiments/routing_sweep/analysis.py

Two layers of width 32 on presidential addresses, BPE of 512, rows of 128 tokens. README.md next to
this file has the question, what was predicted, and the answer.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from moejax import config as moejax_config
from moejax.sweeps import choice, product

ROUTERS = {"softmax_topk": "softmax", "sigmoid_topk": "sigmoid", "noisy_topk": "softmax"}
"""Routers with the score of an expert; softmax is over all experts."""

SCHEMES: dict[str, dict[str, Any]] = {
    "none": {"moe.balance_weight": 0.0, "moe.selection_bias": False},
    "loss": {"moe.balance_weight": 0.01, "moe.selection_bias": False},
    "bias": {"moe.balance_weight": 0.0, "moe.selection_bias": True},
}
"""Balancing: nothing, the balance loss, or a bias on the selection without a loss."""


def get_config() -> ConfigDict:
    """Returns the recipe that arms are matched with: 8 experts of width 64, 2 for each token."""
    config = moejax_config.default()
    config.model.num_layers = 2
    config.model.d_model = 32
    config.attention.num_heads = 2
    config.attention.num_kv_heads = 1
    config.model.d_ff = 128
    config.model.remat = False
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.d_expert = 64
    config.moe.bias_rate = 5e-3
    config.data.source = "speeches"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 512
    config.data.seq_len = 128
    config.train.num_steps = 400
    config.train.batch_size = 8
    config.train.log_every = 10
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.train.keep_checkpoints = 1
    config.optimizer.learning_rate = 5e-3
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Yields points without seeds.

    The weight of a single expert stays a probability; those of several are normalised to sum to 1.
    """
    axes = product(
        choice("moe.router", *ROUTERS), choice("moe.num_experts", 8, 32), choice("moe.top_k", 1, 4)
    )
    for point in axes:
        for scheme in SCHEMES.values():
            rest = {
                "moe.score": ROUTERS[point["moe.router"]],
                "moe.renormalize": point["moe.top_k"] > 1,
            }
            yield point | rest | scheme
