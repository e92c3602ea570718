"""Effects of a sweep's axes: paired by seed, with intervals that cover noise however shared."""

import math

import numpy as np
import pytest

from cases.sweeps import product, row_of
from moejax.inspection.analysis.differences import mean_difference, student_quantile, whole_block
from moejax.sweeps.report import effects as sweep_effects
from moejax.sweeps.tables import LOSS, axes_of, frame_of

SIMULATED = 2000
THREE_ERRORS = 3 * math.sqrt(0.05 * 0.95 / SIMULATED)


def arms_of(points, losses):
    return frame_of([row_of(point, loss) for point, loss in zip(points, losses, strict=True)])


def effect_of(points, losses, axis):
    return sweep_effects.axis_effect(arms_of(points, losses), LOSS, f"override/{axis}")


def noise(draw, num_levels, num_cells, num_seeds):
    """Draws what seeds do under the null, and cells that differ.

    A seed acts on all arms, on all cells of a level, and on a single arm.
    """
    of_seed = draw.normal(0, 0.05, (1, 1, num_seeds))
    of_level = draw.normal(0, 0.03, (num_levels, 1, num_seeds))
    of_arm = draw.normal(0, 0.002, (num_levels, num_cells, num_seeds))
    return draw.normal(0, 0.003, (1, num_cells, 1)) + of_seed + of_level + of_arm


@pytest.mark.parametrize(("num_cells", "num_seeds"), [(1, 2), (8, 3), (30, 5)])
def test_noise_that_all_cells_share_is_inside_the_interval_in_95_percent(num_cells, num_seeds):
    draw = np.random.default_rng(num_seeds)
    is_inside, is_inside_over_cells = [], []
    for _ in range(SIMULATED):
        values_LCS = noise(draw, 2, num_cells, num_seeds)
        found = mean_difference(values_LCS[1] - values_LCS[0])
        is_inside.append(not found.is_told_apart)
        of_cells_LC = values_LCS.mean(axis=2)
        variance_L = np.var(of_cells_LC, axis=1, ddof=min(1, num_cells - 1))
        over_cells = math.sqrt(variance_L.sum() / num_cells)
        is_inside_over_cells.append(abs(found.mean) <= 1.96 * over_cells)
    assert abs(np.mean(is_inside) - 0.95) < THREE_ERRORS
    # Means with errors over their cells would show an effect.
    assert np.mean(is_inside_over_cells) < 0.2


def test_the_effects_of_simulated_sweeps_cover_zero_with_arms_missing_too():
    draw = np.random.default_rng(0)
    points = product(moe_top_k=[1, 2, 4], moe_router=["a", "b", "c"], train_seed=[0, 1, 2, 3])
    num_told_apart, looked = 0, 0
    for _ in range(80):
        losses = noise(draw, 3, 3, 4).ravel().tolist()
        kept = [i for i in range(len(points)) if draw.uniform() > 0.03]
        kept_points = [points[i] for i in kept]
        kept_losses = [losses[i] for i in kept]
        found = effect_of(kept_points, kept_losses, "moe.top_k")
        num_told_apart += sum(level.difference.is_told_apart for level in found.others)
        looked += sum(level.difference.num_seeds > 1 for level in found.others)
    assert looked > 150
    assert abs(num_told_apart / looked - 0.05) < 0.05


def test_noise_is_called_an_interaction_in_5_percent_of_tables():
    draw = np.random.default_rng(1)
    points = product(
        moe_top_k=[1, 2, 4], moe_router=["a", "b", "c"], model_d_ff=[8, 16], train_seed=[0, 1, 2]
    )
    num_told_apart = 0
    for _ in range(60):
        shared_KRFS = draw.normal(0, 0.03, (3, 3, 1, 3)) + draw.normal(0, 0.05, (1, 1, 1, 3))
        losses = (shared_KRFS + draw.normal(0, 0.002, (3, 3, 2, 3))).ravel().tolist()
        found = sweep_effects.interaction(
            arms_of(points, losses), LOSS, "override/moe.top_k", "override/moe.router"
        )
        num_told_apart += found.departure.is_told_apart
    assert num_told_apart / 60 < 0.12


def test_an_effect_is_the_mean_of_pairs_of_one_seed_with_students_interval():
    points = product(a_b=[1, 2], c_d=["x", "y"], train_seed=[0, 1, 2])
    # Differences of x are 1, 2, 3 and of y 3, 4, 8: over seeds 2, 3 and 5.5.
    losses = [0, 5, 10, 100, 105, 110, 1, 7, 13, 103, 109, 118]
    found = effect_of(points, losses, "a.b")
    assert found.reference == 1
    assert [level.level for level in found.levels] == [1, 2]
    (two,) = found.others
    error = np.std([2, 3, 5.5], ddof=1) / math.sqrt(3)
    assert two.mean == np.mean(losses[6:])
    assert two.difference.mean == pytest.approx(3.5)
    assert two.difference.se == pytest.approx(error)
    # Student's quantile of 97.5 % with two degrees of freedom, as tables have it.
    assert [two.difference.low, two.difference.high] == pytest.approx(
        [3.5 - 4.3027 * error, 3.5 + 4.3027 * error], 1e-4
    )
    assert (two.difference.num_pairs, two.difference.num_seeds, two.difference.num_left_out) == (
        6,
        3,
        0,
    )
    assert student_quantile(2) == pytest.approx(12.706, 1e-4)


def test_one_seed_gives_a_difference_without_an_interval():
    (two,) = effect_of(
        product(a_b=[1, 2], c_d=["x", "y"], train_seed=[3]), [1, 2, 5, 6], "a.b"
    ).others
    assert two.difference.mean == 4
    assert math.isnan(two.difference.se)
    assert math.isnan(two.difference.low)
    assert two.difference.num_seeds == 1
    assert not two.difference.is_told_apart


def test_the_reference_is_the_level_that_the_sweep_names_first():
    found = effect_of(product(a_b=[4, 1, 2], train_seed=[0, 1]), [1, 1, 2, 2, 3, 3], "a.b")
    assert found.reference == 4
    assert {level.level: level.difference.mean for level in found.others} == {1: 1, 2: 2}


def test_arms_of_other_cells_or_seeds_are_no_pairs():
    points = [
        {"a.b": 1, "c.d": "x", "train.seed": 0},
        {"a.b": 2, "c.d": "y", "train.seed": 0},
        {"a.b": 1, "c.d": "y", "train.seed": 1},
        {"moe.num_experts": 0, "train.seed": 0},
    ]
    found = effect_of(points, [1, 2, 3, 4], "a.b")
    assert found.others[0].difference.num_pairs == 0
    assert math.isnan(found.others[0].difference.mean)
    assert found.num_unset == 1


def test_a_cell_that_lacks_a_seed_is_left_out_rather_than_taken_for_noise():
    points = product(a_b=[1, 2], c_d=["x", "y", "z"], train_seed=[0, 1, 2])
    losses = [0.0] * 9 + [1, 1, 1, 5, 5, 5, 90, 90, math.nan]
    (two,) = effect_of(points, losses, "a.b").others
    assert (two.difference.mean, two.difference.se, two.difference.num_pairs) == (3, 0, 6)
    assert two.difference.num_left_out == 2
    known = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool)
    assert [part.tolist() for part in whole_block(known)] == [[0, 1], [0, 1]]
    assert [part.tolist() for part in whole_block(np.ones((5, 1), bool))] == [[0, 1, 2, 3, 4], [0]]
    assert mean_difference(np.full((2, 2), np.nan)).num_pairs == 0
    assert mean_difference(np.zeros((0, 0))).num_pairs == 0


def test_axes_that_follow_from_another_are_compared_with_it():
    routers = [("softmax", "exp"), ("noisy", "exp"), ("sigmoid", "logistic")]
    points = [
        {
            "moe.router": router,
            "moe.score": score,
            "moe.top_k": k,
            "moe.renormalize": k > 1,
            "train.seed": seed,
        }
        for router, score in routers
        for k in (1, 4)
        for seed in (0, 1)
    ]
    losses = [0, 1, 0, 1, 2, 3, 2, 3, 5, 6, 5, 6]
    arms = arms_of(points, losses)
    router = effect_of(points, losses, "moe.router")
    assert router.changes_with == ("override/moe.score",)
    assert {level.level: level.difference.mean for level in router.others} == {
        "noisy": 2,
        "sigmoid": 5,
    }
    assert (
        effect_of(points, losses, "moe.score").others[0].difference.num_pairs == 0
    )  # the router differs, too
    assert sweep_effects.distinct_axes(arms) == [
        "override/moe.router",
        "override/moe.score",
        "override/moe.top_k",
    ]
    assert len(axes_of(arms)) == 4


def test_nothing_follows_from_a_number_in_a_random_draw():
    draw = np.random.default_rng(0)
    points = [
        {"a.b": float(draw.uniform()), "c.d": str(draw.choice(["x", "y"]))} for _ in range(20)
    ]
    arms = arms_of(points, [1.0] * 20)
    assert sweep_effects.changes_with(arms, "override/a.b") == []
    assert not any(
        level.difference.num_pairs for level in effect_of(points, [1.0] * 20, "c.d").others
    )


def test_an_interaction_is_the_departure_of_cells_from_two_effects():
    points = product(a_b=[1, 2], c_d=["x", "y"], e_f=[0, 1], train_seed=[0, 1])
    losses = [0, 0, 2, 2, 2, 2, 4, 4, 3, 3, 5, 5, 8, 10, 10, 12]
    found = sweep_effects.interaction(arms_of(points, losses), LOSS, "override/a.b", "override/c.d")
    assert found.means.to_numpy().tolist() == [[1, 3], [4, 10]]
    assert found.is_whole
    # Rows mean 2 and 7, columns 2.5 and 6.5, all 4.5: a sum of effects gives 0, 4, 5 and 9. By seed
    # 0.75 and 1.25.
    assert found.departure.mean == pytest.approx(1.0)
    assert found.departure.se == pytest.approx(0.25)
    assert found.departure.num_seeds == 2
    assert found.departure.num_pairs == 4
    assert found.departure.high - found.departure.mean == pytest.approx(0.25 * student_quantile(2))


def test_an_interaction_is_judged_from_complete_rows_or_columns_or_not_at_all():
    def found_of(points):
        losses = [point["a.b"] * (point["c.d"] == "y") for point in points]
        return sweep_effects.interaction(
            arms_of(points, losses), LOSS, "override/a.b", "override/c.d"
        )

    points = product(a_b=[1, 2, 3], c_d=["x", "y"], train_seed=[0, 1])
    assert found_of(points).means.shape == (3, 2)
    holed = found_of(points[:-2])
    assert holed.means.index.tolist() == [1, 2]
    assert not holed.is_whole
    assert found_of(points[:6]) is None
    assert found_of(points[:1]) is None
    assert found_of([points[i] for i in (0, 1, 6, 7)]) is None  # a diagonal


def test_settings_are_compared_over_the_seeds_that_both_have():
    arms = arms_of(product(a_b=[1, 2], train_seed=[0, 1, 2]), [1, 2, 3, 3, 5, math.nan])
    ids = arms["arm"].tolist()
    same, found = sweep_effects.compare_settings(arms, LOSS, ids[:3], [ids[:3], ids[3:]])
    assert (same.mean, same.se, same.num_seeds) == (0, 0, 3)
    assert (found.mean, found.num_pairs, found.num_seeds) == (2.5, 2, 2)
    assert found.se == pytest.approx(0.5)
