"""Groups logged steps into columns of a heat map: a long history has more steps than pixels."""

import numpy as np
from jaxtyping import Float, Int


def column_edges(steps_S: Int[np.ndarray, "S"], num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides logging intervals into columns.

    Args:
      steps_S: the end of each interval; at least one.
      num_columns: at most.

    Returns:
      The edges of the columns in steps, and the index of the first interval of each column.
    """
    num_steps = len(steps_S)
    num_columns = min(num_steps, num_columns)
    starts = np.linspace(0, num_steps, num_columns, endpoint=False)
    starts_C = starts.astype(int)
    next_C = np.append(starts_C[1:], num_steps)
    right_C = steps_S[next_C - 1]
    left = _left_edge(steps_S)
    edges = np.append(left, right_C)
    return edges, starts_C


def _left_edge(steps_S: Int[np.ndarray, "S"]) -> int:
    """Returns where the first interval begins, as if it were as long as the second."""
    first = int(steps_S[0])
    if len(steps_S) == 1:
        return min(0, first - 1)
    second = int(steps_S[1])
    left = max(2 * first - second, 0)
    return min(left, first - 1)


def sum_columns(
    steps_S: Int[np.ndarray, "S"],
    counts_SE: Int[np.ndarray, "S E"],
    num_columns: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges in steps, and the counts summed over the intervals of each column."""
    edges, starts_C = column_edges(steps_S, num_columns)
    counts_CE = np.add.reduceat(counts_SE, starts_C, axis=0)
    return edges, counts_CE


def mean_columns(
    steps_S: Int[np.ndarray, "S"],
    values_SN: Float[np.ndarray, "S N"],
    num_columns: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges in steps, and the means of the finite values in each column.

    NaN where a column has no finite value.
    """
    edges, starts_C = column_edges(steps_S, num_columns)
    is_finite_SN = np.isfinite(values_SN)
    finite_SN = np.where(is_finite_SN, values_SN, 0.0)
    number_CN = np.add.reduceat(is_finite_SN, starts_C, axis=0, dtype=np.int64)
    total_CN = np.add.reduceat(finite_SN, starts_C, axis=0)
    mean_CN = np.full(total_CN.shape, np.nan)
    np.divide(total_CN, number_CN, out=mean_CN, where=number_CN > 0)
    return edges.astype(float), mean_CN
