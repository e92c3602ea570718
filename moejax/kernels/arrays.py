"""Arrays of NumPy and of jax."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def takes_numpy(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Makes a function convert the NumPy arrays among its arguments to arrays of jax.

    Arrays in pytrees are converted too, and so are floating-point scalars of NumPy; integers, which
    may be sizes, stay as they are.

    Traced values cannot index a NumPy array, which has no `at` either: without this, what works on
    its own fails under `jax.grad` or `jax.jit` with arrays of NumPy that are not arguments of the
    differentiated function.
    """

    @functools.wraps(function)
    def call(
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Result:
        args, kwargs = jax.tree.map(to_jax, (args, kwargs))
        return function(*args, **kwargs)

    return call


def to_jax(value: object) -> object:
    """Returns an array as one of jax, and anything else as it is.

    Arrays of jax are included because a traced value may stand for a NumPy array.
    """
    if isinstance(value, np.ndarray | np.floating | jax.Array):
        return jnp.asarray(value)
    return value
