"""The type checker of test runs: beartype on every function of moejax."""

import warnings
from collections.abc import Callable

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

warnings.filterwarnings(
    "ignore", category=BeartypeDecorHintPep585DeprecationWarning
)  # hints of flax and optax

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484


def check(function: Callable) -> Callable:
    """Checks calls, but not construction: jax rebuilds pytrees with placeholders of arrays."""
    return function if function.__name__ == "__init__" else _check(function)
