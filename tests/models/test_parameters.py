"""Parameter counts, worked out by hand."""

import pytest

from moejax.benchmarks.step import dense_twin
from moejax.config import resolve
from moejax.models.parameters import count_parameters

MODEL = {"num_layers": 4, "d_model": 16, "d_ff": 40}  # with 4 heads, 2 of keys and values
BYTES = {"tokenizer": "bytes"}  # 259 ids, rounded up to 320 rows
EMBEDDING = 320 * 16
# Query and output 16 x 16 each, key and value 16 x 2 heads x 4 each; two norms.
ATTENTION = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16
FINAL_NORM = 16


def test_a_dense_model_has_the_parameters_counted_by_hand_all_of_them_active():
    count = count_parameters(resolve({"model": MODEL, "data": BYTES, "moe": {"num_experts": 0}}))
    feed_forward = 3 * 16 * 40  # gate, up, down
    assert count.total == EMBEDDING + 4 * (ATTENTION + feed_forward) + FINAL_NORM
    assert count.active == count.total


def test_a_moe_model_has_the_parameters_counted_by_hand_of_which_a_token_uses_k_of_e_experts():
    moe = {
        "num_experts": 8,
        "top_k": 2,
        "d_expert": 24,
        "num_shared_experts": 1,
        "first_dense": 1,
        "every": 2,
    }
    model = MODEL | {"tied_embeddings": False}
    sections = {"model": model, "attention": {"qk_norm": "head"}, "data": BYTES, "moe": moe}
    count = count_parameters(resolve(sections))
    attention = ATTENTION + 2 * 4  # norms of query and key, one head wide
    dense, expert, router = 3 * 16 * 40, 3 * 16 * 24, 16 * 8
    # Layers 0, 1 and 3 are dense, layer 2 is MoE: after the first, every second of the rest.
    outside = 2 * EMBEDDING + 4 * attention + 3 * dense + FINAL_NORM + router
    assert count.total == outside + (8 + 1) * expert
    assert count.active == outside + (2 + 1) * expert


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"activation": "relu", "num_shared_experts": 1},
        {"activation": "squared_relu", "d_latent": 8, "d_expert": 48},
        {"num_identity_experts": 4},
    ],
)
def test_the_dense_twin_has_as_many_active_parameters_but_for_the_router(moe):
    config = resolve(
        {"model": MODEL, "data": BYTES, "moe": {"num_experts": 8, "top_k": 2, "d_expert": 24} | moe}
    )
    router = 4 * 16 * config.moe.num_choices
    moe_active, twin = (
        count_parameters(config).active - router,
        count_parameters(dense_twin(config)).active,
    )
    assert abs(moe_active - twin) <= 4 * 3 * 16 / 2  # the width is rounded


def test_a_token_never_has_more_experts_with_weights_than_there_are():
    moe = {
        "num_experts": 2,
        "top_k": 4,
        "d_expert": 24,
        "num_zero_experts": 4,
        "router": "softmax_topk",
    }
    config = resolve({"model": MODEL, "data": BYTES, "moe": moe})
    assert count_parameters(config).active == count_parameters(config).total
