"""The leaves of a parametrisation in which learning rates carry over from small models to large."""

import dataclasses

from moejax.config.errors import require
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import other_than

IS_ON = other_than("mup.base_width", 0)


@dataclasses.dataclass(frozen=True)
class MupConfig:
    """The sizes of the model at which the learning rate was found; see docs/transfer.md."""

    base_width: int = leaf(
        0, "d_model of the small model; 0: the usual parametrisation", at_least=0
    )
    base_d_ff: int = leaf(
        0, "its model.d_ff; 0: in proportion to its width", at_least=0, needs=IS_ON
    )
    base_d_expert: int = leaf(
        0, "its moe.d_expert; 0: in proportion to its width", at_least=0, needs=IS_ON
    )
    base_depth: int = leaf(
        0,
        "its layers: what a layer adds to the residual is divided by how many times more there "
        "are; 0: depth changes nothing",
        at_least=0,
        needs=IS_ON,
    )
    base_top_k: int = leaf(
        0,
        "its experts per token, whose weights sum to 1; 0: their number changes nothing",
        at_least=0,
        needs=IS_ON,
    )


def validate_mup(mup: MupConfig, optimizer: str) -> None:
    """Raises `ConfigError` for an optimizer whose updates no rule scales."""
    require(
        not mup.base_width or optimizer not in ("adafactor", "sgd"),
        f"mup.base_width={mup.base_width} scales the updates of adamw, lion, muon and muonh, and "
        f"not those of optimizer.name={optimizer}; use one of these, or mup.base_width=0",
    )
