"""Which array of a source becomes which array of a fork, and what is refused."""

import pytest

from moejax.config import ConfigError, InitConfig
from moejax.training.forking.fit import Array, fit_arrays

EXPERTS = ("layers", "experts", "embed", "mlp")


def model(num_experts=4, width=8, stack=0, **more):
    """Returns the arrays of a small model."""
    block = f"params/stacks/{stack}/block"
    arrays = {
        "params/embedding": Array((32, width), ("vocab", "embed")),
        f"{block}/ffn/router/kernel": Array((2, width, num_experts), ("layers", "embed", "router")),
        f"{block}/ffn/experts/down": Array((2, num_experts, 6, width), EXPERTS),
        f"router_state/stacks/{stack}/block/ffn/idle_steps": Array(
            (2, num_experts), ("layers", "router")
        ),
        f"router_state/stacks/{stack}/block/ffn/selection_bias": Array(
            (2, num_experts), ("layers", "router")
        ),
    }
    return arrays | more


def fit(source, here, **init):
    return fit_arrays(source, here, InitConfig(source="runs/a", **init))


def test_equal_models_take_all_but_what_belongs_to_the_run():
    found = fit(model(), model())
    assert found.taken == {path: path for path in model() if "idle_steps" not in path}
    assert found.initialised == ("router_state/stacks/0/block/ffn/idle_steps",)


def test_what_is_excluded_or_not_included_is_initialised():
    found = fit(model(), model(), exclude="router, *selection_bias")
    assert set(found.taken) == {"params/embedding", "params/stacks/0/block/ffn/experts/down"}
    found = fit(model(), model(), include="experts")
    assert set(found.taken) == {"params/stacks/0/block/ffn/experts/down"}


def test_renamed_arrays_are_found():
    found = fit(model(stack=0), model(stack=1), rename="stacks/0/=stacks/1/")
    for here, source in found.taken.items():
        assert source == here.replace("stacks/1/", "stacks/0/")
    assert len(found.taken) == 4


def test_more_experts_are_copies_or_initialised():
    copied = fit(model(4), model(8), resize="copy")
    assert set(copied.taken) == set(fit(model(), model()).taken)
    fresh = fit(model(4), model(8), resize="fresh")
    assert set(fresh.taken) == {"params/embedding"}


@pytest.mark.parametrize(
    ("source", "here", "init", "message"),
    [
        (model(4), model(8), {}, "router/kernel is 2x8x4 in init.source=runs/a and 2x8x8 in this"),
        (model(4), model(8), {}, "init.resize=copy takes more experts as copies"),
        (
            model(),
            model(width=16),
            {"resize": "copy"},
            "copies make more experts alone",
        ),
        (
            model(stack=0) | model(stack=1),
            model(stack=1),
            {"rename": "stacks/0/=stacks/1/"},
            "of the source one place; give the other another",
        ),
        (model(8), model(4), {"resize": "copy"}, "copies make more experts alone"),
        (
            model(),
            model(**{"params/new": Array((2,), ("norm",))}),
            {},
            "init.source=runs/a has no new; initialise what it lacks by init.exclude",
        ),
        (
            model(**{"params/old": Array((2,), ("norm",))}),
            model(),
            {},
            "this model has no place for old of init.source=runs/a",
        ),
        (model(stack=0), model(stack=1), {}, "has no stacks/1/block/ffn/router/kernel, "),
        (model(), model(), {"exclude": "shared"}, "init.exclude: neither .* has a parameter"),
        (model(), model(), {"include": "*/x"}, "init.include: neither .* has a parameter"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(source, here, init, message):
    with pytest.raises(ConfigError, match=message):
        fit(source, here, **init)
