"""Leaves that change nothing of how a text is evaluated, as opposed to those of the weights."""

from moejax.config.loss_specs import LOSS_WEIGHTS

MOE_OF_TRAINING = (
    *LOSS_WEIGHTS,
    "allow_noncausal",
    "balance_convention",
    "balance_scope",
    "bias_centered",
    "bias_rate",
    "capacity_factor",
    "capacity_group",
    "capacity_order",
    "dispatch",
    "exchange",
    "exchange_buffer",
    "exchange_chunks",
    "expert_dropout",
    "grouped_matmul",
    "jitter",
    "overflow",
    "save_exchanged",
)
"""Leaves of `moe`, without capacity in evaluation."""

OF_COMPUTATION = ("compute_dtype", "remat", "scan_layers")
"""Leaves of `model` that say how it is computed."""


def is_of_weights(key: str) -> bool:
    """Whether weights that were made with one value of a leaf mean something else with another.

    Args:
      key: the dotted key.
    """
    section, _, name = key.partition(".")
    if section == "moe":
        return name not in MOE_OF_TRAINING
    if section == "model":
        return name not in OF_COMPUTATION
    return section == "attention" or key == "data.tokenizer"
