"""Settings of jax that decide numbers: a run records them and goes on only with the same ones.

Environment variables such as `JAX_THREEFRY_PARTITIONABLE=0` change every random number, so a run
that was continued with another value would be a mixture of two.
"""

from collections.abc import Mapping
from typing import Any

import jax

SETTINGS = (
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)
"""Names in `jax.config`; the environment variable of each is its name in capitals."""


def numerics() -> dict[str, bool | int | str]:
    """Returns the settings of this process, by name; those that are not set are left out."""
    values = {name: getattr(jax.config, name, None) for name in SETTINGS}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> bool | int | str:
    """Returns a value that JSON can hold; some settings are enumerations of text."""
    if isinstance(value, bool | int):
        return value
    return str(getattr(value, "value", value))


def changed_numerics(before: Mapping[str, object]) -> str:
    """Describes the first setting that differs from those of a run; empty if none does.

    Args:
      before: what `numerics` gave when the run began; empty for runs that did not record it.
    """
    if not before:
        return ""
    now = numerics()
    for name in SETTINGS:
        old, new = before.get(name), now.get(name)
        if old != new:
            return f"{name.upper()}={old}, and now it is {new}"
    return ""
