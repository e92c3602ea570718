"""The auxiliary losses by name, and what goes together with each.

A loss is one line of `LOSS_SPECS`. From it come the leaf of its weight, `moe.NAME_weight`, the knob
and the schedule of that name, what they are refused with, and the metrics `loss/NAME` and
`loss/NAME_weighted`. Its function is in `moejax/moe/balancing/losses.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from moejax.config.router_rules import ROUTER_RULES

Section = TypeVar("Section", bound=type)


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """An auxiliary loss, and what goes together with it.

    Attributes:
      meaning: what it is; the leaf means "weight of" that.
      default: its weight unless a recipe sets another.
      routers: those that it fits, if it was made for some. Others refuse it; a layer that only
        `moe.per_layer` gives such a router goes without it.
      needs_token_choice: whether it fits only routers in which tokens choose experts.
      statistic: the field of `RoutingStats` that is collected for it alone, where its weight is
        above 0; "" if the sums that are always collected suffice.
      is_always_logged: whether it is computed where its weight is 0, too.
      estimates_load: whether its statistic estimates the load from the routing noise of training.
        So it needs that noise, a plain top-k below the number of experts, and one that is fixed.
      divides_by_noise: whether it does, so that no schedule may take the noise to 0.
    """

    meaning: str
    default: float = 0.0
    routers: tuple[str, ...] | None = None
    needs_token_choice: bool = False
    statistic: str = ""
    is_always_logged: bool = False
    estimates_load: bool = False
    divides_by_noise: bool = False

    @property
    def fitting_routers(self) -> tuple[str, ...]:
        """The routers that it fits, of all in `ROUTER_RULES`, to which a notebook may add some."""
        return tuple(name for name in ROUTER_RULES if self._fits(name))

    def _fits(self, router: str) -> bool:
        if self.routers is not None:
            return router in self.routers
        return ROUTER_RULES[router].takes_capacity or not self.needs_token_choice


LOSS_SPECS = {
    "balance": LossSpec(
        "the load-balancing loss of GShard and Switch", default=0.01, is_always_logged=True
    ),
    "sequence_balance": LossSpec(
        "DeepSeek-V3's balance loss within each sequence",
        needs_token_choice=True,
        statistic="sequence_balance",
    ),
    "importance": LossSpec(
        "Shazeer's importance loss, on the sums of weights", needs_token_choice=True
    ),
    "vmoe_importance": LossSpec(
        "V-MoE's importance loss, on the sums of all probabilities", needs_token_choice=True
    ),
    "load": LossSpec(
        "Shazeer's load loss, on the expected load",
        routers=("noisy_topk",),
        statistic="load_E",
        estimates_load=True,
        divides_by_noise=True,
    ),
    "vmoe_load": LossSpec(
        "V-MoE's load loss, on its estimate of the load",
        routers=("noisy_topk",),
        statistic="vmoe_load_E",
        estimates_load=True,
    ),
    "z": LossSpec(
        "the z-loss, the squared log-sum-exp of the router's logits",
        default=1e-3,
        is_always_logged=True,
    ),
}
"""The losses; their functions are in `LOSSES` of `moejax/moe/balancing/losses.py`."""

LOSS_WEIGHTS = tuple(f"{name}_weight" for name in LOSS_SPECS)
"""The leaves of `moe` that are their weights, which are also knobs."""


def with_loss_weights(
    annotation: Any, declare: Callable[[str, LossSpec], Any] | None = None
) -> Callable[[Section], Section]:
    """Returns a decorator that gives a class the field `NAME_weight` for each loss.

    They come after the fields of the class itself. The class becomes a dataclass afterwards:

        @dataclasses.dataclass(frozen=True)
        @with_loss_weights(float, _weight)
        class MoeConfig: ...

    Args:
      annotation: the type of the fields.
      declare: from the name of a field and its loss to its default, or a `dataclasses.field`; no
        field has a default without it.
    """

    def add_fields(section: Section) -> Section:
        section.__annotations__ = section.__annotations__ | dict.fromkeys(LOSS_WEIGHTS, annotation)
        if declare is not None:
            for weight, spec in zip(LOSS_WEIGHTS, LOSS_SPECS.values(), strict=True):
                setattr(section, weight, declare(weight, spec))
        return section

    return add_fields
