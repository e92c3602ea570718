"""The three grouped products of a layer and its gradients, as `jax.lax.ragged_dot_general` names them."""

from jax.lax import RaggedDotDimensionNumbers

BY_MATRIX = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
"""Rows `[R, D]` of each group by its matrix, of `[E, D, F]`."""

BY_TRANSPOSE = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
"""Rows `[R, F]` of each group by its matrix transposed: the gradient of the rows."""

OUTER = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
"""For each group the sum of the outer products of its rows `[R, D]` and `[R, F]`: the gradient of the matrices."""
