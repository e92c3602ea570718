"""The leaves that say what a run begins with, where that is not a fresh initialisation."""

import dataclasses
from typing import Literal

from moejax.config.errors import require
from moejax.config.parameter_groups import read_names
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import other_than, value
from moejax.config.sections.moe import MoeConfig

HAS_SOURCE = other_than("init.source", "")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a run begins with."""

    source: str = leaf("", "run directory whose weights it begins with, DIR or DIR:STEP")
    state: Literal["weights", "optimizer", "all"] = leaf(
        "weights",
        "what is taken besides: nothing, the optimizer's moments, or these and the step, so that "
        "training goes on where the source stopped",
        needs=HAS_SOURCE,
    )
    include: str = leaf(
        "",
        "parameters that are taken, kinds or patterns of paths such as 'experts, stacks/0/*'; "
        "empty: all",
        needs=HAS_SOURCE,
    )
    exclude: str = leaf(
        "", "parameters that are not taken but initialised, such as 'router'", needs=HAS_SOURCE
    )
    rename: str = leaf(
        "",
        "beginnings of paths in the source and here, where they differ, such as "
        "'stacks/0/=stacks/1/'",
        needs=HAS_SOURCE,
    )
    resize: Literal["refuse", "copy", "fresh"] = leaf(
        "refuse",
        "arrays of another shape: an error, more experts as copies, or initialised",
        needs=HAS_SOURCE,
    )
    upcycle: Literal["none", "copy", "drop", "granular"] = leaf(
        "none",
        "experts from the dense layers of the source: each a copy, a copy of which a part is drawn "
        "again, or segments of a copy",
        needs=HAS_SOURCE,
    )
    upcycle_noise: float = leaf(
        0.0,
        "noise on copies, in standard deviations of their weights",
        at_least=0,
        needs=value("init.upcycle", "copy"),
    )
    upcycle_drop: float = leaf(
        0.5,
        "fraction of the hidden units of a copy that are drawn again",
        at_least=0,
        at_most=1,
        needs=value("init.upcycle", "drop"),
    )


def validate_init(init: InitConfig) -> None:
    """Raises `ConfigError` for names that cannot be read, or parts of a whole state."""
    parts = {
        "include": init.include,
        "exclude": init.exclude,
        "rename": init.rename,
        "resize": init.resize if init.resize != "refuse" else "",
        "upcycle": init.upcycle if init.upcycle != "none" else "",
    }
    read_names("init.include", init.include)
    read_names("init.exclude", init.exclude)
    read_renames(init.rename)
    for name, given in parts.items():
        require(
            not given or init.state == "weights",
            f"init.{name}={given} takes a part of the weights, and init.state={init.state} needs "
            "all of them; use init.state=weights",
        )
        require(
            not given or init.upcycle == "none" or name == "upcycle",
            f"init.{name}={given} does nothing with init.upcycle={init.upcycle}, which takes all "
            "but experts and routers; leave it out",
        )


def validate_upcycling(init: InitConfig, moe: MoeConfig) -> None:
    """Raises `ConfigError` for MoE layers that cannot begin as dense ones."""
    if init.upcycle == "none":
        return
    require(
        moe.num_experts > 0,
        f"init.upcycle={init.upcycle} makes experts, and moe.num_experts=0; set that",
    )
    require(
        moe.num_shared_experts == 0 and moe.num_choices == moe.num_experts and not moe.d_latent,
        f"init.upcycle={init.upcycle} makes experts with weights of the model's width alone; use "
        "no shared, zero, identity, constant or latent experts",
    )
    require(
        moe.renormalize and moe.route_scale == 1,
        f"init.upcycle={init.upcycle} makes experts whose weights sum to 1; use "
        "moe.renormalize=True and moe.route_scale=1",
    )


def read_renames(text: str) -> dict[str, str]:
    """Returns beginnings of paths here by those in the source.

    Raises:
      ConfigError: an entry that is no pair.
    """
    renames: dict[str, str] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        before, equals, after = map(str.strip, entry.partition("="))
        require(
            bool(before and equals and after),
            f"init.rename: {entry!r} must have the form SOURCE=HERE, such as stacks/0/=stacks/1/",
        )
        require(before not in renames, f"init.rename names {before} twice; leave one out")
        renames[before] = after
    return renames
