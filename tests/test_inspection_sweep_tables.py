"""Tables of a sweep: equal fractions, means over seeds, effects and fronts, against numbers worked by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from moejax.inspection import sweep_tables as tables
from sweep_cases import product, row_of

LOSS = tables.LOSS


def frame(points, losses, **more):
    return tables.frame_of([row_of(point, loss, **more) for point, loss in zip(points, losses, strict=True)])


def settings(points, losses):
    return tables.settings_of(frame(points, losses), [LOSS])


def test_axes_keep_their_values_and_all_other_columns_are_numbers():
    found = frame([{"a.b": 4}, {"a.b": "x"}, {"a.c": None}], [1, math.nan, 2.5], packed=2)
    assert found["override/a.b"].tolist() == [4, "x", None]
    assert found[LOSS].dtype == np.float64 and found["packed"].tolist() == [2, 2, 2]
    assert tables.frame_of([{"arm": "a", "x": None}, {"arm": "b", "x": True}])["x"].isna().all()


def test_levels_of_mixed_kinds_are_told_apart_and_ordered():
    assert tables.levels_of(["b", 16, None, 4.0, "a", True, 4, 1, math.nan, "b"]) == [1, 4, 16, "b", "a", True]
    found = frame([{"a.b": 4}, {"a.b": 4.0}, {"a.c": True}, {"a.c": 1}], [1, 1, 1, 1])
    assert tables.axes_of(found) == ["override/a.b", "override/a.c"]  # 4 and not set; True and 1
    assert tables.axes_of(frame([{"a.b": 4}, {"a.b": 4.0}], [1, 1])) == []


def test_at_the_end_only_arms_that_are_done_and_finite_are_compared():
    rows = [
        row_of({"a.b": 1}, 3.0),
        row_of({"a.b": 2}, None),
        row_of({"a.b": 3}, 2.0, status="failed", error="nan at 40", fraction=0.4),
        row_of({"a.b": 4}, 2.0, status="pruned", fraction=0.25),
    ]
    compared, left_out = tables.at_fraction(tables.frame_of(rows))
    assert compared["override/a.b"].tolist() == [1] and compared["at/eval/loss"].tolist() == [3]
    assert left_out["reason"].tolist() == [
        "its last evaluation is not finite or absent",
        "failed at 40% of its schedule: nan at 40",
        "pruned at 25% of its schedule",
    ]


def test_below_the_end_arms_are_compared_at_that_fraction_alone():
    def at(*evaluations, **more):
        return row_of({"a.b": len(evaluations)}, 2.0, evaluations=json.dumps(evaluations), **more)

    rows = [
        at([0.5, 50, 3.0], [1, 100, 2.0]),
        at([0.25, 5, 4.0], [0.5, 10, 3.5], [0.75, 15, 1.0], steps_planned=21, status="pruned"),  # half is step 10.5
        at([0.49, 49, 1.0]),  # a step beside it
        at([0.5, 50, None], [0.6, 60, 1.0], [0.7, 70, 1.0], [0.8, 80, 1.0]),
    ]
    compared, left_out = tables.at_fraction(tables.frame_of(rows), 0.5)
    assert compared["at/eval/loss"].tolist() == [3, 3.5] and compared["at/step"].tolist() == [50, 10]
    assert LOSS not in compared  # of the end, so of different fractions
    assert left_out["reason"].tolist() == [
        "no evaluation at 0.5 of its schedule (step 50)",
        "its evaluation there is not finite",
    ]
    with pytest.raises(ValueError, match="fraction=0 must be above 0 and at most 1"):
        tables.at_fraction(compared, 0)


def test_means_over_seeds_have_a_standard_error_from_the_sample_deviation():
    points = [*product(a_b=[1, 2], train_seed=[0, 1, 2]), {"a.b": 3, "train.seed": 0}]
    found = tables.over_seeds(frame(points, [1, 2, 3, 5, 5, None, 4]), LOSS)
    assert found["override/a.b"].tolist() == [1, 2, 3]
    assert found["mean"].tolist() == [2, 5, 4] and found["n"].tolist() == [3, 2, 1]
    # The sample deviation of 1, 2, 3 is 1; over the root of 3.
    assert found["se"].tolist()[:2] == pytest.approx([1 / math.sqrt(3), 0]) and math.isnan(found["se"][2])
    assert [len(arms) for arms in found["arms"]] == [3, 3, 1]


def test_a_sweep_over_seeds_alone_is_one_setting():
    found = tables.over_seeds(frame([{"train.seed": s} for s in (0, 1)], [1, 3]), LOSS)
    assert found["mean"].tolist() == [2] and found["se"].tolist() == pytest.approx([1.0])
    assert tables.over_seeds(frame([], []), LOSS).empty


def test_a_main_effect_weighs_cells_equally_however_many_seeds_they_have():
    points = [*product(a_b=[1, 2], c_d=["x", "y"], train_seed=[0]), {"a.b": 1, "c.d": "x", "train.seed": 1}]
    found = tables.main_effect(settings(points, [2, 6, 3, 9, 4]), LOSS, "override/a.b")
    # Level 1: the cells are (2 + 4) / 2 = 3 and 6; level 2: 3 and 9.
    assert found.table["level"].tolist() == [1, 2] and found.table["mean"].tolist() == [4.5, 6]
    # The deviation of 3 and 6 is 3 / sqrt(2), and over the root of 2 cells 1.5.
    assert found.table["se"].tolist() == pytest.approx([1.5, 3]) and found.table["cells"].tolist() == [2, 2]
    assert found.is_balanced and found.num_unset == 0


def test_the_only_cell_of_a_level_has_the_standard_error_over_its_seeds():
    points = [*product(moe_top_k=[1, 2], train_seed=[0, 1, 2]), {"moe.top_k": 4, "train.seed": 0}]
    found = tables.main_effect(settings(points, [2.7, 3, 3.3, 2.6, 2.9, 3.2, 4]), LOSS, "override/moe.top_k").table
    assert found["mean"].tolist() == pytest.approx([3, 2.9, 4]) and found["cells"].tolist() == [1, 1, 1]
    assert found["se"].tolist()[:2] == pytest.approx([0.3 / math.sqrt(3)] * 2) and math.isnan(found["se"][2])


def test_an_unbalanced_design_is_said_to_be_one():
    points = [*product(a_b=[1, 2], c_d=["x", "y"])[:3], {"a.b": None, "moe.num_experts": 0}]
    found = tables.main_effect(settings(points, [2, 6, 3, 9]), LOSS, "override/a.b")
    assert found.table["mean"].tolist() == [4, 3] and found.table["cells"].tolist() == [2, 1]
    assert not found.is_balanced and found.num_unset == 1


def test_an_interaction_is_the_departure_of_cells_from_two_effects():
    found = settings(product(a_b=[1, 2], c_d=["x", "y"], e_f=[0, 1]), [0, 2, 2, 4, 3, 5, 9, 11])
    means = tables.interaction(found, LOSS, "override/a.b", "override/c.d")
    assert means.loc[1, "x"] == 1 and means.to_numpy().tolist() == [[1, 3], [4, 10]]
    # Rows mean 2 and 7, columns 2.5 and 6.5, all 4.5: a sum of effects gives 0, 4, 5 and 9.
    assert tables.strength(means) == pytest.approx(1.0)
    holed = tables.interaction(found.iloc[:6], LOSS, "override/a.b", "override/c.d")
    assert math.isnan(holed.loc[2, "y"])


def test_an_interaction_is_judged_from_whole_rows_or_columns_or_not_at_all():
    whole = pd.DataFrame([[1, 3], [4, 10]])
    assert tables.strength(whole.assign(hole=[5, math.nan])) == pytest.approx(1.0)
    assert tables.strength(whole.T.assign(hole=[5, math.nan]).T) == pytest.approx(1.0)
    every_row = pd.DataFrame(1.0 - np.eye(3)).replace(0, math.nan)
    for unknown in (every_row, whole.iloc[:1], whole.iloc[:, :1], holed_square(), whole.iloc[:0]):
        assert math.isnan(tables.strength(unknown))


def holed_square():
    return pd.DataFrame([[1, 3], [4, math.nan]])


def test_means_of_a_pair_are_balanced_where_they_are_over_the_same_cells_of_the_other_axes():
    points = product(a_b=[1, 2], c_d=["x", "y"], e_f=[0, 1])
    additive = [point["a.b"] + (point["c.d"] == "y") + point["e.f"] / 2 for point in points]
    pair = ["override/a.b", "override/c.d"]
    found = settings(points, additive)
    assert tables.is_balanced(found, LOSS, pair)
    assert tables.strength(tables.interaction(found, LOSS, *pair)) == pytest.approx(0)
    # Without the last arm the mean at 2 and y is lower by 0.25, of which a quarter is in no sum of effects.
    found = settings(points, [*additive[:-1], None])
    assert not tables.is_balanced(found, LOSS, pair)
    assert tables.strength(tables.interaction(found, LOSS, *pair)) == pytest.approx(0.25 / 4)
    assert tables.is_balanced(found.iloc[:6], LOSS, pair)  # a combination that no setting has is not looked at


def test_no_setting_beats_those_on_the_front():
    values = {"x": [1, 2, 3, 3, 2, 9, math.nan], "y": [9, 4, 4, 1, 4, 1, 0], "z": [0.0] * 7}
    found = pd.DataFrame(values)
    # (3, 4) loses to (2, 4), of which there are two, and (9, 1) to (3, 1).
    assert tables.pareto_front(found, ["x", "y"]).tolist() == [True, True, False, True, True, False, False]
    assert tables.pareto_front(found, ["x", "y", "z"]).tolist() == [True, True, False, True, True, False, False]
    assert tables.pareto_front(found, ["x"]).tolist() == [True] + [False] * 6
