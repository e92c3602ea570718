"""The maths does not depend on the machine: mesh, accumulation, remat, scan and dispatch give the
same step.
"""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from cases import training as cases
from cases.training import case_config, initial_state, make, packed_batch
from moejax.config import Config, Knobs
from moejax.kernels import cross_entropy
from moejax.moe.expert_parallel.buffers import mean_receivers, room_for
from moejax.moe.expert_parallel.exchange import STRATEGIES
from moejax.sharding import MESH_AXES
from moejax.training.accumulation import loss_and_gradients
from moejax.training.losses import forward_sums, losses
from moejax.training.step import make_train_step, put_batch, row_keys

TOLERANCE = 1e-5


def small_config(**sections) -> Config:
    """The small configuration with a z-loss of the logits."""
    train = {"logit_z_weight": 1e-2} | sections.pop("train", {})
    return cases.small_config(train=train, **sections)


@dataclasses.dataclass
class Outcome:
    """What must not change: losses, gradients and routing sums of a batch; updates and metrics of
    two steps.
    """

    losses: dict
    grads: list
    routing: list
    updates: np.ndarray | None = None
    scalars: dict | None = None


def run(config: Config, num_devices: int = 1, num_steps: int = 0) -> Outcome:
    setup = make(config, num_devices)
    batch = put_batch(packed_batch(config), setup)
    knobs = Knobs.from_config(config)
    with jax.set_mesh(setup.mesh):
        state = initial_state(setup)

        @jax.jit
        def gradients(params, batch):
            keys_B = row_keys(config, knobs, state.step, config.train.batch_size)
            grads, sums = loss_and_gradients(
                setup, params, state.router_state, batch, knobs, keys_B
            )
            parts = losses(sums, knobs, config)
            parts["dropped"] = sum(stats.dropped.sum() for stats in sums.routing)
            return grads, sums, parts

        grads, sums, parts = jax.device_get(gradients(state.params, batch))
        # How many choices a buffer has no room for depends on how the mesh cuts the tokens; the
        # results do not.
        routing = [dataclasses.replace(stats, buffer_overflow=0.0) for stats in sums.routing]
        outcome = Outcome(parts, jax.tree.leaves(grads), jax.tree.leaves(routing))
        if num_steps:
            before, step = flat(state.params), make_train_step(setup)
            for _ in range(num_steps):
                state, output = step(state, batch, knobs)
            outcome.updates, outcome.scalars = (
                flat(state.params) - before,
                jax.device_get(output.scalars),
            )
            outcome.scalars.pop("moe/buffer_overflow", None)
    return outcome


def flat(tree) -> np.ndarray:
    return np.concatenate([x.ravel() for x in jax.device_get(jax.tree.leaves(tree))])


def assert_same(actual: Outcome, expected: Outcome) -> None:
    for key, value in expected.losses.items():
        # Some losses are squares of what rounding left of 0.
        np.testing.assert_allclose(
            actual.losses[key], value, rtol=TOLERANCE, atol=1e-12, err_msg=key
        )
    for name in ("grads", "routing"):
        for a, e in zip(getattr(actual, name), getattr(expected, name), strict=True):
            # Relative to the array's scale: single entries of a gradient may cancel to almost zero.
            np.testing.assert_allclose(
                a, e, rtol=0, atol=TOLERANCE * max(np.abs(e).max(), 1e-6), err_msg=name
            )
    if actual.updates is not None:
        # Adam divides by the gradient's own size and so enlarges rounding where a gradient is
        # almost zero.
        assert np.linalg.norm(actual.updates - expected.updates) < 1e-3 * np.linalg.norm(
            expected.updates
        )
        for key, value in expected.scalars.items():
            np.testing.assert_allclose(
                actual.scalars[key], value, rtol=1e-3, atol=1e-6, err_msg=key
            )


@pytest.fixture(scope="module")
def moe() -> Outcome:
    return run(small_config(), num_steps=2)


@pytest.fixture(scope="module")
def dense() -> Outcome:
    return run(small_config(moe={"num_experts": 0}))


def test_a_moe_layer_without_loss_terms_is_an_error_while_tracing():
    config = small_config()
    setup = make(config)
    sums = jax.eval_shape(
        lambda params, state, batch: forward_sums(nnx.merge(setup.graphdef, params, state), batch),
        setup.abstract.params, setup.abstract.router_state, packed_batch(config),
    )  # fmt: skip
    one_layer = dataclasses.replace(
        sums,
        routing=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), sums.routing
        ),
    )
    for bad, reported in ((one_layer, 1), (dataclasses.replace(sums, routing=()), 0)):
        with pytest.raises(
            ValueError, match=rf"{reported} layers reported routing, and the model has 2 MoE layers"
        ):
            jax.eval_shape(lambda sums: losses(sums, Knobs.from_config(config), config), bad)


def test_the_reference_step_is_not_trivial(moe):
    assert moe.losses["loss/balance"] > 1.0
    assert moe.scalars["grad_norm"] > 0
    assert all(np.abs(g).max() > 0 for g in moe.grads)


WAYS = [  # of `exchange`: accumulation, remat and scan_layers, and the axes of the mesh
    ("gather", (2, True, False), {"data": 2, "expert": 2, "tensor": 2}),
    ("ring", (1, False, False), {"data": 2, "fsdp": 2, "expert": 2}),
    ("all_to_all", (1, True, True), {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("ragged", (1, True, True), {"dcn_data": 2, "dcn_fsdp": 2, "expert": 2}),
    ("dedup", (2, False, True), {"fsdp": 2, "expert": 2, "context": 2}),
    ("two_level", (1, True, True), {"dcn_expert": 2, "expert": 2, "context": 2}),
]
"""Every exchange, axis and value of another factor once, and every two values of accumulation
(whether or not), remat and scan together; the long suite has the products."""


def test_the_ways_hold_every_pair():
    assert {exchange for exchange, _, _ in WAYS} == STRATEGIES.keys()
    axes = {axis for _, _, mesh in WAYS for axis in mesh}
    assert axes == {"dcn_data", "dcn_fsdp", *MESH_AXES}
    switches = [(accumulation > 1, remat, scan) for _, (accumulation, remat, scan), _ in WAYS]
    for a, b in itertools.combinations(range(3), 2):
        assert len({(switch[a], switch[b]) for switch in switches}) == 4


@pytest.mark.parametrize(("exchange", "switches", "mesh"), WAYS, ids=str)
def test_nothing_of_how_a_step_is_computed_changes_it(moe, exchange, switches, mesh):
    accumulation, remat, scan_layers = switches
    config = small_config(
        moe={"exchange": exchange, "exchange_buffer": 1.25},
        mesh={"data": 1} | mesh,
        train={"accumulation": accumulation},
        model={"remat": remat, "scan_layers": scan_layers},
    )
    num_devices = int(np.prod(list(mesh.values())))
    assert_same(run(config, num_devices, num_steps=2 if exchange == "ring" else 0), moe)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_large_batch(moe, accumulation):
    assert_same(run(small_config(train={"accumulation": accumulation})), moe)


@pytest.mark.slow
def test_accumulation_equals_the_large_batch_for_a_dense_model(dense):
    assert_same(run(small_config(train={"accumulation": 4}, moe={"num_experts": 0})), dense)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2},
        {"data": 8},
        {"data": 1, "fsdp": 2},
        {"data": 1, "fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 2, "fsdp": 1, "expert": 4},
        {"data": 1, "dcn_data": 2, "fsdp": 1, "dcn_fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 1, "expert": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_the_mesh_changes_nothing(moe, mesh):
    assert_same(run(small_config(mesh=mesh), int(np.prod(list(mesh.values())))), moe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["gather", "ring", "all_to_all", "ragged", "dedup", "two_level"]
)
def test_how_tokens_meet_experts_changes_nothing(moe, strategy):
    mesh = {"data": 1, "fsdp": 2, "expert": 2, "dcn_expert": 2}
    how = {"exchange": strategy, "exchange_buffer": 1.25, "exchange_chunks": 2}
    assert_same(run(small_config(moe=how, mesh=mesh), 8), moe)


MESHES = [
    {"data": 2, "expert": 1},
    {"data": 1, "expert": 2},
    {"data": 1, "expert": 8},
    {"data": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
    {"data": 1, "fsdp": 4, "expert": 2},
    {"data": 1, "dcn_expert": 2, "expert": 4},
    {"data": 1, "dcn_data": 2, "dcn_expert": 2, "expert": 2},
    {"data": 1, "context": 2, "expert": 4},
    {"data": 1, "dcn_expert": 2, "context": 2, "expert": 2},
]


@pytest.fixture(scope="module")
def eight_experts() -> Outcome:
    return run(small_config(moe={"num_experts": 8, "selection_bias": True}), num_steps=2)


def is_another_program(strategy, mesh):
    """Whether nothing else is chosen in the strategy's place on this mesh."""
    if strategy == "two_level":
        return mesh.get("dcn_expert", 1) > 1
    return strategy == "gather" or mesh["expert"] > 1


PRODUCT = list(itertools.product(STRATEGIES, MESHES))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "mesh"), [case for case in PRODUCT if is_another_program(*case)], ids=str
)
def test_two_steps_are_the_same_on_every_mesh_however_tokens_meet_experts(
    eight_experts, strategy, mesh
):
    moe = {"num_experts": 8, "selection_bias": True, "exchange": strategy, "exchange_buffer": 1.25}
    assert_same(
        run(small_config(moe=moe, mesh=mesh), int(np.prod(list(mesh.values()))), num_steps=2),
        eight_experts,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("saves", "ways"), [(True, 4), (False, 5)])
def test_remat_sends_no_token_twice_if_what_arrived_is_saved(saves, ways):
    config = small_config(
        moe={"exchange": "dedup", "save_exchanged": saves}, mesh={"data": 1, "expert": 2}
    )
    setup = make(config, 2)
    batch = put_batch(packed_batch(config), setup)
    with jax.set_mesh(setup.mesh):
        lowered = make_train_step(setup).lower(setup.abstract, batch, Knobs.from_config(config))
    text = lowered.compile().as_text()
    rows = [int(rows) for rows in re.findall(r"f32\[1,(\d+),32\]\S*\) all-to-all\(", text)]
    tokens, receivers = 8 * 16 / 2, mean_receivers(4, 2, 2)
    # There and back in each of two directions, and perhaps once more to compute again: half of a
    # buffer to each device.
    assert rows == [room_for(tokens * receivers / 2, 1.5, int(tokens))] * ways
    gathered = set(re.findall(r" = f32\[([\d,]+)\]\S* all-gather\(", text))
    assert not gathered & {"4,32,2,16", "4,32,32", "4,16,32"}, "expert weights stay where they are"


def test_a_step_on_one_device_sends_nothing_not_even_to_itself():
    config = small_config()
    setup = make(config, 1)
    batch = put_batch(packed_batch(config), setup)
    with jax.set_mesh(setup.mesh):
        lowered = make_train_step(setup).lower(setup.abstract, batch, Knobs.from_config(config))
    sent = re.findall(
        r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)",
        lowered.compile().as_text(),
    )
    assert not sent


@pytest.mark.slow
def test_mesh_and_accumulation_together_change_nothing(moe):
    assert_same(
        run(small_config(mesh={"data": 2, "fsdp": 2}, train={"accumulation": 2}), 4, num_steps=2),
        moe,
    )


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1, "expert": 2, "context": 2},
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_mesh_changes_nothing_for_capacity_dispatch(mesh):
    capacity = {"dispatch": "capacity", "capacity_factor": 1.0}
    one = run(small_config(moe=capacity))
    assert one.losses["dropped"] > 0
    moe = capacity | {"exchange": "gather"}  # a device plans the slots of its own sequences
    assert_same(run(small_config(moe=moe, mesh=mesh), int(np.prod(list(mesh.values())))), one)


@pytest.mark.slow
def test_the_mesh_changes_nothing_for_a_pattern_of_layers_with_shared_experts():
    sections = {
        "model": {"num_layers": 3},
        "moe": {"every": 2, "first_dense": 1, "num_shared_experts": 1},
    }
    one = run(small_config(**sections))
    assert_same(run(small_config(**sections, mesh={"data": 2, "tensor": 2}), 4), one)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["attention", "positions by layer"])
def test_splitting_sequences_changes_nothing_where_layers_differ_in_what_they_see(case):
    mesh = {"data": 2, "context": 2, "tensor": 2}
    assert_same(run(case_config(case, mesh=mesh), 8), run(case_config(case, mesh={"data": 1})))


@pytest.mark.slow
def test_remat_changes_nothing(moe):
    assert_same(run(small_config(model={"remat": False})), moe)


@pytest.mark.slow
def test_unrolling_the_scan_changes_nothing(moe):
    assert_same(run(small_config(model={"scan_layers": False})), moe)


@pytest.mark.parametrize(
    "implementation",
    ["ragged", *(pytest.param(name, marks=pytest.mark.slow) for name in ("padded", "dense"))],
)
def test_the_grouped_product_changes_nothing(moe, implementation):
    assert_same(run(small_config(moe={"grouped_matmul": implementation})), moe)


def test_capacity_dispatch_with_room_for_all_equals_dropless(moe):
    # A factor of E / K gives every expert as many slots as the sequence has tokens.
    assert_same(run(small_config(moe={"dispatch": "capacity", "capacity_factor": 2.0})), moe)


@pytest.mark.slow
def test_what_a_device_holds_during_a_step_falls_as_the_number_of_devices(monkeypatch):
    # Attention in one form: where sequences are split all scores are computed, and on one CPU
    # half of them.
    monkeypatch.setattr("moejax.nn.attention.attend.platform", lambda: "other than cpu")

    def temporary_bytes(num_devices, mesh):
        config = small_config(
            moe={"num_experts": 8, "exchange": "dedup"}, mesh=mesh, data={"seq_len": 256}
        )
        setup = make(config, num_devices)
        with jax.set_mesh(setup.mesh):
            batch = put_batch(packed_batch(config), setup)
            lowered = make_train_step(setup).lower(setup.abstract, batch, Knobs.from_config(config))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one = temporary_bytes(1, {"data": 1})
    assert temporary_bytes(8, {"data": 1, "fsdp": 2, "expert": 2, "context": 2}) < one / 8 * 1.25


@pytest.mark.parametrize(
    ("num_devices", "mesh"),
    [
        (1, {}),
        (8, {"data": 2, "context": 2, "tensor": 2}),
        (8, {"data": 1, "fsdp": 2, "expert": 2, "context": 2}),
    ],
    ids=str,
)
def test_a_loss_of_chunks_of_positions_changes_nothing(moe, monkeypatch, num_devices, mesh):
    # 8 rows of 16 positions and 259 ids: 3 positions of the rows of one device, and then padding.
    monkeypatch.setattr(cross_entropy, "LARGEST_CHUNK", 3 * 8 * 259 // num_devices)
    assert_same(run(small_config(mesh=mesh), num_devices), dataclasses.replace(moe, updates=None))


def test_a_step_never_holds_the_logits_of_all_tokens():
    def compiled(vocab_size):
        config = small_config(
            model={"d_model": 64, "d_ff": 512, "num_layers": 4},
            data={"seq_len": 256, "tokenizer": "bpe", "vocab_size": vocab_size},
            train={"batch_size": 16},
        )
        setup = make(config)
        batch = packed_batch(config)
        with jax.set_mesh(setup.mesh):
            lowered = make_train_step(setup).lower(setup.abstract, batch, Knobs.from_config(config))
        memory = lowered.compile().memory_analysis()
        embedding = 4 * vocab_size * config.model.d_model
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes, embedding

    small, _ = compiled(2_048)
    large, embedding = compiled(32_000)
    # A parameter, its gradient, and two moments.
    assert large < 1.3 * small + 4 * embedding


def test_initial_weights_do_not_depend_on_the_mesh():
    one = make(small_config()).init(3)
    eight = make(small_config(mesh={"data": 2, "fsdp": 2, "tensor": 2}), 8).init(3)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        # The random bits are the same; turning them into normal numbers may round differently in
        # another program.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_weights_and_moments_are_split_over_fsdp_and_tensor():
    setup = make(small_config(mesh={"data": 2, "fsdp": 2, "tensor": 2}), 8)
    state = setup.init(0)
    gate_up = state.params.stacks[0].block.ffn.experts.gate_up
    piece = gate_up[...].addressable_shards[0].data.shape
    assert piece == (2, 4, 16, 2, 8)  # layers, experts, D / fsdp, gate and up, F / tensor
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == gate_up.shape]
    assert len(moments) == 2
    assert all(x.addressable_shards[0].data.shape == piece for x in moments)


def test_knobs_change_the_loss_without_a_new_compilation():
    config = small_config()
    setup = make(config)
    batch = put_batch(packed_batch(config), setup)
    step = make_train_step(setup)
    totals = []
    with jax.set_mesh(setup.mesh):
        for weight in (0.0, 0.5):
            knobs = dataclasses.replace(
                Knobs.from_config(config), balance_weight=jax.numpy.float32(weight)
            )
            _, output = step(initial_state(setup), batch, knobs)
            totals.append(output.scalars)
    assert step._cache_size() == 1
    assert totals[0]["loss/balance_weighted"] == 0
    np.testing.assert_allclose(totals[0]["loss/lm"], totals[1]["loss/lm"], rtol=1e-6)
    np.testing.assert_allclose(
        totals[1]["loss/total"] - totals[0]["loss/total"],
        0.5 * config.num_moe_layers * totals[1]["loss/balance"],
        rtol=1e-4,
    )


def test_the_z_loss_of_logits_is_the_mean_square_of_their_log_sum_exps():
    config = small_config()
    setup = make(config)
    state = initial_state(setup)
    batch = put_batch(packed_batch(config), setup)
    model = nnx.merge(setup.graphdef, state.params, state.router_state)
    hidden_BLD, _ = model(batch.tokens_BL, batch.segments_BL, batch.positions_BL)
    logits_BLV = np.asarray(model.logits(hidden_BLD), np.float64)
    log_z_BL = np.log(np.exp(logits_BLV).sum(-1))
    expected = np.square(log_z_BL)[np.asarray(batch.loss_mask_BL)].mean()
    sums = forward_sums(model, batch)
    for weight in (0.0, 0.3):
        knobs = dataclasses.replace(Knobs.from_config(config), logit_z_weight=np.float32(weight))
        found = losses(sums, knobs, config)
        np.testing.assert_allclose(found["loss/logit_z"], expected, rtol=1e-5)
        others = found["loss/lm"] + found["loss/balance_weighted"] + found["loss/z_weighted"]
        np.testing.assert_allclose(found["loss/total"], others + weight * expected, rtol=1e-5)


def test_the_learning_rate_knob_scales_the_step():
    config = small_config(optimizer={"weight_decay": 0.0})
    setup = make(config)
    batch = put_batch(packed_batch(config), setup)
    step = make_train_step(setup)
    with jax.set_mesh(setup.mesh):
        before = jax.device_get(jax.tree.leaves(initial_state(setup).params))
        moved = []
        for rate in (0.0, 1e-3, 2e-3):
            knobs = dataclasses.replace(
                Knobs.from_config(config), learning_rate=jax.numpy.float32(rate)
            )
            state, _ = step(initial_state(setup), batch, knobs)
            moved.append(
                [
                    a - b
                    for a, b in zip(
                        jax.device_get(jax.tree.leaves(state.params)), before, strict=True
                    )
                ]
            )
    for none, once, twice in zip(*moved, strict=True):
        assert np.abs(none).max() == 0
        np.testing.assert_allclose(twice, 2 * once, atol=1e-6)
