"""Every optimizer by its formula: updates, weight decay, groups of parameters."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oracle
from cases.training import make, packed_batch, small_config
from moejax.config import ConfigError, Knobs, OptimizerConfig
from moejax.training.optimizers.make import make_optimizer
from moejax.training.optimizers.plans import plans_of
from moejax.training.optimizers.rules import RULES
from moejax.training.step import make_train_step, put_batch

NAMES = typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])

AXES = {
    "embedding": ("vocab", "embed"),
    "block/mixer/query": ("layers", "embed", "heads", "head"),
    "block/mixer/out": ("layers", "heads", "head", "embed"),
    "block/ffn/experts/gate_up": ("layers", "experts", "embed", "gate_up", "mlp"),
    "block/ffn/router/kernel": ("layers", "embed", "router"),
    "block/ffn_norm/scale": ("layers", "norm"),
}
SIZES = {
    "vocab": 7,
    "embed": 6,
    "heads": 2,
    "head": 5,
    "layers": 2,
    "experts": 3,
    "gate_up": 2,
    "mlp": 4,
    "router": 3,
    "norm": 6,
}


def random_params(seed=0):
    """Returns parameters of no model, one of each kind."""
    rng = np.random.default_rng(seed)
    flat = []
    for path, axes in AXES.items():
        values = rng.normal(size=[SIZES[axis] for axis in axes]).astype(np.float32)
        flat.append((tuple(path.split("/")), nnx.Param(jnp.asarray(values), axes=axes)))
    return nnx.from_flat_state(flat)


def arrays_of(tree):
    """Returns float64 arrays by path."""
    flat = nnx.to_flat_state(tree)
    return {"/".join(path): np.asarray(value[...], np.float64) for path, value in flat}


def run(config, num_steps=3, rate=0.1):
    """Yields gradients, weights before and after, of each step."""
    params = random_params()
    optimizer = make_optimizer(config, params)
    state = optimizer.init(params)
    for step in range(num_steps):
        gradients = random_params(step + 1)
        updates, state = optimizer.update(gradients, state, params, learning_rate=jnp.float32(rate))
        before = arrays_of(params)
        params = optax.apply_updates(params, updates)
        yield arrays_of(gradients), before, arrays_of(params)


def test_there_is_a_rule_for_every_name():
    assert RULES.keys() == set(NAMES)


def config_of(name="adamw", **leaves):
    return OptimizerConfig(**({"name": name, "clip_norm": 0.0, "weight_decay": 0.0} | leaves))


def test_steps_are_adamw_by_its_formula_at_the_rates_that_are_given():
    mean = square = None
    config = config_of(beta1=0.8, beta2=0.9, weight_decay=0.1)
    for count, (slopes, before, after) in enumerate(run(config), start=1):
        mean = mean or dict.fromkeys(slopes, 0.0)
        square = square or dict.fromkeys(slopes, 0.0)
        for path, slope in slopes.items():
            mean[path] = 0.8 * mean[path] + 0.2 * slope
            square[path] = 0.9 * square[path] + 0.1 * slope**2
            step = mean[path] / (1 - 0.8**count)
            step = step / (np.sqrt(square[path] / (1 - 0.9**count)) + 1e-8)
            decay = 0.0 if "norm" in path else 0.1 * before[path]
            oracle.assert_close(after[path], before[path] - 0.1 * (step + decay), err_msg=path)


def test_steps_are_lions_and_momentums_by_their_formulas():
    for name, leaves in (("lion", {"beta1": 0.7, "beta2": 0.9}), ("sgd", {"beta1": 0.7})):
        mean = None
        for slopes, before, after in run(config_of(name, **leaves)):
            mean = mean or dict.fromkeys(slopes, 0.0)
            for path, slope in slopes.items():
                if name == "lion":
                    step = np.sign(0.7 * mean[path] + 0.3 * slope)
                    mean[path] = 0.9 * mean[path] + 0.1 * slope
                else:
                    step = mean[path] = 0.7 * mean[path] + slope
                oracle.assert_close(after[path], before[path] - 0.1 * step, err_msg=path)


def matrices_of(path, array):
    """Returns each matrix of an array, `[M, N]`; gate and up apart."""
    if path == "embedding":
        return [array]
    if path.endswith("experts/gate_up"):
        return [array[n, e, :, g] for n in range(2) for e in range(3) for g in range(2)]
    own = {"query": (6, 10), "out": (10, 6), "kernel": (6, 3)}[path.rsplit("/", 1)[1]]
    return list(array.reshape(2, *own))


BY_MUON = ("block/mixer/query", "block/mixer/out", "block/ffn/experts/gate_up")


def test_muon_trains_each_matrix_as_optax_does_it_alone_and_adam_the_rest():
    config = config_of("muon", muon_momentum=0.8, adam_rate=0.5)
    reference = optax.contrib.scale_by_muon(beta=0.8)
    adam = run(config_of("adamw"), rate=0.05)
    states = {}
    for (slopes, before, after), (_, adam_before, adam_after) in zip(
        run(config), adam, strict=True
    ):
        for path, slope in slopes.items():
            if path not in BY_MUON:
                oracle.assert_close(
                    after[path] - before[path], adam_after[path] - adam_before[path], err_msg=path
                )
                continue
            triples = zip(
                *(matrices_of(path, each) for each in (slope, before[path], after[path])),
                strict=True,
            )
            for number, (gradient, old, new) in enumerate(triples):
                key = path, number
                gradient = jnp.asarray(gradient, jnp.float32)
                states.setdefault(key, reference.init(gradient))
                update, states[key] = reference.update(gradient, states[key])
                size = 0.2 * max(gradient.shape) ** 0.5
                oracle.assert_close(new - old, -0.1 * size * np.asarray(update), err_msg=path)


def test_muons_singular_values_are_about_one():
    config = config_of("muon", muon_momentum=0.0)
    for _, before, after in run(config, num_steps=1):
        for path in BY_MUON:
            change = (before[path] - after[path]) / 0.1
            for matrix in matrices_of(path, change):
                values = np.linalg.svd(matrix / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
                assert values.min() > 0.5 and values.max() < 1.3


def test_muonh_keeps_the_norm_of_each_matrix_and_turns_it_by_the_rate():
    for _, before, after in run(config_of("muonh", weight_decay=0.1)):
        for path in BY_MUON:
            pairs = zip(
                matrices_of(path, before[path]), matrices_of(path, after[path]), strict=True
            )
            for old, new in pairs:
                norm = np.linalg.norm(old)
                assert np.linalg.norm(new) == pytest.approx(norm, rel=1e-5)
                # The step before the norm is restored is at most a tenth of it.
                assert 0.05 * norm < np.linalg.norm(new - old) < 0.105 * norm


def test_muonh_is_its_formula():
    ((_, _, plain),) = run(config_of("muon"), num_steps=1)
    ((_, before, after),) = run(config_of("muonh"), num_steps=1)
    for path in BY_MUON:
        triples = zip(
            *(matrices_of(path, each[path]) for each in (before, plain, after)), strict=True
        )
        for old, moved, new in triples:
            update = old - moved
            norm = np.linalg.norm(old)
            expected = old - 0.1 * norm * update / np.linalg.norm(update)
            expected *= norm / np.linalg.norm(expected)
            oracle.assert_close(new, expected, err_msg=path)


def test_adafactor_keeps_a_number_a_row_and_one_a_column_of_each_matrix():
    rows, columns = {}, {}
    for count, (slopes, before, after) in enumerate(run(config_of("adafactor")), start=1):
        decay = 1 - count**-0.8
        for path, slope in slopes.items():
            is_vector = "norm" in path
            parts = [
                list(x) if is_vector else matrices_of(path, x)
                for x in (slope, before[path], after[path])
            ]
            for number, (gradient, old, new) in enumerate(zip(*parts, strict=True)):
                key = path, number
                squares = gradient**2 + 1e-30
                if is_vector:
                    rows[key] = decay * rows.get(key, 0.0) + (1 - decay) * squares
                    second = rows[key]
                else:
                    rows[key] = decay * rows.get(key, 0.0) + (1 - decay) * squares.mean(1)
                    columns[key] = decay * columns.get(key, 0.0) + (1 - decay) * squares.mean(0)
                    second = np.outer(rows[key], columns[key]) / rows[key].mean()
                step = gradient / np.sqrt(second)
                step /= max(1.0, np.sqrt((step**2).mean()))
                step *= max(1e-3, np.sqrt((old**2).mean()))
                oracle.assert_close(new, old - 0.1 * step, err_msg=path)


# Groups
# -------------------------------------------------------------------------------------------------


def test_everything_decays_but_norm_scales_and_biases():
    moe = {"expert_bias": True, "router_bias": True, "num_shared_experts": 1}
    attention = {"qk_norm": "head", "qkv_bias": True, "out_bias": True}
    params = make(small_config(attention=attention, moe=moe)).abstract.params
    decays = {path: plan.weight_decay for path, plan in plans_of(OptimizerConfig(), params).items()}
    assert {path.rsplit("/", 1)[-1] for path, decay in decays.items() if not decay} == {
        "scale",
        "bias",
        "query_bias",
        "key_bias",
        "value_bias",
        "out_bias",
        "gate_up_bias",
        "down_bias",
    }
    assert {path.rsplit("/", 1)[-1] for path, decay in decays.items() if decay} >= {
        "kernel",
        "gate_up",
        "down",
        "embedding",
        "query",
    }
    assert len(jax.tree.leaves(params)) == len(decays)


def test_a_group_has_its_own_rate_and_decay():
    groups = "router: rate=0.5 weight_decay=0; *gate_up: weight_decay=0.4; norm: rate=0"
    ((_, before, plain),) = run(config_of("sgd"), num_steps=1)
    ((_, _, after),) = run(config_of("sgd", weight_decay=0.1, groups=groups), num_steps=1)
    for path, old in before.items():
        rate, decay = 1.0, 0.1
        if "router" in path:
            rate, decay = 0.5, 0.0
        elif "gate_up" in path:
            decay = 0.4
        elif "norm" in path:
            rate = 0.0
        expected = old + rate * (plain[path] - old) - 0.1 * rate * decay * old
        oracle.assert_close(after[path], expected, err_msg=path)


def test_a_group_is_clipped_by_its_own_norm_and_then_all_by_the_global_one():
    config = config_of("sgd", clip_norm=2.0, groups="experts: clip_norm=0.5; attention: rate=1")
    ((slopes, before, after),) = run(config, num_steps=1)
    clipped = dict(slopes)
    path = "block/ffn/experts/gate_up"
    clipped[path] = slopes[path] * 0.5 / np.linalg.norm(slopes[path])
    norm = np.sqrt(sum((slope**2).sum() for slope in clipped.values()))
    assert norm > 2
    for path, slope in clipped.items():
        oracle.assert_close(after[path], before[path] - 0.1 * slope * 2 / norm, err_msg=path)


def test_a_group_without_parameters_is_refused_and_the_first_that_fits_counts():
    params = random_params()
    with pytest.raises(ConfigError, match="no parameter that is trained is in shared"):
        make_optimizer(OptimizerConfig(groups="shared: rate=2"), params)
    with pytest.raises(ConfigError, match="in no group before it"):
        make_optimizer(OptimizerConfig(groups="*/ffn/*: rate=2; router: rate=3"), params)
    plans = plans_of(OptimizerConfig(groups="router: rate=3; */ffn/*: rate=2"), params)
    assert plans["block/ffn/router/kernel"].rate == 3
    assert plans["block/ffn/experts/gate_up"].rate == 2


# In training
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains_and_keeps_its_moments_in_the_type(name, dtype):
    rate = {"lion": 3e-4, "sgd": 0.1, "adafactor": 0.03, "muonh": 0.02}.get(name, 3e-3)
    optimizer = {"name": name, "moments_dtype": dtype, "learning_rate": rate}
    config = small_config(mesh={"data": 1, "fsdp": 2}, optimizer=optimizer)
    setup = make(config, num_devices=2)
    with jax.set_mesh(setup.mesh):
        state = setup.init(0)
        before = jax.device_get(state.params)
        step = make_train_step(setup)
        batch = put_batch(packed_batch(config), setup)
        losses = []
        for _ in range(4):
            state, output = step(state, batch, Knobs.from_config(config))
            losses.append(float(output.scalars["loss/lm"]))
    assert losses[-1] < losses[0] and int(state.skipped) == 0
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    assert all(jax.tree.leaves(changed))
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {str(x.dtype) for x in moments} == {dtype}


def test_nothing_trains_without_a_rate():
    params = random_params()
    optimizer = make_optimizer(OptimizerConfig(), params)
    with pytest.raises(TypeError, match="learning_rate"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("name", NAMES)
def test_arms_of_a_pack_are_trained_as_each_alone(name):
    config = config_of(name, weight_decay=0.1)
    optimizer = make_optimizer(config, random_params())

    def one_step(params, gradients, rate):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params, learning_rate=rate)
        return updates

    arms = [(random_params(n), random_params(n + 3), jnp.float32(0.1 * n)) for n in (1, 2)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *arms)
    together = jax.vmap(one_step)(*stacked)
    for n, arm in enumerate(arms):
        alone = arrays_of(one_step(*arm))
        for path, update in arrays_of(jax.tree.map(lambda x, n=n: x[n], together)).items():
            oracle.assert_close(update, alone[path], err_msg=path)
