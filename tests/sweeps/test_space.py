"""Spaces: which points they hold, in which order, and which spaces and axes are refused."""

import itertools

import pytest

from moejax.config import ConfigError
from moejax.sweeps import (
    Range,
    Space,
    SpaceError,
    chain,
    choice,
    log_uniform,
    parse_axis,
    product,
    seeds,
    uniform,
    where,
    zip_,
)

E, K = "moe.num_experts", "moe.top_k"


def values(space):
    return [tuple(point.values()) for point in space]


def test_a_product_has_every_combination_the_rightmost_changing_fastest():
    space = product(choice(E, 4, 8), choice(K, 1, 2, 3))
    assert list(space) == [{E: e, K: k} for e in (4, 8) for k in (1, 2, 3)]
    assert list(space) == list(space)
    assert [axis.key for axis in space.axes] == [E, K]


def test_a_key_in_two_spaces_of_a_product_is_an_error():
    with pytest.raises(SpaceError, match=r"moe.top_k is in several"):
        product(choice(K, 1), choice(E, 4), choice(K, 2))
    with pytest.raises(SpaceError, match=r"moe.top_k is in several"):
        list(product(choice(K, 1), [{K: 2}]))
    with pytest.raises(SpaceError, match=r"zip_: moe.top_k is in several"):
        list(zip_(choice(K, 1), choice(K, 2)))


def test_zipped_spaces_are_joined_in_order_and_must_be_equally_long():
    assert values(zip_(choice(E, 4, 8), choice(K, 1, 2))) == [(4, 1), (8, 2)]
    with pytest.raises(SpaceError, match="2, 3 points; give each the same number"):
        list(zip_(choice(E, 4, 8), choice(K, 1, 2, 3)))


def test_a_chain_has_the_points_of_its_spaces_one_after_the_other():
    space = chain(choice(E, 4), product(choice(K, 1), seeds(2)))
    assert list(space) == [{E: 4}, {K: 1, "train.seed": 0}, {K: 1, "train.seed": 1}]
    assert space.axes is None


def test_where_excludes_points_when_iterated_and_tells_a_search():
    seen = []

    def fits(point):
        seen.append(point)
        return point[K] <= point[E] // 4

    space = where(product(choice(E, 4, 8), choice(K, 1, 2)), fits)
    assert not seen
    assert next(iter(space)) == {E: 4, K: 1} and len(seen) == 1
    assert values(space) == [(4, 1), (8, 1), (8, 2)]
    outer = product(space, seeds(2))
    assert [axis.key for axis in outer.axes] == [E, K, "train.seed"]
    assert outer.allows({E: 8, K: 2, "train.seed": 0})
    assert not outer.allows({E: 4, K: 2, "train.seed": 0})
    assert len(list(outer)) == 6
    assert product(choice(E, 4), [{K: 1}]).axes is None


def test_a_predicate_that_raises_is_named_with_its_file():
    space = where(choice(E, 4, 8), lambda point: point[K] > 1)
    for use in (lambda: list(space), lambda: space.allows({E: 4})):
        message = r"test_space.py, line \d+, raised KeyError: 'moe.top_k', for the"
        with pytest.raises(SpaceError, match=message):
            use()


def test_the_size_of_a_space_is_known_where_axes_or_lists_give_it():
    axes = [choice(key, *range(10)) for key in (E, K)]
    assert product(*axes).size == 100 and product().size == 1
    assert product(axes[0], [{K: 1}, {K: 2}]).size == 20
    assert product(axes[0], where(axes[1], bool)).size is None
    with pytest.raises(TypeError, match="abstract"):
        Space()


def test_a_generator_inside_a_space_can_be_iterated_again():
    space = product(({K: k} for k in (1, 2)), seeds(2))
    assert list(space) == list(space) and len(list(space)) == 4


@pytest.mark.parametrize("bad", [{K: 1}, [], [1], 7, "moe.top_k"], ids=str)
def test_a_value_that_is_no_list_of_points_is_refused(bad):
    with pytest.raises(SpaceError, match="is no space"):
        product(bad)


def test_grids_include_both_ends_and_have_readable_values():
    grid = log_uniform("moe.balance_weight", 1e-4, 1e-1, 4)
    assert values(grid) == [(1e-4,), (1e-3,), (1e-2,), (1e-1,)]
    assert values(log_uniform("moe.balance_weight", 1, 2, 3)) == [(1.0,), (1.41421,), (2.0,)]
    assert values(uniform("moe.z_weight", 0, 1e-2, 3)) == [(0.0,), (5e-3,), (1e-2,)]
    assert all(type(value) is float for (value,) in values(uniform("moe.z_weight", 0, 3, 4)))


def test_a_range_is_for_a_search_and_cannot_be_iterated():
    axis = log_uniform("moe.balance_weight", 1e-4, 1e-1)
    assert axis == Range("moe.balance_weight", 1e-4, 1e-1, is_log=True) and axis.axes == (axis,)
    with pytest.raises(SpaceError, match=r"num=5.*log:0.0001..0.1:5.*--search=random"):
        list(product(seeds(2), axis))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choice("moe.num_expert", 4), "nearest is moe.num_experts"),
        (lambda: choice(E), "no values"),
        (lambda: seeds(0), "1 or more"),
        (lambda: log_uniform("moe.z_weight", 0, 1), "the lower above 0"),
        (lambda: uniform("moe.z_weight", 1, 0), "no range"),
        (lambda: uniform("moe.z_weight", 0, float("inf")), "finite"),
        (lambda: uniform("moe.z_weight", 0, 1, 1), "at least 2"),
        (lambda: log_uniform(E, 4, 64, 5), "moe.num_experts is a whole number, and ranges are for"),
        (lambda: uniform("moe.dispatch", 0, 1), "is text, and ranges"),
    ],
)
def test_axes_that_cannot_work_are_refused(make, message):
    with pytest.raises((SpaceError, ConfigError), match=message):
        make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("moe.num_experts=4,8, 16", (4, 8, 16)),
        ("moe.balance_weight=0,1e-2", (0.0, 0.01)),
        ("moe.router_bias=true,False", (True, False)),
        ("moe.dispatch=dropless,capacity", ("dropless", "capacity")),
        ("moe.router=hash,switch", ("hash", "switch")),
        ("moe.per_layer=", ("",)),
        ('moe.per_layer=,"0,1: router=hash"', ("", "0,1: router=hash")),
        ("schedule.jitter=linear:0,constant", ("linear:0", "constant")),
        ("moe.balance_weight=log:1e-4..1e-1:4", (1e-4, 1e-3, 1e-2, 1e-1)),
        ("moe.z_weight=lin:0..1e-2:3", (0.0, 5e-3, 1e-2)),
    ],
)
def test_an_axis_on_the_command_line_has_values_of_its_leafs_type(text, expected):
    axis = parse_axis(text)
    assert axis.values == expected and [*map(type, axis.values)] == [*map(type, expected)]
    assert axis.key == text.partition("=")[0]


def test_an_axis_without_a_number_of_values_is_a_range():
    assert parse_axis("moe.z_weight=lin:0..0.5") == Range("moe.z_weight", 0.0, 0.5, is_log=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe.num_experts", "KEY=VALUES"),
        ("moe.num_expert=4", "nearest is moe.num_experts"),
        ("moe.num_experts=4,,8", "'' must be a whole number"),
        ("moe.num_experts=4.5", "'4.5' must be a whole number"),
        ("moe.z_weight=nan", "must be a finite number"),
        ("moe.router_bias=yes", "must be True or False"),
        ("moe.dispatch=dropped", "must be one of dropless, capacity"),
        ('moe.per_layer="0: dense', "quote values"),
        ("moe.z_weight=lin:0..", "must have the form"),
        ("moe.z_weight=log:1e-4..1:x", "must have the form"),
        ("moe.z_weight=log:0..1:3", "the lower above 0"),
        ("moe.num_experts=log:4..64:5", "list values"),
    ],
)
def test_an_axis_that_cannot_be_read_is_refused_with_a_remedy(text, message):
    with pytest.raises((SpaceError, ConfigError), match=message) as error:
        parse_axis(text)
    assert text.partition("=")[0] in str(error.value)


def test_the_size_of_a_product_is_that_of_its_parts():
    assert len(list(product(*(choice(key, 1, 2) for key in (E, K, "train.seed"))))) == 8
    assert list(product()) == [{}]
    assert list(itertools.islice(product(seeds(3)), 1)) == [{"train.seed": 0}]
