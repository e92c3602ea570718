"""Digests of arrays: the same however an array is split, different after any damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.training.checkpoints.digests import digest_arrays

SHAPES = ((), (1,), (7,), (8, 12), (2, 4, 6, 8), (1, 1000, 3), (3, 700, 300))


def random_array(shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape) * 100
    if dtype == "bfloat16":
        return np.asarray(jnp.asarray(values).astype(dtype))
    return values.astype(dtype)


def digest(array):
    return digest_arrays({"x": array})["x"]


@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),)])
def test_a_digest_does_not_depend_on_how_an_array_is_split(spec):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    host = random_array((8, 1000, 600), "float32")  # groups end within the parts
    split = jax.device_put(host, sharding)
    assert digest(split) == digest(host) == digest(jnp.asarray(host))
    with jax.enable_x64(True):  # elements of two words
        wide = host.astype(np.float64)
        split = jax.device_put(wide, sharding)
        assert split.dtype == np.float64
        assert digest(split) == digest(wide) != digest(host)


def test_an_array_without_elements_has_a_digest():
    assert digest(np.zeros((0, 4), np.float32)) == digest(np.zeros((4, 0), np.float64)) == "0" * 16


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int32", "bool", "float64", "int64", "complex64"]
)
def test_a_change_of_any_one_byte_changes_the_digest(dtype):
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        array = random_array(shape, dtype)
        before = digest(array)
        for _ in range(20):
            content = bytearray(array.tobytes())
            content[rng.integers(len(content))] ^= int(rng.integers(1, 256))
            damaged = np.frombuffer(bytes(content), array.dtype).reshape(shape)
            assert digest(damaged) != before


def test_a_digest_sees_the_order_of_columns_and_of_groups_of_rows():
    array = random_array((2048, 512), "float32")  # groups of 512 rows
    swapped_groups = array.copy()
    swapped_groups[:512] = array[512:1024]
    swapped_groups[512:1024] = array[:512]
    swapped_columns = array.copy()
    swapped_columns[:, [0, 1]] = array[:, [1, 0]]
    arrays = {
        "a": array,
        "b": swapped_groups,
        "c": swapped_columns,
        "d": np.zeros(3, np.int32),
        "e": array[:, ::-1],
    }
    digests = digest_arrays(arrays)
    assert list(digests) == list(arrays) and len(set(digests.values())) == 5
    assert digests["a"] == digest(array) and len(digests["a"]) == 16
