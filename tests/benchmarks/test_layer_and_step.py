"""What is timed: the same function by every implementation, with the arithmetic that the figures claim."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import oracle
from moejax.benchmarks import layer, timing
from moejax.benchmarks.layer import Program, Shape

SHAPE = Shape(tokens=64, d_model=8, d_expert=4, num_experts=4, top_k=2)


@pytest.mark.parametrize("name", ["auto", "tiled", "ragged", "padded", "dense", "room for all"])
def test_every_implementation_that_is_timed_computes_the_layer_of_the_oracle(name):
    arrays = layer.draw(SHAPE, "float32")
    every = layer.implementations_of(SHAPE) | {"room for all": layer._capacity(SHAPE, 4.0)}
    inputs = arrays.x_TD, arrays.weights_TK, *arrays.expert_weights
    program = Program.compile(
        functools.partial(layer.through, every[name]),
        "forward_backward",
        arrays.dy_TD,
        inputs,
        (arrays.experts_TK,),
    )
    y_TD, gradients = program()
    expected = oracle.feed_forward(*inputs, np.asarray(arrays.experts_TK), arrays.dy_TD)
    oracle.assert_close((y_TD, *gradients), expected)


@pytest.mark.parametrize("tokens", [64, 63])
def test_sorted_is_the_layer_of_choices_that_are_equal_groups_in_order_with_the_arithmetic_of_the_products(
    tokens,
):
    shape = dataclasses.replace(SHAPE, tokens=tokens)
    arrays = layer.draw(shape, "float32")
    inputs = arrays.x_TD, arrays.weights_TK, *arrays.expert_weights
    ignored = (arrays.experts_TK,)
    run = functools.partial(layer.through, layer.implementations_of(shape)[layer.SORTED])
    y_TD, gradients = Program.compile(run, "forward_backward", arrays.dy_TD, inputs, ignored)()
    in_order_TK = np.arange(tokens * 2).reshape(2, tokens).T // -(-tokens * 2 // 4)
    oracle.assert_close((y_TD, *gradients), oracle.feed_forward(*inputs, in_order_TK, arrays.dy_TD))


def test_a_dense_layer_has_the_arithmetic_of_the_chosen_experts():
    arrays = layer.draw(SHAPE, "float32")
    inputs = arrays.x_TD, *arrays.dense_weights
    for direction in layer.DIRECTIONS:
        flops = Program.compile(
            layer.dense_layer, direction, arrays.dy_TD, inputs
        ).compiled.cost_analysis()["flops"]
        # Besides the products only the activation, a few operations for each of T * K * F
        # hidden units.
        assert SHAPE.flops(direction) < flops < SHAPE.flops(direction) + 30 * 64 * 2 * 4


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (4, 1), (4, 4)])
def test_choices_are_of_different_experts_and_skewed_ones_give_one_of_them_half(
    num_experts, top_k, is_skewed
):
    shape = Shape(512, 8, 8, num_experts, top_k, is_skewed)
    experts_TK = layer.choose(shape)
    assert experts_TK.shape == (512, top_k)
    assert all(len(set(row)) == top_k for row in experts_TK.tolist())
    counts_E = np.bincount(experts_TK.ravel(), minlength=num_experts)
    mean = 512 * top_k / num_experts
    assert counts_E[1:].min() > 0
    assert (
        counts_E[0] == min(512, 512 * top_k // 2)
        if is_skewed
        else abs(counts_E[0] - mean) <= 5 * mean**0.5
    )


def test_a_shape_is_written_as_it_is_read():
    shapes = [*layer.PRESETS.values(), dataclasses.replace(SHAPE, is_skewed=True)]
    assert layer.parse_shapes(",".join(map(str, shapes))) == shapes
    assert layer.parse_shapes("olmoe, olmoe:skewed") == [
        layer.PRESETS["olmoe"], dataclasses.replace(layer.PRESETS["olmoe"], is_skewed=True),
    ]  # fmt: skip


def test_programs_take_turns_and_the_first_turns_do_not_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def program(name, seconds):
        calls.append(name)
        now[0] += 100 if len(calls) <= 4 else seconds

    times = timing.interleave(
        {"a": lambda: program("a", 1), "b": lambda: program("b", len(calls))}, 4
    )
    assert calls == ["a", "b"] * 6
    assert times["a"].median_ms == 1000
    assert times["b"].median_ms == 8000 and times["b"].quartiles_ms == (
        6500,
        9500,
    )  # after 5, 7, 9, 11 calls


def test_peaks_are_those_of_a_product_and_a_copy(monkeypatch):
    times = {"multiply": timing.Times(2.0, (2, 2)), "copy": timing.Times(4.0, (4, 4))}
    monkeypatch.setattr(timing, "interleave", lambda programs, repetitions: jax.block_until_ready(
        [program() for program in programs.values()]) and times)  # fmt: skip
    peaks = timing.measure_peaks(size=100, megabytes=1)
    assert peaks.gflops == pytest.approx(1.0) and peaks.gbytes == pytest.approx(2 * 1.0 / 4)
