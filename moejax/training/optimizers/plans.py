"""How each parameter is trained beside the rule of its optimizer: rate, decay, clipping."""

import dataclasses

from flax import nnx

from moejax.config import (
    ConfigError,
    OptimizerConfig,
    ParameterGroup,
    Transfer,
    kind_of,
    read_groups,
)
from moejax.training.optimizers.matrices import is_matrix, map_params, own_axes

MUON = ("muon", "muonh")

NO_TRANSFER = Transfer()

NOT_BY_MUON = ("embedding", "norm", "router")
"""Kinds of parameters that Adam trains beside Muon."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one parameter is trained.

    Attributes:
      group: of `optimizer.groups`, the first that it fits; None if it fits none.
      rate: factor of the learning rate.
      weight_decay: 0 where weights do not decay.
      keeps_norm: whether weights turn, and keep their norm.
    """

    group: ParameterGroup | None
    rate: float
    weight_decay: float
    keeps_norm: bool


def plans_of(
    config: OptimizerConfig, params: nnx.State, transfer: Transfer = NO_TRANSFER
) -> dict[str, Plan]:
    """Returns how each parameter is trained, by its path.

    Args:
      config: the optimizer's leaves.
      params: parameters with their logical axes.
      transfer: factors of a model over the one whose learning rate it has.

    Raises:
      ConfigError: a group that no parameter is in.
    """
    groups = read_groups(config.groups)
    plans: dict[str, Plan] = {}

    def add(path: str, param: nnx.Variable) -> nnx.Variable:
        group = next((group for group in groups if group.has(path)), None)
        plans[path] = _plan(config, group, path, param, transfer)
        return param

    map_params(add, params)
    used = [plan.group for plan in plans.values()]
    for group in groups:
        if group not in used:
            raise ConfigError(
                f"optimizer.groups: no parameter that is trained is in {group.name} and in no "
                f"group before it; leave it out, or name one of {', '.join(sorted(plans))}"
            )
    return plans


def _plan(
    config: OptimizerConfig,
    group: ParameterGroup | None,
    path: str,
    param: nnx.Variable,
    transfer: Transfer,
) -> Plan:
    rate, decay = 1.0, config.weight_decay
    if group is not None:
        rate = group.rate
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
    by_muon = config.name in MUON and is_by_muon(path, param)
    if config.name in MUON and not by_muon:
        rate *= config.adam_rate
    keeps_norm = config.name == "muonh" and by_muon
    decays = is_matrix(param.axes) and not keeps_norm
    rule = "adamw" if config.name in MUON and not by_muon else config.name
    divisor = transfer.divisor(path, own_axes(param.axes), rule)
    return Plan(group, rate / divisor, decay * divisor if decays else 0.0, keeps_norm)


def is_by_muon(path: str, param: nnx.Variable) -> bool:
    """Whether Muon trains a parameter, where there is Muon."""
    return is_matrix(param.axes) and kind_of(path) not in NOT_BY_MUON
