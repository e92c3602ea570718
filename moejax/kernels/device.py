"""The platform that a program is traced for."""

import jax


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu".

    It is the platform of the mesh in context, whose devices may be elsewhere, or of the default
    device.
    """
    default: jax.Device | str | None = jax.config.jax_default_device  # type: ignore[attr-defined]
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device or default
    if device is None:
        return jax.default_backend()
    if isinstance(device, str):
        return device
    return device.platform
