"""What is timed: the same function by every implementation, with the arithmetic that is claimed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import oracle
from moejax.benchmarks import layer, timing
from moejax.benchmarks.layer import Shape
from moejax.benchmarks.timing import Arguments, Program

SHAPE = Shape(tokens=64, d_model=8, d_expert=4, num_experts=4, top_k=2)


@pytest.mark.parametrize("name", ["auto", "tiled", "ragged", "padded", "dense", "room for all"])
def test_every_implementation_that_is_timed_computes_the_layer_of_the_oracle(name):
    arrays = layer.draw(SHAPE, "float32")
    every = layer.implementations_of(SHAPE) | {"room for all": layer._capacity(SHAPE, 4.0)}
    run = functools.partial(layer.through, every[name])
    inputs = arrays.x_TD, arrays.weights_TK, *arrays.expert_weights
    choices = (arrays.experts_TK,)
    program = Program.compile(run, "forward_backward", Arguments(arrays.dy_TD, inputs, choices))
    y_TD, gradients = program()
    expected = oracle.feed_forward(*inputs, np.asarray(arrays.experts_TK), arrays.dy_TD)
    oracle.assert_close((y_TD, *gradients), expected)


@pytest.mark.parametrize("tokens", [64, 63])
def test_sorted_is_the_layer_with_equal_groups_of_tokens_in_order(tokens):
    shape = dataclasses.replace(SHAPE, tokens=tokens)
    arrays = layer.draw(shape, "float32")
    inputs = arrays.x_TD, arrays.weights_TK, *arrays.expert_weights
    ignored = (arrays.experts_TK,)
    run = functools.partial(layer.through, layer.implementations_of(shape)[layer.SORTED])
    program = Program.compile(run, "forward_backward", Arguments(arrays.dy_TD, inputs, ignored))
    y_TD, gradients = program()
    rows_of_expert = -(-tokens * 2 // 4)
    rows_TK = np.arange(tokens * 2).reshape(2, tokens).T
    in_order_TK = rows_TK // rows_of_expert
    expected = oracle.feed_forward(*inputs, in_order_TK, arrays.dy_TD)
    oracle.assert_close((y_TD, *gradients), expected)


def test_a_dense_layer_has_the_arithmetic_of_the_chosen_experts():
    arrays = layer.draw(SHAPE, "float32")
    inputs = arrays.x_TD, *arrays.dense_weights
    for direction in layer.DIRECTIONS:
        program = Program.compile(layer.dense_layer, direction, Arguments(arrays.dy_TD, inputs))
        flops = program.compiled.cost_analysis()["flops"]
        # Besides the products only the activation, a few operations for each of T * K * F
        # hidden units.
        assert SHAPE.flops(direction) < flops < SHAPE.flops(direction) + 30 * 64 * 2 * 4


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (4, 1), (4, 4)])
def test_a_token_chooses_different_experts_and_half_go_to_one_if_skewed(
    num_experts, top_k, is_skewed
):
    shape = Shape(512, 8, 8, num_experts, top_k, is_skewed)
    experts_TK = layer.choose(shape)
    assert experts_TK.shape == (512, top_k)
    assert all(len(set(row)) == top_k for row in experts_TK.tolist())
    counts_E = np.bincount(experts_TK.ravel(), minlength=num_experts)
    mean = 512 * top_k / num_experts
    assert counts_E[1:].min() > 0
    if is_skewed:
        assert counts_E[0] == min(512, 512 * top_k // 2)
    else:
        assert abs(counts_E[0] - mean) <= 5 * mean**0.5


def test_a_shape_is_written_as_it_is_read():
    shapes = [*layer.PRESETS.values(), dataclasses.replace(SHAPE, is_skewed=True)]
    assert layer.parse_shapes(",".join(map(str, shapes))) == shapes
    olmoe = layer.PRESETS["olmoe"]
    skewed = dataclasses.replace(olmoe, is_skewed=True)
    assert layer.parse_shapes("olmoe, olmoe:skewed") == [olmoe, skewed]


def test_programs_take_turns_and_the_first_turns_do_not_count(monkeypatch):
    now = [0.0]
    calls = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        calls.append(name)
        now[0] += 100 if len(calls) <= 4 else seconds

    programs = {"a": lambda: run("a", 1), "b": lambda: run("b", len(calls))}
    times = timing.interleave(programs, 4)
    assert calls == ["a", "b"] * 6
    assert times["a"].median_ms == 1000
    # After 5, 7, 9 and 11 calls.
    assert times["b"].median_ms == 8000 and times["b"].quartiles_ms == (6500, 9500)


def test_peaks_are_those_of_a_product_and_a_copy(monkeypatch):
    times = {"multiply": timing.Times(2.0, (2, 2)), "copy": timing.Times(4.0, (4, 4))}

    def interleave(programs, repetitions):
        jax.block_until_ready([program() for program in programs.values()])
        return times

    monkeypatch.setattr(timing, "interleave", interleave)
    peaks = timing.measure_peaks(size=100, megabytes=1)
    assert peaks.gflops == pytest.approx(1.0) and peaks.gbytes == pytest.approx(2 * 1.0 / 4)
