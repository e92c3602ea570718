"""Copies between layouts, for arrays that no block divides."""

import itertools

import numpy as np
import pytest

from moejax.interop.hf.tensors import Tensor, copy_in_blocks

SHAPES = [(), (1,), (37,), (37, 53), (1, 53), (53, 1), (5, 37, 3), (1, 40, 1), (0, 7)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_copied_between_all_orders_in_memory(shape, dtype):
    values = np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(dtype)
    orders = list(itertools.permutations(range(len(shape))))
    for ours, theirs in itertools.product(orders, orders):
        target = _in_order(np.zeros(shape, dtype), ours)
        copy_in_blocks(target, _in_order(values, theirs))
        np.testing.assert_array_equal(target, values)


def _in_order(values, order):
    """Returns an array of the same values, whose axes lie in another order in memory."""
    laid_out = values.transpose(order).copy("C")
    return laid_out.transpose(np.argsort(order).tolist())


def test_a_tensor_with_joined_axes_comes_back():
    tensor = Tensor("q_proj", "(H A) D", "mixer/query", "D H A")
    theirs = np.arange(21 * 19, dtype=np.float32).reshape(21, 19)
    sizes = {"D": 19, "H": 3, "A": 7}
    ours = np.zeros((19, 3, 7), np.float32)
    tensor.to_ours(theirs, ours, sizes)
    np.testing.assert_array_equal(ours, theirs.reshape(3, 7, 19).transpose(2, 0, 1))
    np.testing.assert_array_equal(tensor.to_theirs(ours, sizes), theirs)
