"""The oracle of routers and losses against pencil and paper, published implementations, and
experiment.

Logits are mostly logarithms of small numbers: softmax of log(4), log(3), log(2), log(1) is .4, .3,
.2, .1, and the sigmoid of log(3) is 3/4.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from oracle import keep_within_capacity, losses, routers

FIXTURES = Path(__file__).parents[2] / "../shared/routing-fixtures"
TENTHS = np.log([4.0, 3.0, 2.0, 1.0])  # softmax: .4 .3 .2 .1
QUARTERS = np.log([3.0, 1.0, 1 / 3])  # sigmoid: .75 .5 .25
E1, E4 = math.e - 1, math.e**4 - 1  # softplus(log(E1)) = 1, softplus(log(E4)) = 4


def near(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


# One token
# --------------------------------------------------------------------------------------------------


def test_every_score_is_its_formula():
    near(routers.scores_one(TENTHS, "softmax"), [0.4, 0.3, 0.2, 0.1])
    near(routers.scores_one(TENTHS, "softmax_after"), [1, 0.75, 0.5, 0.25])
    near(routers.scores_one(QUARTERS, "sigmoid"), [0.75, 0.5, 0.25])
    near(routers.scores_one([-1000.0, 1000.0], "sigmoid"), [0, 1])
    near(routers.scores_one(np.log([E1, E4]), "sqrt_softplus"), [1, 2])
    near(routers.scores_one(TENTHS, "uniform"), [1, 1, 1, 1])


def test_probabilities_are_scores_over_their_sum():
    near(routers.probs_one(QUARTERS, "sigmoid"), [1 / 2, 1 / 3, 1 / 6])  # .75 .5 .25 over 1.5
    near(routers.probs_one(np.log([E1, E4]), "sqrt_softplus"), [1 / 3, 2 / 3])
    near(routers.probs_one(TENTHS, "softmax_after"), [0.4, 0.3, 0.2, 0.1])


def test_the_score_of_a_group_is_its_best_or_the_sum_of_its_two_best():
    values = [5, 0, -9, 3, 3, -9, 4, 1.5, 0]  # best: 5 3 4; best two: 5 6 5.5; all three: -4 -3 5.5
    assert routers.allowed_by_groups(values, 3, 1, "max") == {0, 1, 2}
    assert routers.allowed_by_groups(values, 3, 1, "top2_sum") == {3, 4, 5}
    assert routers.allowed_by_groups(values, 3, 2, "top2_sum") == {3, 4, 5, 6, 7, 8}
    assert routers.allowed_by_groups([1, 1, 1, 1], 2, 1, "max") == {0, 1}


def test_ties_go_to_the_lowest_index():
    assert routers.select_one([1, 2, 2, 1, 2], 4) == [1, 2, 4, 0]
    assert routers.select_one([1, 2, 2, 1, 2], 2, {0, 3, 4}) == [4, 0]


def test_weights_are_the_scores_of_the_selected_renormalised_when_asked():
    near(routers.weigh_one(TENTHS, [0, 2], "softmax", False), [0.4, 0.2])
    near(routers.weigh_one(TENTHS, [0, 2], "softmax", True, 2.5), [2.5 * 2 / 3, 2.5 / 3])
    near(routers.weigh_one(TENTHS, [1, 3], "softmax_after", False), [0.75, 0.25])  # 3 and 1 over 4
    near(routers.weigh_one(QUARTERS, [2, 0], "sigmoid", True), [0.25, 0.75])
    near(routers.weigh_one(TENTHS, [0, 2], "uniform", False, 3.0), [1.5, 1.5])
    squares = 0.4**2 + 0.3**2  # the root of which is a half
    near(squares, 0.25)
    near(routers.weigh_one(TENTHS, [0, 1], "softmax", True, weight_norm=2.0), [0.8, 0.6])


# Token choice
# --------------------------------------------------------------------------------------------------


def test_the_bias_changes_the_choice_never_the_weight():
    how = {"top_k": 2, "score": "sigmoid", "renormalize": False}
    plain = routers.route_scored([QUARTERS], [True], **how)
    biased = routers.route_scored([QUARTERS], [True], bias_E=[0, 0, 1], **how)  # .75 .5 1.25
    assert plain.experts_TK.tolist() == [[0, 1]] and biased.experts_TK.tolist() == [[2, 0]]
    near(biased.weights_TK, [[0.25, 0.75]])
    near(biased.probs_TE, plain.probs_TE)


@pytest.mark.parametrize(
    "score, select_by, expert",
    [("sigmoid", "score", 1), ("sigmoid", "logits", 0), ("softmax_after", "score", 0)],
)
def test_the_bias_is_added_to_the_score_or_to_the_logit(score, select_by, expert):
    # s + b = .75 against .5 + .8; l + b = 1.099 against 0 + .8; exp(l - max) + b would be 1
    # against 1/3 + .8
    how = {"top_k": 1, "renormalize": False, "bias_E": [0, 0.8], "select_by": select_by}
    assert routers.route_scored([QUARTERS[:2]], [True], score=score, **how).experts_TK.tolist() == [
        [expert]
    ]


def test_experts_outside_the_best_groups_are_never_chosen_even_when_all_values_are_negative():
    # s = .5; s + b = -.2 -.3 | -.1 -.9; the sums of two are -.5 and -1, so that -.1 is out although
    # it is the best
    how = {"top_k": 2, "score": "sigmoid", "renormalize": True, "num_groups": 2, "top_k_groups": 1}
    routed = routers.route_scored(np.zeros((1, 4)), [True], bias_E=[-0.7, -0.8, -0.6, -1.4], **how)
    assert routed.experts_TK.tolist() == [[0, 1]]


def test_a_masked_token_goes_nowhere():
    how = {"top_k": 2, "score": "softmax", "renormalize": True}
    routed = routers.route_scored([TENTHS, TENTHS], [False, True], **how)
    assert routed.experts_TK.tolist() == [[-1, -1], [0, 1]]
    near(routed.weights_TK, [[0, 0], [4 / 7, 3 / 7]])
    near(routed.probs_TE, [[0, 0, 0, 0], [0.4, 0.3, 0.2, 0.1]])


def test_noise_chooses_and_weighs_but_probabilities_are_clean():
    how = {"top_k": 2, "score": "softmax_after", "renormalize": True}
    routed = routers.route_noisy([TENTHS], [TENTHS[::-1]], [True], **how)
    assert routed.experts_TK.tolist() == [[3, 2]]
    near(routed.weights_TK, [[4 / 7, 3 / 7]])
    near(routed.probs_TE, [[0.4, 0.3, 0.2, 0.1]])
    near(routers.noise_sigma([[math.log(E1), math.log(E4)]]), [[1.01, 4.01]])


def test_a_hash_router_reads_its_table():
    table_VK = [[0, 1], [3, 2], [1, 3]]
    routed = routers.route_hash(table_VK, [1, 2, 1], [True, True, False])
    assert routed.experts_TK.tolist() == [[3, 2], [1, 3], [-1, -1]]
    near(routed.weights_TK, [[0.5, 0.5], [0.5, 0.5], [0, 0]])
    near(routed.probs_TE[0], [0.25] * 4)
    scored = routers.route_hash(table_VK, [2], [True], [TENTHS], "softmax", scale=2.0)
    near(scored.weights_TK, [[1.5, 0.5]])  # .3 and .1 over .4, twice


def test_the_balanced_router_goes_round():
    routed = routers.route_balanced([0, 1, 2, 3], [True, True, True, False], top_k=3, num_experts=4)
    assert routed.experts_TK.tolist() == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [-1, -1, -1]]
    near(routed.weights_TK[:3], np.full((3, 3), 1 / 3))
    near(routed.probs_TE[0], [0.25] * 4)


def test_a_hierarchical_gate_is_the_product_of_two():
    groups = np.log(
        [1.0, 6.0, 2.0]
    )  # the best two: group 1 with 3/4, group 2 with 1/4; all: 1/9 6/9 2/9
    logits = np.log([9.0, 9.0, 9.0, 1.0, 2.0, 2.0, 4.0, 3.0, 1.0])
    # within group 1: experts 4 and 5 (1/2 each; of all three 1/5 2/5 2/5), within group 2: 6 and 7
    # (4/7 and 3/7)
    routed = routers.route_hierarchical([groups], [logits], [True], top_k_groups=2, per_group=2)
    assert routed.experts_TK.tolist() == [[4, 5, 6, 7]]
    near(routed.weights_TK, [[3 / 8, 3 / 8, 1 / 7, 3 / 28]])
    near(routed.probs_TE[0], np.array([5 / 3, 5 / 3, 5 / 3, 6, 12, 12, 5, 15 / 4, 5 / 4]) / 45)
    clean = {"clean_group_logits_TG": np.zeros((1, 3)), "clean_logits_TE": np.zeros((1, 9))}
    noisy = routers.route_hierarchical(
        [groups], [logits], [True], top_k_groups=2, per_group=2, scale=2.0, **clean
    )
    near(noisy.weights_TK, 2 * routed.weights_TK)
    near(noisy.probs_TE, np.full((1, 9), 1 / 9))


def test_cosine_logits_ignore_lengths():
    # x P = (3, 4): cosines .6 with (5, 0) and .8 with (0, .1); zero has cosine 0
    near(
        routers.cosine_logits([[3, 4, 7], [0, 0, 1]], np.eye(3)[:, :2], [[5, 0], [0, 0.1]], 0.5),
        [[1.2, 1.6], [0, 0]],
    )


# Sinkhorn, quantile, SparseMixer
# ----------------------------------------------------------------------------------

SKEWED = np.log([[4.0, 1.0], [2.0, 1.0]])  # both tokens prefer expert 0


def test_one_sinkhorn_iteration_scales_columns_then_rows():
    # columns 6 and 2 to sum 1: 2/3 1/2 | 1/3 1/2; rows 7/6 and 5/6 to sum 1: 4/7 3/7 | 2/5 3/5
    near(routers.sinkhorn_plan(SKEWED, [True, True], 1), [[4 / 7, 3 / 7], [2 / 5, 3 / 5]])
    padded = np.concatenate([SKEWED[:1], np.full((1, 2), 50.0), SKEWED[1:]])
    near(
        routers.sinkhorn_plan(padded, [True, False, True], 1),
        [[4 / 7, 3 / 7], [0, 0], [2 / 5, 3 / 5]],
    )


def test_many_sinkhorn_iterations_balance_the_experts():
    logits_LE = np.random.default_rng(0).normal(size=(12, 4)) + np.array([2, 0, 0, 0])
    plan_LE = routers.sinkhorn_plan(logits_LE, [True] * 12, 200)
    near(plan_LE.sum(0), [3] * 4)
    near(plan_LE.sum(1), [1] * 12)


def test_sinkhorn_chooses_by_the_plan_of_each_sequence_in_training_and_by_logits_in_evaluation():
    # exp(l) = 4 1 | 2 1 as above, and 2 1 | 1 1 with columns 3 and 2: 2/3 1/2 | 1/3 1/2. As one
    # sequence the columns would be 9 and 4, and the row 2 1, as 2/9 1/4, would go to expert 1.
    how = {"length": 3, "top_k": 1, "iterations": 1, "score": "softmax", "renormalize": False}
    logits_TE, mask_T = (
        np.log([[4, 1], [2, 1], [9, 9], [2, 1], [1, 1], [9, 9]]),
        [True, True, False] * 2,
    )
    train = routers.route_sinkhorn(logits_TE, mask_T, training=True, **how)
    assert train.experts_TK.ravel().tolist() == [0, 1, -1, 0, 1, -1]
    near(train.weights_TK.ravel(), [4 / 5, 1 / 3, 0, 2 / 3, 1 / 2, 0])
    evaluation = routers.route_sinkhorn(logits_TE, mask_T, training=False, **how)
    assert evaluation.experts_TK.ravel().tolist() == [0, 0, -1, 0, 0, -1]


def test_a_quantile_step_by_hand():
    # K = 1, beta = (1, 0, 0). l - beta: 4 2 1 | 2 1 0 | 0 3 1 | 1 2 3, so that alpha = 2 1 1 2
    # and l - alpha is 3 0 -1 | 2 0 -1 | 0 2 0 | 0 0 1. Rank floor(4/3) + 1 = 2: 2 0 0, minus
    # their mean 2/3.
    logits_TE = [[5, 2, 1], [3, 1, 0], [9, 9, 9], [1, 3, 1], [2, 2, 3]]
    near(routers.quantile_update([1, 0, 0], logits_TE, [1, 1, 0, 1, 1], 1), [4 / 3, -2 / 3, -2 / 3])
    near(routers.quantile_update([1, 0, 0], logits_TE, [0] * 5, 1), [1, 0, 0])


def test_quantile_steps_balance_a_skewed_router():
    logits_TE = np.random.default_rng(1).normal(size=(64, 8)) + np.linspace(2, -2, 8)
    how, mask_T, beta_E = (
        {"top_k": 2, "score": "sigmoid", "renormalize": True},
        [True] * 64,
        np.zeros(8),
    )
    before = routers.route_quantile(logits_TE, mask_T, beta_E, **how)
    for _ in range(30):
        beta_E = routers.quantile_update(beta_E, logits_TE, mask_T, 2)
    after = routers.route_quantile(logits_TE, mask_T, beta_E, **how)
    assert losses.max_violation(losses.count(before.experts_TK, 8)) > 1
    assert losses.max_violation(losses.count(after.experts_TK, 8)) < 0.2


def test_sparse_mixer_weighs_within_a_threshold_of_the_best_expert_left():
    # 2 * threshold = .4. First (4 - l) / 4 = 0 .25 .75 and 8 / 4: experts 0 and 1 are in. Then (3 -
    # l) / max(|l|, 3) = 0 2/3 and 7 / 4: expert 1 alone.
    experts, weights = routers.sparse_mixer_one([4, 3, 1, -4], 2, 0.2)
    assert experts == [0, 1]
    near(weights, [1 / (1 + math.exp(-1)), 1])
    # A large negative logit is compared with itself: (1 + 4) / 4 = 1.25, not 5.
    near(
        routers.sparse_mixer_support([1, -4], [], 0.7),
        [1 / (1 + math.exp(-5)), 1 / (1 + math.exp(5))],
    )
    # 0/0 is in, (0 + 1) / 1 is out; at threshold 1/8, (4 - 3) / 4 = 2 * threshold is in.
    near(routers.sparse_mixer_support([0, 0, -1], [], 0.1), [0.5, 0.5, 0])
    assert routers.sparse_mixer_support([4, 3], [], 0.125)[1] > 0
    routed = routers.route_sparse_mixer([[4, 3, 1, -4]] * 2, [False, True], top_k=2, threshold=0.2)
    assert routed.experts_TK.tolist() == [[-1, -1], [0, 1]]
    near(routed.weights_TK, [[0, 0], weights])


def test_sparse_mixer_samples_ordered_pairs_with_probabilities_that_sum_to_one():
    logits_E = [1.0, 0.8, 0.9, -2.0]
    pairs = [list(pair) for pair in itertools.permutations(range(4), 2)]
    probabilities = [
        routers.sparse_mixer_sequence_probability(logits_E, pair, 0.2) for pair in pairs
    ]
    near(sum(probabilities), 1)
    assert all(
        probability == 0
        for pair, probability in zip(pairs, probabilities, strict=True)
        if 3 in pair
    )
    support = math.exp(1.0) + math.exp(0.8) + math.exp(0.9)
    expected = math.exp(0.8) / support * math.exp(0.9) / (math.exp(1.0) + math.exp(0.9))
    near(routers.sparse_mixer_sequence_probability(logits_E, [1, 2], 0.2), expected)
    assert routers.sparse_mixer_factors(True) == {1.0: 1.0}
    near(
        sum(factor * share for factor, share in routers.sparse_mixer_factors(False).items()), 0.5
    )  # 1/4 + 3/4 / 3


# Experts choose, soft experts, state
# ------------------------------------------------------------------------------


def test_each_expert_takes_its_most_probable_real_tokens_of_each_sequence():
    probs_BLE = np.array([[[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]]] * 2)
    weights_BLE = routers.route_expert_choice(
        np.log(probs_BLE), [[True] * 4, [False, False, False, True]], 2, 3.0
    )
    near(weights_BLE[0] / 3, [[0.9, 0], [0.6, 0.4], [0, 0], [0, 0.8]])  # ties to the lower position
    near(weights_BLE[1] / 3, [[0, 0], [0, 0], [0, 0], [0.2, 0.8]])  # a slot stays empty


def test_soft_experts_mix_real_tokens_in_and_all_slots_out():
    logits_BLS = np.log([[[1.0, 3.0], [3.0, 1.0], [7.0, 7.0]]])
    dispatch_BLS, combine_BLS = routers.soft_moe(logits_BLS, [[True, True, False]])
    near(dispatch_BLS, [[[1 / 4, 3 / 4], [3 / 4, 1 / 4], [0, 0]]])
    near(combine_BLS, [[[1 / 4, 3 / 4], [3 / 4, 1 / 4], [0, 0]]])
    dispatch_BLS, combine_BLS = routers.soft_moe(np.log([[[1.0, 3.0], [1.0, 1.0]]]), [[True, True]])
    near(dispatch_BLS, [[[1 / 2, 3 / 4], [1 / 2, 1 / 4]]])
    near(combine_BLS, [[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]])
    assert not np.any(routers.soft_moe(logits_BLS, [[False] * 3]))
    near(routers.soft_logits([[[3, 4], [0, 0]]], [[5, 0], [0, 2]], 10), [[[6, 8], [0, 0]]])


def test_the_bias_rises_where_the_load_is_below_its_mean():
    near(routers.bias_update([0.5, 0, 0], [3, 1, 2], 0.1, False), [0.4, 0.1, 0])
    near(
        routers.bias_update([0, 0, 0], [4, 1, 1], 0.3, True), [-0.4, 0.2, 0.2]
    )  # -.3 .3 .3 minus .1


# Losses
# --------------------------------------------------------------------------------------------------


def test_the_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    uniform, collapsed, mask = np.full((8, 4), 0.25), np.tile([1.0, 0, 0, 0], (8, 1)), [True] * 8
    in_turn = np.array([[t % 4, (t + 1) % 4] for t in range(8)])
    near(losses.balance_loss(uniform, in_turn, mask), 1)
    near(losses.balance_loss(collapsed, np.zeros((8, 1), int), mask), 4)
    for convention, value in {"first_choice": 1, "times_k": 2, "over_k": 0.5}.items():
        near(losses.balance_loss(uniform, in_turn, mask, convention), value)


def test_the_balance_loss_by_hand_without_padding():
    probs_TE, experts_TK = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0, 0, 0]], [[0, 1], [1, 0], [-1, -1]]
    mask = [True, True, False]
    # P = .4 .5 .1; f = 2/4 2/4 0: 3 * .45; of the first choices f = 1/2 1/2 0, which is the same
    near(losses.balance_loss(probs_TE, experts_TK, mask), 1.35)
    # experts 0 1, 0 2: f = 2/4 1/4 1/4 and P as before: 3 * (.2 + .125 + .025); first choices 1
    # 0 0: 3 * .4
    near(losses.balance_loss(probs_TE, [[0, 1], [0, 2], [-1, -1]], mask), 1.05)
    near(losses.balance_loss(probs_TE, [[0, 1], [0, 2], [-1, -1]], mask, "first_choice"), 1.2)
    assert losses.balance_loss(probs_TE, experts_TK, [False] * 3) == 0


def test_the_mean_of_local_balance_losses_is_not_the_global_one():
    # Two sequences, each collapsed on an expert of its own: 2 each, 1 together; a third of padding
    # does not count.
    probs_TE, experts_TK = np.eye(2)[[0, 0, 1, 1, 0, 0]], [[0], [0], [1], [1], [-1], [-1]]
    mask = [True] * 4 + [False] * 2
    near(losses.scoped_balance_loss(probs_TE, experts_TK, mask, 3), 2)
    near(losses.scoped_balance_loss(probs_TE, experts_TK, mask, 1), 1)


def test_the_sequence_loss_by_hand():
    # First sequence, K = 1, E = 2: s = .6 .2 | .1 .3, so s' = .75 .25 | .25 .75: f = 1 1, P = .5
    # .5: 1. Second, one real token: f = 2 0, P = .75 .25: 1.5. The third is padding. Mean 1.25.
    scores_TE, mask = (
        [[0.6, 0.2], [0.1, 0.3], [0.6, 0.2], [9, 9], [9, 9], [9, 9]],
        [1, 1, 1, 0, 0, 0],
    )
    near(losses.sequence_balance_loss(scores_TE, mask, 1, 2), 1.25)
    near(losses.sequence_balance_loss(scores_TE[:2], mask[:2], 2, 2), 1)  # K = E: always 1


def test_importance_by_hand():
    near(losses.cv_squared([1, 3]), 0.25, 1e-9)  # mean 2, population variance 1
    near(losses.cv_squared([0, 0]), 0)
    experts_TK, weights_TK = [[0, 1], [2, 0], [-1, -1]], [[0.75, 0.25], [0.5, 0.5], [0, 0]]
    near(losses.importance(experts_TK, weights_TK, 3), [1.25, 0.25, 0.5])
    # mean 2/3, deviations 7/12 -5/12 -2/12: variance (49 + 25 + 4) / 144 / 3 = 13/72; times
    # 9/4: 13/32
    near(losses.importance_loss(experts_TK, weights_TK, 3), 13 / 32, 1e-9)
    near(losses.importance_vmoe([[0.5, 0.5], [0.1, 0.9], [7, 7]], [True, True, False]), [0.6, 1.4])


def test_the_load_by_hand():
    logits_TE, mask = [[2, 1, 0], [9, 9, 9]], [True, False]
    # K = 1: the best of the others is 1 2 2, so Phi(1) Phi(-1) Phi(-2); at sigma 2 Phi(1/2)
    # Phi(-1/2) Phi(-1)
    near(
        losses.load_shazeer(logits_TE, logits_TE, np.ones((2, 3)), mask, 1),
        [0.841345, 0.158655, 0.022750],
        1e-6,
    )
    near(
        losses.load_shazeer(logits_TE, logits_TE, np.full((2, 3), 2), mask, 1),
        [0.691462, 0.308538, 0.158655],
        1e-6,
    )
    # K = 2: the second best of the others is 0 0 1: Phi(2) Phi(1) Phi(-1)
    near(
        losses.load_shazeer(logits_TE, logits_TE, np.ones((2, 3)), mask, 2),
        [0.977250, 0.841345, 0.158655],
        1e-6,
    )
    # V-MoE: 2 for all, sigma 1/3: Phi(0) Phi(-3) Phi(-6)
    near(losses.load_vmoe(logits_TE, logits_TE, mask, 1), [0.5, 0.001350, 0], 1e-6)


def test_the_load_of_shazeer_is_what_redrawing_the_noise_counts_and_that_of_vmoe_is_too_low():
    rng = np.random.default_rng(0)
    num_tokens, num_experts, top_k, draws = 48, 8, 2, 400
    clean_TE = 0.2 * rng.normal(size=(num_tokens, num_experts))
    sigma_TE = np.full(
        clean_TE.shape, 1 / num_experts
    )  # V-MoE's own, so that only its threshold is wrong
    noisy_TE, mask = (
        clean_TE + sigma_TE * rng.normal(size=clean_TE.shape),
        [True] * 40 + [False] * 8,
    )
    truth_E = losses.monte_carlo_load(clean_TE, noisy_TE, sigma_TE, mask, top_k, draws, rng)
    standard_error = math.sqrt(40 / (4 * draws))  # at most
    shazeer_E = losses.load_shazeer(clean_TE, noisy_TE, sigma_TE, mask, top_k)
    assert np.abs(shazeer_E - truth_E).max() < 3 * standard_error < 0.1 * truth_E.min()
    assert 0.15 < 1 - losses.load_vmoe(clean_TE, noisy_TE, mask, top_k).sum() / truth_E.sum() < 0.5


# Metrics
# --------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    counts_E, mask = [6, 1, 1, 0], [True, True, False]
    near(losses.max_violation(counts_E), 2)  # 6 / 2 - 1
    near(losses.coefficient_of_variation(counts_E), math.sqrt(5.5) / 2)  # (16 + 1 + 1 + 4) / 4
    near(losses.load_entropy(counts_E), 0.75 * math.log(4 / 3) + 0.25 * math.log(8))
    near(losses.load_entropy([2, 2, 2, 2]), math.log(4))
    probs_TE = [[0.5, 0.25, 0.25], [0.8, 0.2, 0], [9, 9, 9]]
    near(losses.router_entropy(probs_TE[:1], mask[:1]), 1.5 * math.log(2))
    near(losses.top_prob(probs_TE, mask), 0.65)
    near(losses.margin(probs_TE, mask, 1), (0.25 + 0.6) / 2)
    near(losses.margin(probs_TE, mask, 3), 0.125)  # the smallest against 0
    near(losses.gate_mass([[0.5, 0.25], [0.8, 0.2], [9, 9]], mask), 0.875)
    near(losses.logit_rms([[1, 7], [-5, 5], [99, 99]], mask), 5)  # (1 + 49 + 25 + 25) / 4
    near(losses.logit_max([[1, 4], [-5, 3], [99, 99]], mask), 4)
    near(
        losses.z_loss(np.log([[1.0, 3.0], [1.0, 1.0], [9.0, 9.0]]), mask),
        (math.log(4) ** 2 + math.log(2) ** 2) / 2,
    )


def test_counts_coactivation_and_churn_by_hand():
    first_TK = [[0, 1], [2, 1], [-1, -1]]
    near(losses.count(first_TK, 3), [1, 2, 1])
    near(losses.coactivation(first_TK, 3), [[1, 1, 0], [1, 2, 1], [0, 1, 1]])
    near(losses.churn(first_TK, [[1, 0], [0, 1], [-1, -1]]), 0.25)  # nothing, and a half
    near(losses.churn(first_TK, first_TK), 0)


# Published implementations
# ----------------------------------------------------------------------------------------

FAMILIES = {
    "mixtral": {"score": "softmax", "renormalize": True},
    "olmoe": {"score": "softmax", "renormalize": False},
    "qwen2_moe": {"score": "softmax", "renormalize": False},
    "gpt_oss": {"score": "softmax_after", "renormalize": False},
    "deepseek_v3": {
        "score": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "num_groups": 4,
        "top_k_groups": 2,
    },
    "switch_transformers": {"score": "softmax", "renormalize": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_agrees_with_a_published_implementation(family):
    if not FIXTURES.exists():
        pytest.skip(f"the fixtures of published routers are not at {FIXTURES}")
    config = json.loads((FIXTURES / "index.json").read_text())[family]["config"]
    arrays = np.load(FIXTURES / f"{family}.npz")
    layers = [name.removesuffix(".logits") for name in arrays.files if name.endswith(".logits")]
    assert (
        layers
        and config.get("norm_topk_prob", FAMILIES[family]["renormalize"])
        == FAMILIES[family]["renormalize"]
    )
    for layer in layers:
        logits_TE, experts_TK = arrays[f"{layer}.logits"], arrays[f"{layer}.indices"]
        bias = f"bias.{layer.split('.')[-1]}"
        how = {"top_k": config.get("num_experts_per_tok", 1), **FAMILIES[family]}
        how["bias_E"] = arrays[bias] if bias in arrays.files else None
        routed = routers.route_scored(logits_TE, [True] * len(logits_TE), **how)
        weights_TK = routed.weights_TK
        if f"{layer}.kept" in arrays.files:  # two sequences; a dropped choice has weight 0
            kept_BLK = keep_within_capacity(
                routed.experts_TK.reshape(2, -1, 1), 8, config["expert_capacity"]
            )
            assert not kept_BLK.all()
            near(kept_BLK.reshape(-1, 1), arrays[f"{layer}.kept"])
            weights_TK = weights_TK * kept_BLK.reshape(-1, 1)
        # The same experts in any order, each with the same weight.
        order_TK, expected_order_TK = np.argsort(routed.experts_TK, -1), np.argsort(experts_TK, -1)
        near(np.take_along_axis(routed.experts_TK, order_TK, -1), np.sort(experts_TK, -1))
        expected_TK = np.take_along_axis(arrays[f"{layer}.weights"], expected_order_TK, -1)
        near(np.take_along_axis(weights_TK, order_TK, -1), expected_TK, 1e-6)
