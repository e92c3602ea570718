"""Tables of a sweep: equal fractions, means over seeds and fronts.

All are compared with numbers worked out by hand.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest

from cases.sweeps import product, row_of
from moejax.sweeps import tables

LOSS = tables.LOSS


def frame(points, losses, **more):
    return tables.frame_of(
        [row_of(point, loss, **more) for point, loss in zip(points, losses, strict=True)]
    )


def settings(points, losses):
    return tables.settings_of(frame(points, losses), [LOSS])


def test_axes_keep_their_values_and_all_other_columns_are_numbers():
    found = frame([{"a.b": 4}, {"a.b": "x"}, {"a.c": None}], [1, math.nan, 2.5], packed=2)
    assert found["override/a.b"].tolist() == [4, "x", None]
    assert found[LOSS].dtype == np.float64 and found["packed"].tolist() == [2, 2, 2]
    assert tables.frame_of([{"arm": "a", "x": None}, {"arm": "b", "x": True}])["x"].isna().all()


def test_levels_of_mixed_kinds_are_told_apart_and_ordered():
    mixed = ["b", 16, None, 4.0, "a", True, 4, 1, math.nan, "b"]
    assert tables.levels_of(mixed) == [1, 4, 16, "b", "a", True]
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


def test_below_the_end_arms_are_compared_at_that_fraction_only():
    def at(*evaluations, **more):
        return row_of({"a.b": len(evaluations)}, 2.0, evaluations=json.dumps(evaluations), **more)

    rows = [
        at([0.5, 50, 3.0, 1.5], [1, 100, 2.0, 1.0]),
        # Half of 21 steps is step 10.5.
        at([0.25, 5, 4.0], [0.5, 10, 3.5], [0.75, 15, 1.0], steps_planned=21, status="pruned"),
        at([0.49, 49, 1.0]),  # a step too early
        at([0.5, 50, None], [0.6, 60, 1.0], [0.7, 70, 1.0], [0.8, 80, 1.0]),
    ]
    compared, left_out = tables.at_fraction(tables.frame_of(rows), 0.5)
    assert compared["at/eval/loss"].tolist() == [3, 3.5]
    assert compared["at/step"].tolist() == [50, 10]
    # Older records have no bits.
    np.testing.assert_array_equal(compared["at/eval/bits_per_byte"], [1.5, np.nan])
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
    assert found["se"].tolist()[:2] == pytest.approx([1 / math.sqrt(3), 0])
    assert math.isnan(found["se"][2])
    assert [len(arms) for arms in found["arms"]] == [3, 3, 1]


def test_a_sweep_over_seeds_alone_is_one_setting():
    found = tables.over_seeds(frame([{"train.seed": s} for s in (0, 1)], [1, 3]), LOSS)
    assert found["mean"].tolist() == [2] and found["se"].tolist() == pytest.approx([1.0])
    assert tables.over_seeds(frame([], []), LOSS).empty


def test_no_setting_beats_those_on_the_front():
    values = {"x": [1, 2, 3, 3, 2, 9, math.nan], "y": [9, 4, 4, 1, 4, 1, 0], "z": [0.0] * 7}
    found = pd.DataFrame(values)
    # (3, 4) loses to (2, 4), of which there are two, and (9, 1) to (3, 1).
    expected = [True, True, False, True, True, False, False]
    assert tables.pareto_front(found, ["x", "y"]).tolist() == expected
    assert tables.pareto_front(found, ["x", "y", "z"]).tolist() == expected
    assert tables.pareto_front(found, ["x"]).tolist() == [True] + [False] * 6


def test_arms_whose_tokens_differ_are_compared_by_bits_per_byte():
    for key, value in (
        ("data.vocab_size", 512),
        ("data.tokenizer", "bytes"),
        ("data.files", "a"),
        ("data.text_field", "b"),
    ):
        assert tables.loss_of(frame([{key: value}, {"moe.top_k": 2}], [1, 2])) == tables.BITS
    same = frame(
        [{"data.seq_len": 8, "data.directory": "a"}, {"data.seq_len": 16, "data.directory": "b"}],
        [1, 2],
    )
    assert tables.loss_of(same) == LOSS
    assert tables.loss_of(frame([{"data.vocab_size": 512}] * 2, [1, 2])) == LOSS
