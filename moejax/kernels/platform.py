"""The platform that a program is traced for."""

import jax


def platform() -> str:
    """That of the mesh in context, whose devices need not be of this machine, or jax's default: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
