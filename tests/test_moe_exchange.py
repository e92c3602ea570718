"""Every way in which tokens meet experts on a mesh, against the loop over choices, with what travels counted."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import oracle
from moejax.config import ConfigError, resolve
from moejax.moe.exchange import Exchange, Local, exchange
from moejax.moe.experts import ExpertWeights
from moejax.moe.local import Chosen, Slots, run_dropless, run_slots
from moejax.sharding import MESH_AXES

B, L, D, F, E = 8, 6, 5, 4, 8
STRATEGIES = ["gather", "ring", "all_to_all", "ragged", "dedup"]
MESHES = {  # data, fsdp, dcn_expert, expert, tensor
    "expert 8": (1, 1, 1, 8, 1),
    "data 2, expert 4": (2, 1, 1, 4, 1),
    "data 2, expert 2, tensor 2": (2, 1, 1, 2, 2),
    "fsdp 2, expert 2": (1, 2, 1, 2, 1),
    "dcn 2, expert 4": (1, 1, 2, 4, 1),
    "dcn 2, expert 2, tensor 2": (1, 1, 2, 2, 2),
    "dcn 4, data 2": (2, 1, 4, 1, 1),
    "expert 1": (1, 1, 1, 1, 1),
}
NAMES = ["output", "input", "combine weights", "gate and up", "down"]


def choices_of(load, top_k, seed=0):
    """Experts `[B, L, K]`, different ones for each token; E where a token is masked."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.normal(size=(B, L, E)), axis=-1)
    if load == "skewed":  # most tokens have expert 0 among theirs
        order = np.argsort(rng.normal(size=(B, L, E)) - 3 * (np.arange(E) == 0), axis=-1)
    experts_BLK = order[..., :top_k].astype(np.int32)
    if load == "one device":
        experts_BLK = np.broadcast_to(np.arange(top_k, dtype=np.int32), (B, L, top_k)).copy()
    if load == "masked":  # the first device has no token at all, others some
        experts_BLK[0], experts_BLK[3:, L // 2 :] = E, E
    return experts_BLK


def draw(load, top_k, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, L, D), (B, L, top_k), (E, D, 2, F), (E, F, D), (B, L, D)
    x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD, choices_of(load, top_k, seed)


def mesh_of(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 5, devices=devices)


def through(how, weight_on, x_BLD, weights_BLK, gate_up_EDPF, down_EFD, experts_BLK):
    local = Local(functools.partial(run_dropless, implementation="auto"))
    ones_BLK = jnp.ones_like(weights_BLK)
    on_output = Chosen(experts_BLK, weights_BLK)
    chosen = on_output if weight_on == "output" else Chosen(experts_BLK, ones_BLK, weights_BLK)
    return exchange(how, local, local, x_BLD, chosen, ExpertWeights(gate_up_EDPF, down_EFD))


@functools.cache
def compiled(strategy, mesh, top_k, factor=1.5, weight_on="output"):
    """Output and gradients on a mesh, compiled once for every load."""

    def run(x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD, experts_BLK):
        layer = functools.partial(through, Exchange(strategy, factor), weight_on)
        y_BLD, pull = jax.vjp(lambda *inputs: layer(*inputs, experts_BLK), x_BLD, weights_BLK, gate_up_EDPF, down_EFD)
        return y_BLD, *pull(dy_BLD)

    with jax.set_mesh(mesh_of(MESHES[mesh])):
        return jax.jit(run).lower(*draw("even", top_k)).compile()


def run_on(strategy, mesh, arguments, **how):
    top_k = arguments[-1].shape[-1]
    program = compiled(strategy, mesh, top_k, **how)
    return jax.device_get(
        program(*(jax.device_put(a, s) for a, s in zip(arguments, program.input_shardings[0], strict=True)))
    )


def expected_of(arguments):
    x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD, experts_BLK = arguments
    flat = [a.reshape(B * L, -1) for a in (x_BLD, weights_BLK, experts_BLK, dy_BLD)]
    y_TD, dx_TD, dweights_TK, *rest = oracle.feed_forward(flat[0], flat[1], gate_up_EDPF, down_EFD, flat[2], flat[3])
    return y_TD.reshape(x_BLD.shape), dx_TD.reshape(x_BLD.shape), dweights_TK.reshape(weights_BLK.shape), *rest


@pytest.mark.parametrize("load", ["even", "skewed", "one device", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "expert 1"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_and_all_gradients_are_those_of_the_loop(strategy, mesh, top_k, load):
    arguments = draw(load, top_k)
    for name, a, e in zip(NAMES, run_on(strategy, mesh, arguments), expected_of(arguments), strict=True):
        oracle.assert_close(a, e, err_msg=name)


@pytest.mark.parametrize("load", ["even", "one device"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_on_the_input_travel_with_the_tokens(strategy, load):
    arguments = draw(load, 2)
    actual = run_on(strategy, "data 2, expert 4", arguments, weight_on="input")
    for a, e in zip(actual, run_on("gather", "expert 1", arguments, weight_on="input"), strict=True):
        oracle.assert_close(a, e)


@pytest.mark.parametrize("factor", [0.01, 1.0, 1.5, 8.0])
@pytest.mark.parametrize("load", ["even", "one device"])
def test_buffers_too_small_for_the_load_drop_nothing(factor, load):
    arguments = draw(load, 2)
    actual = run_on("all_to_all", "data 2, expert 4", arguments, factor=factor)
    for name, a, e in zip(NAMES, actual, expected_of(arguments), strict=True):
        oracle.assert_close(a, e, err_msg=name)


# What travels -----------------------------------------------------------------------------------------------------


def collectives(text):
    """Of a compiled program: kinds and the bytes of their results on one device, in order of the text."""
    found = []
    for result, kind in re.findall(r" = (\(.*?\)|\S+) (all-to-all|all-gather|reduce-scatter|all-reduce)\(", text):
        shapes = re.findall(r"\b(?:f32|s32)\[([\d,]*)\]", result)
        found.append((kind, sum(4 * int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)))
    return found


def along_experts(text):
    """`collectives` but for the sum over `tensor`, of one device here, which XLA:CPU keeps."""
    return [(kind, size) for kind, size in collectives(text) if kind != "all-reduce"]


def forward_collectives(strategy, mesh, factor):
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        layer = functools.partial(through, Exchange(strategy, factor), "output")
        x_BLD, weights_BLK, gate_up_EDPF, down_EFD, _, experts_BLK = draw("even", 2)
        split, split_experts = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(MESH_AXES[:3])), jax.P("expert")
        weights = [
            jax.device_put(w, jax.NamedSharding(jax.sharding.get_mesh(), split_experts))
            for w in (gate_up_EDPF, down_EFD)
        ]
        arrays = [jax.device_put(a, split) for a in (x_BLD, weights_BLK, experts_BLK)]
        lowered = jax.jit(layer).lower(arrays[0], arrays[1], *weights, arrays[2])
        return along_experts(lowered.compile().as_text())


def test_all_to_all_moves_the_rows_of_its_buffers_twice_and_their_experts_once_and_no_weights():
    # 48 tokens of 4 devices twice: 12 choices each, and room for all of them in the buffer for each.
    slots = 12
    moved = forward_collectives("all_to_all", "data 2, expert 4", factor=4.0)
    assert sorted(moved) == sorted([("all-to-all", 4 * slots * D * 4)] * 2 + [("all-to-all", 4 * slots * 4)])


def test_gather_moves_weights_and_ring_tokens():
    weights = {E * D * 2 * F * 4, E * F * D * 4}
    moved = forward_collectives("gather", "data 2, expert 4", factor=1.5)
    assert {kind for kind, _ in moved} == {"all-gather"} and {size for _, size in moved} == weights
    moved = forward_collectives("ring", "data 2, expert 4", factor=1.5)
    of_four_devices = B * L // 2
    assert {kind for kind, _ in moved} == {"all-gather", "reduce-scatter"}
    assert ("all-gather", of_four_devices * D * 4) in moved and (
        "reduce-scatter",
        of_four_devices // 4 * D * 4,
    ) in moved
    assert not weights & {size for kind, size in moved if kind == "all-gather"}


def test_on_an_expert_axis_of_one_device_nothing_travels():
    for strategy in STRATEGIES:
        assert forward_collectives(strategy, "expert 1", factor=1.5) == []


def test_where_experts_choose_tokens_go_to_all_and_the_result_is_that_of_one_device():
    rng = np.random.default_rng(0)
    positions_BEC = np.stack([rng.permutation(L)[:3] for _ in range(B * E)]).reshape(B, E, 3).astype(np.int32)
    positions_BEC[0, 0, 2] = L  # an empty slot
    slots = Slots(jnp.asarray(positions_BEC), jnp.asarray(rng.normal(size=(B, E, 3)), jnp.float32))
    x_BLD, _, gate_up_EDPF, down_EFD, dy_BLD, _ = map(jnp.asarray, draw("even", 2))
    weights = ExpertWeights(gate_up_EDPF, down_EFD)

    def loss(how, x_BLD, slots, weights):
        return (exchange(how, Local(run_slots), None, x_BLD, slots, weights) * dy_BLD).sum()

    def gradients(strategy, sizes):
        with jax.set_mesh(mesh_of(sizes)):
            how = Exchange(strategy, 1.5)
            return jax.device_get(
                jax.jit(jax.grad(functools.partial(loss, how), (0, 1, 2), allow_int=True))(x_BLD, slots, weights)
            )

    one = gradients("gather", (1, 1, 1, 1, 1))
    many = gradients("all_to_all", (2, 1, 2, 2, 1))
    for a, e in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        if e.dtype == np.float32:
            oracle.assert_close(a, e)


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        (
            {"exchange": "all_to_all", "router": "soft", "allow_noncausal": True},
            ["moe.exchange=all_to_all", "use auto"],
        ),
        (
            {"exchange": "all_to_all", "router": "expert_choice", "allow_noncausal": True},
            ["moe.router=expert_choice", "ring"],
        ),
        ({"exchange": "teleport"}, ["moe.exchange", "all_to_all"]),
        ({"exchange_buffer": 0.0}, ["moe.exchange_buffer=0.0 must be above 0"]),
    ],
)
def test_an_exchange_that_cannot_be_is_an_error_that_names_the_remedy(leaves, words):
    with pytest.raises(ConfigError) as error:
        resolve({"moe": {"num_experts": 8, **leaves}})
    assert all(word in str(error.value) for word in words)


def test_auto_sends_choices_to_their_experts():
    assert {kind for kind, _ in forward_collectives("auto", "data 2, expert 4", 4.0)} == {"all-to-all"}
