"""Every way in which tokens meet experts on a mesh, against the loop over choices, with what
is sent counted.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import oracle
from cases.covering import covering, name_of
from moejax.config import ConfigError, resolve
from moejax.moe.dispatch.assignment import ExpertChoice, TokenChoice
from moejax.moe.dispatch.on_device import run_dropless, run_expert_choice
from moejax.moe.expert_parallel import ragged
from moejax.moe.expert_parallel.buffers import mean_receivers
from moejax.moe.expert_parallel.exchange import exchange
from moejax.moe.expert_parallel.strategy import LocalExperts, Strategy, choose_strategy
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import BATCH_AXES, EXPERT_AXES, MESH_AXES

B, L, D, F, E = 8, 6, 6, 4, 8
SENDING = ["all_to_all", "ragged", "dedup", "two_level"]
STRATEGIES = ["gather", "ring", *SENDING]
MESHES = {  # data, fsdp, dcn_expert, expert, context, tensor
    "expert 8": (1, 1, 1, 8, 1, 1),
    "data 2, expert 4": (2, 1, 1, 4, 1, 1),
    "data 2, expert 2, tensor 2": (2, 1, 1, 2, 1, 2),
    "fsdp 2, expert 2": (1, 2, 1, 2, 1, 1),
    "dcn 2, expert 4": (1, 1, 2, 4, 1, 1),
    "dcn 2, expert 2, tensor 2": (1, 1, 2, 2, 1, 2),
    "context 2, expert 4": (1, 1, 1, 4, 2, 1),
    "dcn 4, data 2": (2, 1, 4, 1, 1, 1),
    "expert 1": (1, 1, 1, 1, 1, 1),
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
    x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD = (
        rng.normal(size=s).astype(np.float32) for s in shapes
    )
    return x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD, choices_of(load, top_k, seed)


def mesh_of(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 6, devices=devices)


def through(how, weight_on, x_BLD, weights_BLK, gate_up_EDPF, down_EFD, experts_BLK):
    local = LocalExperts(functools.partial(run_dropless, implementation="auto"))
    ones_BLK = jnp.ones_like(weights_BLK)
    on_output = TokenChoice(experts_BLK, weights_BLK)
    chosen = on_output if weight_on == "output" else TokenChoice(experts_BLK, ones_BLK, weights_BLK)
    return exchange(how, local, local, x_BLD, chosen, ExpertWeights(gate_up_EDPF, down_EFD))[0]


@functools.cache
def compiled(strategy, mesh, top_k, factor=1.5, weight_on="output", chunks=1):
    """Output and gradients on a mesh, compiled once for every load."""

    def run(x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD, experts_BLK):
        layer = functools.partial(through, Strategy(strategy, factor, chunks), weight_on)
        y_BLD, pull = jax.vjp(
            lambda *inputs: layer(*inputs, experts_BLK), x_BLD, weights_BLK, gate_up_EDPF, down_EFD
        )
        return y_BLD, *pull(dy_BLD)

    sizes = MESHES[mesh] if isinstance(mesh, str) else mesh
    with jax.set_mesh(mesh_of(sizes)):
        return jax.jit(run).lower(*draw("even", top_k)).compile()


def run_on(strategy, mesh, arguments, **how):
    top_k = arguments[-1].shape[-1]
    program = compiled(strategy, mesh, top_k, **how)
    return jax.device_get(
        program(
            *(
                jax.device_put(a, s)
                for a, s in zip(arguments, program.input_shardings[0], strict=True)
            )
        )
    )


def expected_of(arguments):
    x_BLD, weights_BLK, gate_up_EDPF, down_EFD, dy_BLD, experts_BLK = arguments
    flat = [a.reshape(B * L, -1) for a in (x_BLD, weights_BLK, experts_BLK, dy_BLD)]
    y_TD, dx_TD, dweights_TK, *rest = oracle.feed_forward(
        flat[0], flat[1], gate_up_EDPF, down_EFD, flat[2], flat[3]
    )
    return (
        y_TD.reshape(x_BLD.shape),
        dx_TD.reshape(x_BLD.shape),
        dweights_TK.reshape(weights_BLK.shape),
        *rest,
    )


LOADS = ["even", "skewed", "one device", "masked"]
AXES = ["data", "fsdp", "dcn_expert", "context", "tensor"]  # `expert` has the rest of 8 devices
FACTORS = {
    "strategy": STRATEGIES,
    "top_k": [1, 8],  # two are in tests/training/test_invariance.py
    "factor": [1.5, 0.01],  # with 0.01 almost every choice is left over
    "chunks": [1, 2],
    "weight_on": ["output", "input"],
    **dict.fromkeys(AXES, (1, 2)),
}


def axes_beside_expert(case):
    return math.prod(case[axis] for axis in AXES)


def is_a_case_of_its_own(case):
    """Whether the devices suffice and no other case is the same program."""
    strategy = case["strategy"]
    has_buffers = strategy in SENDING or (case["factor"], case["chunks"]) == (1.5, 1)
    has_levels = strategy != "two_level" or case["dcn_expert"] == 2
    return axes_beside_expert(case) <= 4 and has_buffers and has_levels


@pytest.mark.parametrize("case", covering(FACTORS, is_a_case_of_its_own), ids=name_of)
def test_any_two_factors_together_leave_the_outputs_and_gradients_of_the_loop(case):
    data, fsdp, dcn_expert, context, tensor = (case[axis] for axis in AXES)
    mesh = (data, fsdp, dcn_expert, 8 // axes_beside_expert(case), context, tensor)
    how = {name: case[name] for name in ("factor", "chunks", "weight_on")}
    for load in LOADS:
        arguments = draw(load, case["top_k"])
        actual = run_on(case["strategy"], mesh, arguments, **how)
        if case["weight_on"] == "output":
            expected = expected_of(arguments)
        else:
            expected = run_on("gather", "expert 1", arguments, weight_on="input")
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            oracle.assert_close(a, e, err_msg=f"{name}, {load}")


# The full products, of which the cases above hold every pair.
BOTH_LEVELS = "dcn 2, expert 2, tensor 2"
CASES = [(mesh, 2) for mesh in MESHES if mesh != "expert 1"]
CASES += [(BOTH_LEVELS, top_k) for top_k in (1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("mesh", "top_k"), CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_and_all_gradients_are_those_of_the_loop(strategy, mesh, top_k, load):
    arguments = draw(load, top_k)
    for name, a, e in zip(
        NAMES, run_on(strategy, mesh, arguments), expected_of(arguments), strict=True
    ):
        oracle.assert_close(a, e, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("load", ["even", "one device"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_on_the_input_travel_with_the_tokens(strategy, load):
    arguments = draw(load, 2)
    actual = run_on(strategy, BOTH_LEVELS, arguments, weight_on="input")
    for a, e in zip(
        actual, run_on("gather", "expert 1", arguments, weight_on="input"), strict=True
    ):
        oracle.assert_close(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("load", ["even", "one device"])
@pytest.mark.parametrize("factor", [0.01, 8.0])
@pytest.mark.parametrize("strategy", SENDING)
def test_buffers_too_small_for_the_load_drop_nothing(strategy, factor, load):
    arguments = draw(load, 2)
    for name, a, e in zip(
        NAMES,
        run_on(strategy, BOTH_LEVELS, arguments, factor=factor),
        expected_of(arguments),
        strict=True,
    ):
        oracle.assert_close(a, e, err_msg=name)


@pytest.mark.parametrize(
    ("strategy", "mesh", "left"),
    [
        # 8 of the 12 choices of each of 8 devices find room on the first; of the 24 of each of 4,
        # of which `tensor` has two parts, 8; of the tokens that arrive at a group's two devices,
        # more than its first device has room for.
        ("all_to_all", "data 2, expert 4", 8 * (12 - 8)),
        ("all_to_all", BOTH_LEVELS, 4 * (24 - 8)),
        ("ragged", BOTH_LEVELS, 4 * 24 - 24),
        ("two_level", BOTH_LEVELS, None),
        ("ring", BOTH_LEVELS, 0),
    ],
)
def test_choices_without_room_are_counted(strategy, mesh, left):
    x_BLD, weights_BLK, gate_up_EDPF, down_EFD, _, experts_BLK = map(
        jnp.asarray, draw("one device", 2)
    )
    local, weights = (
        LocalExperts(functools.partial(run_dropless, implementation="auto")),
        ExpertWeights(gate_up_EDPF, down_EFD),
    )
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        run = jax.jit(
            lambda *a: exchange(
                Strategy(strategy, 1.0), local, local, a[0], TokenChoice(*a[1:]), weights
            )[1]
        )
        counted = float(run(x_BLD, experts_BLK, weights_BLK))
        none = run(x_BLD, jnp.full_like(experts_BLK, E), weights_BLK)
    assert counted == left if left is not None else 0 < counted < B * L * 2
    assert float(none) == 0


@pytest.mark.slow
@pytest.mark.parametrize("load", ["skewed", "masked"])
@pytest.mark.parametrize("strategy", SENDING)
def test_chunks_change_nothing(strategy, load):
    arguments = draw(load, 2)
    actual = run_on(strategy, BOTH_LEVELS, arguments, chunks=2)
    for name, a, e in zip(NAMES, actual, expected_of(arguments), strict=True):
        oracle.assert_close(a, e, err_msg=name)


# All-to-all traffic
# --------------------------------------------------------------------------------------------------


def collectives(text):
    """Of a compiled program: kinds and the bytes of their results on one device, in order of the
    text.
    """
    found = []
    for result, kind in re.findall(
        r" = (\(.*?\)|\S+) (all-to-all|all-gather|reduce-scatter|all-reduce)\(", text
    ):
        shapes = re.findall(r"\b(?:f32|s32)\[([\d,]*)\]", result)
        found.append(
            (kind, sum(4 * math.prod(int(n) for n in shape.split(",") if n) for shape in shapes))
        )
    return found


@functools.cache
def forward(strategy, mesh, top_k=2, factor=1.5, tokens=B * L, d_model=D, num_experts=E):
    """All-to-all traffic of a forward pass without buffer overflow; sums over devices, of counts
    and of outputs, do not count.
    """
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        layer = functools.partial(through, Strategy(strategy, factor), "output")
        batch, experts = jax.P(BATCH_AXES), jax.P(EXPERT_AXES, "fsdp")
        sizes = (B, tokens // B)
        kinds = [
            ((*sizes, d_model), batch),
            ((*sizes, top_k), batch),
            ((num_experts, d_model, 2, F), experts),
            ((num_experts, F, d_model), jax.P(EXPERT_AXES, None, "fsdp")),
        ]
        mesh = jax.sharding.get_mesh()
        arrays = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=jax.NamedSharding(mesh, p))
            for s, p in kinds
        ]
        choices = jax.ShapeDtypeStruct(
            (*sizes, top_k), jnp.int32, sharding=jax.NamedSharding(mesh, batch)
        )
        text = jax.jit(layer).lower(*arrays, choices).compile().as_text()
    return tuple((kind, size) for kind, size in collectives(text) if kind != "all-reduce")


# A device's share of rows: with E 64, K 8, n 8 each token has experts on 5.44 of the devices;
# rows of 2 KiB.
LARGE = {"top_k": 8, "tokens": 4096, "d_model": 512, "num_experts": 64}


@pytest.mark.parametrize(
    ("strategy", "rows"), [("all_to_all", 8), ("dedup", mean_receivers(64, 8, 8))]
)
def test_a_token_sends_no_more_than_its_rows_times_the_buffer_factor_in_each_of_two_ways(
    strategy, rows
):
    for factor in (1.0, 1.5):
        moved = forward(strategy, "expert 8", factor=factor, **LARGE)
        assert {kind for kind, _ in moved} == {"all-to-all"}, "weights stay where they are"
        per_token = sum(size for _, size in moved) / (LARGE["tokens"] // 8)
        assert 0.95 < per_token / (2 * factor * rows * LARGE["d_model"] * 4) < 1.05


def test_a_token_that_is_sent_once_to_each_device_moves_a_third_less():
    once, each = (
        sum(size for _, size in forward(how, "expert 8", **LARGE))
        for how in ("dedup", "all_to_all")
    )
    assert 0.66 < once / each < 0.70


def test_between_groups_a_token_travels_once_to_each_group():
    moved = forward("two_level", "dcn 2, expert 4", factor=1.0, **LARGE)
    rows = sorted(size / (LARGE["tokens"] // 8) / LARGE["d_model"] / 4 for _, size in moved)[-4:]
    # Two ways between groups, where every token has an expert in both, and two within for each
    # device it visits.
    assert (
        rows[:2] == [pytest.approx(2, rel=0.03)] * 2
        and rows[2:] == [pytest.approx(5.44, rel=0.03)] * 2
    )


def test_gather_moves_weights_and_ring_tokens():
    weights = {E * D * 2 * F * 4, E * F * D * 4}
    moved = forward("gather", "data 2, expert 4")
    assert {kind for kind, _ in moved} == {"all-gather"} and {size for _, size in moved} == weights
    moved = forward("ring", "data 2, expert 4")
    of_four_devices = B * L // 2
    assert {kind for kind, _ in moved} == {"all-gather", "reduce-scatter"}
    assert ("all-gather", of_four_devices * D * 4) in moved
    assert ("reduce-scatter", of_four_devices // 4 * D * 4) in moved
    assert not weights & {size for kind, size in moved if kind == "all-gather"}


def test_on_axes_of_one_device_for_all_experts_nothing_travels():
    for strategy in STRATEGIES:
        assert forward(strategy, "expert 1") == ()


def test_gradients_of_weights_gathered_over_fsdp_are_reduce_scattered():
    found = collectives(compiled("dedup", "fsdp 2, expert 2", 2).as_text())
    own = [E // 2 * D // 2 * 2 * F * 4, E // 2 * F * D // 2 * 4]
    assert sorted(size for kind, size in found if kind == "reduce-scatter") == sorted(own)
    assert [size for kind, size in found if kind == "all-gather"].count(
        2 * own[0]
    ) == 1  # not again, backward
    assert 2 * own[0] not in [size for kind, size in found if kind == "all-reduce"]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_where_the_platform_has_a_ragged_exchange_it_is_used_with_the_same_offsets_there_and_back(
    platform, monkeypatch
):
    monkeypatch.setattr(ragged, "platform", lambda: platform)
    arguments = draw("even", 2)

    def loss(*arguments):
        return through(Strategy("ragged"), "output", *arguments).sum()

    with jax.set_mesh(mesh_of(MESHES["dcn 2, expert 4"])):
        lowered = (
            jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
            .trace(*arguments[:4], arguments[5])
            .lower(lowering_platforms=(platform,))
        )
    # Forward tokens, their weights and ids, and outputs; backward the gradients of outputs, tokens
    # and weights.
    assert lowered.as_text().count("@ragged_all_to_all") == 7


def test_where_experts_choose_tokens_go_to_all_and_the_result_is_that_of_one_device():
    rng = np.random.default_rng(0)
    positions_BEC = (
        np.stack([rng.permutation(L)[:3] for _ in range(B * E)]).reshape(B, E, 3).astype(np.int32)
    )
    positions_BEC[0, 0, 2] = L  # an empty slot
    slots = ExpertChoice(
        jnp.asarray(positions_BEC), jnp.asarray(rng.normal(size=(B, E, 3)), jnp.float32)
    )
    x_BLD, _, gate_up_EDPF, down_EFD, dy_BLD, _ = map(jnp.asarray, draw("even", 2))
    weights = ExpertWeights(gate_up_EDPF, down_EFD)

    def loss(how, x_BLD, slots, weights):
        return (
            exchange(how, LocalExperts(run_expert_choice), None, x_BLD, slots, weights)[0] * dy_BLD
        ).sum()

    def gradients(strategy, sizes):
        with jax.set_mesh(mesh_of(sizes)):
            how = Strategy(strategy, 1.5)
            return jax.device_get(
                jax.jit(jax.grad(functools.partial(loss, how), (0, 1, 2), allow_int=True))(
                    x_BLD, slots, weights
                )
            )

    one = gradients("gather", (1, 1, 1, 1, 1, 1))
    many = gradients("all_to_all", (2, 1, 2, 2, 1, 1))
    for a, e in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        if e.dtype == np.float32:
            oracle.assert_close(a, e)


# Options
# --------------------------------------------------------------------------------------------------


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
        (
            {"exchange": "dedup", "router": "soft", "allow_noncausal": True},
            ["moe.exchange=dedup", "use auto or ring"],
        ),
        ({"exchange_chunks": 0}, ["moe.exchange_chunks=0 must be at least 1"]),
        ({"exchange_buffer": 0.0}, ["moe.exchange_buffer=0.0 must be above 0"]),
    ],
)
def test_an_exchange_that_cannot_be_is_an_error_that_names_the_remedy(leaves, words):
    with pytest.raises(ConfigError) as error:
        resolve({"moe": {"num_experts": 8, **leaves}})
    assert all(word in str(error.value) for word in words)


def test_auto_sends_a_token_once_where_that_is_less_and_once_to_each_group_where_there_are_groups():
    def chosen(slow, fast, num_experts, top_k):
        return choose_strategy(Strategy("auto"), slow, fast, num_experts, top_k)

    assert chosen(1, 1, 8, 2) == "gather"
    assert chosen(1, 4, 8, 2) == "dedup"  # 1.71 rows instead of 2
    assert chosen(1, 8, 64, 8) == "dedup"  # 5.43 rows instead of 8
    assert chosen(1, 64, 64, 8) == "all_to_all"  # one expert on each device: nothing to send once
    assert chosen(4, 8, 64, 8) == "two_level"
    assert chosen(4, 1, 64, 1) == "all_to_all"
    assert chosen(1, 8, 64, 0) == chosen(4, 8, 64, 0) == "ring"  # experts choose


def test_without_two_levels_two_level_sends_once_to_each_device():
    assert [
        choose_strategy(Strategy("two_level"), *sizes, 8, 2) for sizes in ((1, 4), (4, 1), (2, 2))
    ] == [
        "dedup",
        "dedup",
        "two_level",
    ]
