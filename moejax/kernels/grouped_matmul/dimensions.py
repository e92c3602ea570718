"""The three grouped products of a layer and its gradients, for `jax.lax.ragged_dot_general`."""

from jax.lax import RaggedDotDimensionNumbers

BY_MATRIX = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
"""Rows `[R, D]` of each group by its matrix, of `[E, D, F]`."""

BY_TRANSPOSE = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
"""Rows `[R, F]` of each group by its matrix transposed: the gradient of the rows."""

OUTER = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
"""For each group the sum of the outer products of its rows: the gradient of the matrices.

Its rows are `[R, D]` and `[R, F]`.
"""
