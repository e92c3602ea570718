"""The table of auxiliary losses: what follows from it, and what must be there beside it."""

import dataclasses

import pytest

from cases.config import with_loss
from cases.training import ROUTER_CASES, SMALL
from moejax.config import (
    LOSS_SPECS,
    ROUTER_RULES,
    ConfigError,
    Knobs,
    MoeConfig,
    ScheduleConfig,
    declared,
    resolve,
)
from moejax.config.router_rules import RouterRules
from moejax.moe.balancing.losses import LOSSES
from moejax.moe.balancing.stats import STATISTICS, RoutingStats


def test_every_loss_has_its_function_and_every_statistic_is_collected():
    assert LOSSES.keys() == LOSS_SPECS.keys()
    assert STATISTICS.keys() == {spec.statistic for spec in LOSS_SPECS.values()} - {""}
    absent = {field.name for field in dataclasses.fields(RoutingStats) if field.default is None}
    assert STATISTICS.keys() <= absent


@pytest.mark.parametrize("section", [MoeConfig, Knobs, ScheduleConfig])
def test_every_loss_has_its_leaf_its_knob_and_its_schedule(section):
    names = [field.name for field in dataclasses.fields(section)]
    weights = [name for name in names if name.endswith("_weight") and name != "logit_z_weight"]
    assert weights == [f"{name}_weight" for name in LOSS_SPECS]


@pytest.mark.parametrize("name", LOSS_SPECS)
def test_a_loss_is_accepted_with_a_router_that_it_fits_and_refused_with_any_other(name):
    spec = LOSS_SPECS[name]
    weight = f"{name}_weight"
    accepted = resolve({"moe": with_loss(name)}, typed=[f"moe.{weight}"])
    assert accepted.moe.weighted_losses[name] is spec
    for router in ROUTER_RULES.keys() - {*spec.fitting_routers}:
        moe = SMALL["moe"] | ROUTER_CASES[router] | {"router": router, weight: 0.1}
        with pytest.raises(ConfigError) as caught:
            resolve({"moe": moe})
        message = str(caught.value)
        assert message.startswith(f"moe.{weight}=0.1 does not go with moe.router={router}; set 0")
        assert message.endswith(", ".join(spec.fitting_routers))


def test_losses_go_with_a_router_that_is_added_later_as_in_a_notebook(monkeypatch):
    monkeypatch.setitem(ROUTER_RULES, "added", RouterRules(("softmax",)))
    moe = resolve({"moe": SMALL["moe"] | {"router": "added", "importance_weight": 0.1}}).moe
    assert moe.weighted_losses.keys() == {"balance", "importance", "z"}
    with pytest.raises(ConfigError, match=r"moe\.load_weight=0\.1 does not go with .*=added"):
        resolve({"moe": SMALL["moe"] | {"router": "added", "load_weight": 0.1}})


@pytest.mark.parametrize("name", LOSS_SPECS)
def test_what_is_said_of_a_loss_holds_together(name):
    spec = LOSS_SPECS[name]
    fits_all = len(spec.fitting_routers) == len(ROUTER_RULES)
    # Where experts choose, only the sums that are always there are collected.
    assert not spec.statistic or all(
        ROUTER_RULES[each].takes_capacity for each in spec.fitting_routers
    )
    assert fits_all or not (spec.default or spec.is_always_logged)
    assert spec.estimates_load or not spec.divides_by_noise
    assert declared()[f"moe.{name}_weight"].leaf.at_least == 0
