"""Other places for experts, and copies of them: more even loads, and the same model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.training import packed_batch, small_config
from moejax.models import Decoder
from moejax.models.placement import place_experts
from moejax.moe.expert_parallel.placement import (
    PlacementError,
    Replicas,
    identity_placement,
    imbalance,
    place,
    place_by_load,
)
from moejax.moe.overrides import AS_TRAINED
from moejax.sharding import make_mesh


def loads(seed, num_layers=3, num_experts=8):
    return (
        np.random.default_rng(seed)
        .dirichlet(np.full(num_experts, 0.5), num_layers)
        .astype(np.float32)
    )


@pytest.mark.parametrize("replicas", [0, 1, 3])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_every_expert_has_a_slot_and_no_copy_that_helps_is_twice_on_one_device(
    num_devices, replicas
):
    if num_devices == 1 and replicas:
        with pytest.raises(PlacementError, match="replicas on a device must be between 0 and 0"):
            place(loads(0), 1, replicas)
        return
    for seed in range(10):
        load_NE = loads(seed)
        experts_NP = place(load_NE, num_devices, replicas)
        assert experts_NP.shape == (3, 8 + num_devices * replicas)
        bare_N = imbalance(load_NE, place(load_NE, num_devices), num_devices)
        for layer, experts_nS in enumerate(experts_NP.reshape(3, num_devices, -1)):
            assert set(experts_nS.ravel().tolist()) == set(range(8))
            is_bare = imbalance(load_NE, experts_NP, num_devices)[layer] == pytest.approx(
                bare_N[layer]
            )
            assert is_bare or all(
                len(set(experts_S)) == len(experts_S) for experts_S in experts_nS.tolist()
            )


def test_an_even_layer_stays_as_it_is_and_copies_never_make_one_worse():
    even_NE = np.array([[1.0, 1, 1, 1, 1, 1, 1, 1], [5, 1, 4, 2, 3, 3, 2, 4.01]])
    for replicas in (0, 1, 3):
        of_devices = place(even_NE, 4, replicas).reshape(2, 4, -1)
        for experts_nS in of_devices.tolist():
            assert [sorted(set(experts_S)) for experts_S in experts_nS] == [
                [0, 1],
                [2, 3],
                [4, 5],
                [6, 7],
            ]
    worse = 0
    for seed in range(200):
        load_NE = np.random.default_rng(seed).dirichlet(np.full(8, 20.0), 3)
        bare_N = imbalance(load_NE, place(load_NE, 4), 4)
        worse += (imbalance(load_NE, place_by_load(load_NE, 4, 1), 4) > bare_N + 1e-6).sum()
        assert (imbalance(load_NE, place(load_NE, 4, 1), 4) <= bare_N + 1e-9).all()
    assert worse > 20  # by load alone copies are often worse than none


def test_without_copies_the_greedy_places_are_close_to_the_best_of_all():
    best_of_all = []
    for seed in range(30):
        load_NE = loads(seed, num_layers=1, num_experts=6)
        ways = {tuple(sorted((way[:3], way[3:]))) for way in itertools.permutations(range(6))}
        best = min(imbalance(load_NE, np.array([[*a, *b]]), 2)[0] for a, b in ways)
        found = imbalance(load_NE, place(load_NE, 2), 2)[0]
        assert (
            best <= found + 1e-9
            and found <= imbalance(load_NE, identity_placement(1, 6), 2)[0] + 1e-9
        )
        best_of_all.append(found / best)
    assert np.mean(best_of_all) < 1.05


def test_imbalance_is_the_largest_load_over_the_mean_and_copies_share_their_load():
    load_NE = np.array([[6.0, 2, 2, 2], [0, 0, 0, 0]])
    np.testing.assert_allclose(imbalance(load_NE, identity_placement(2, 4), 2), [8 / 6, 0])
    experts_NP = np.array([[0, 1, 0, 2, 3, 1]] * 2)
    np.testing.assert_allclose(imbalance(load_NE, experts_NP, 2), [(3 + 1 + 3) / 6, 0])


def test_copies_of_hot_experts_make_even_what_no_order_could():
    load_NE = np.array([[12.0, 1, 1, 2]])
    assert imbalance(load_NE, place(load_NE, 2), 2)[0] > 1.6
    experts_NP = place(load_NE, 2, replicas=1)
    assert np.bincount(experts_NP[0]).tolist()[0] == 2
    assert imbalance(load_NE, experts_NP, 2)[0] < 1.2


def test_slots_of_an_expert_are_listed_and_one_without_is_an_error():
    copies = Replicas.from_placement(np.array([[1, 0, 1, 2, 1]]), 3)
    assert copies.num_E.tolist() == [[1, 3, 1]]
    assert copies.slots_EM.tolist() == [[[1, 1, 1], [0, 2, 4], [3, 3, 3]]]
    for experts_P in ([0, 0, 1], [0, 1, 3], [0, 1, 2, 3]):
        with pytest.raises(PlacementError, match="every one of 3 experts, and no other"):
            Replicas.from_placement(np.array([experts_P]), 3)
    with pytest.raises(PlacementError, match="every one of 3 experts"):
        Replicas.from_placement(np.array([[0, 1, 2], [0, 1, 3]]), 3)


def test_experts_that_do_not_divide_are_an_error():
    with pytest.raises(PlacementError, match="8 experts do not divide over 3 devices"):
        place(loads(0), 3)


RICH = "every other layer, shared and zero-computation experts, biases"
CASES = {
    "plain": ({}, {}),
    RICH: (
        {
            "every": 2,
            "num_shared_experts": 1,
            "num_zero_experts": 1,
            "num_constant_experts": 1,
            "expert_bias": True,
        },
        {"num_layers": 4},
    ),
}


MESH = {"data": 2, "expert": 2, "dcn_expert": 2}


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("plain", MESH),
        (RICH, {}),
        pytest.param("plain", {}, marks=pytest.mark.slow),
        pytest.param(RICH, MESH, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_with_other_places_and_copies_is_the_same_model(case, mesh):
    moe, model_leaves = CASES[case]
    config = small_config(moe={"num_experts": 8, **moe}, model=model_leaves, mesh=mesh)
    batch = jax.tree.map(jnp.asarray, packed_batch(config))

    def logits(model, overrides=AS_TRAINED):
        graphdef, state = nnx.split(model)

        def run(state, batch, overrides):
            y, stats = nnx.merge(graphdef, state)(
                batch.tokens_BL, batch.segments_BL, batch.positions_BL, overrides=overrides
            )
            return y, [group.assignments_E for group in stats]

        return jax.jit(run)(state, batch, overrides)

    model = Decoder(config, rngs=nnx.Rngs(params=0))
    expected = logits(model)
    placed, overrides = place_experts(model, place(loads(0, config.num_moe_layers), 4, replicas=1))
    with jax.set_mesh(make_mesh(config, jax.devices()[: 8 if mesh else 1])):
        actual = logits(placed, overrides)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        oracle.assert_close(a, e)  # the counts are those of experts, not of slots


def test_tokens_take_turns_among_the_copies_of_an_expert():
    several = Replicas.from_placement(np.array([[0, 1, 2, 3, 2, 2]]), 4)
    replicas = jax.tree.map(lambda array_N: array_N[0], several)
    slots_BLK = replicas.slots_of(jnp.full((3, 1, 1), 2), 6)
    assert slots_BLK[:, 0, 0].tolist() == [2, 4, 5]  # of three sequences that grow
    slots_BLK = replicas.slots_of(jnp.asarray([[[2], [2], [2], [1], [2], [4], [3]]]), 6)
    # By position; 4 is no expert, and 6 no slot.
    assert slots_BLK[0, :, 0].tolist() == [2, 4, 5, 1, 4, 6, 3]


def test_a_model_cannot_be_placed_by_another_number_of_layers_or_if_its_experts_choose():
    model = Decoder(small_config(), rngs=nnx.Rngs(params=0))
    with pytest.raises(PlacementError, match="3 layers are placed, and the model has 2"):
        place_experts(model, identity_placement(3, 4))
    soft = small_config(moe={"router": "soft", "allow_noncausal": True})
    with pytest.raises(PlacementError, match="choose tokens"):
        place_experts(Decoder(soft, rngs=nnx.Rngs(params=0)), identity_placement(2, 4))


def test_experts_in_slots_go_with_their_overrides_and_the_model_stays_as_it_is():
    config = small_config()
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    before = jax.device_get(nnx.state(model))
    placed, overrides = place_experts(model, identity_placement(2, 4)[:, ::-1])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(nnx.state(model)))
    (stack,) = placed.stacks
    assert stack.block.moe.experts.down.axes == ("layers", "slots", "mlp", "embed")
    batch = jax.tree.map(jnp.asarray, packed_batch(config))
    inputs = (batch.tokens_BL, batch.segments_BL, batch.positions_BL)
    with pytest.raises(PlacementError, match="give the overrides that `place_experts` returned"):
        jax.eval_shape(placed, *inputs)
    with pytest.raises(PlacementError, match="use the model that `place_experts` returned"):
        jax.eval_shape(lambda: model(*inputs, overrides=overrides))
    with pytest.raises(PlacementError, match="in the slots of a placement already"):
        place_experts(placed, identity_placement(2, 4))
