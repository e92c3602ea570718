"""The leaves of the mesh: how many parts the devices are divided into along each axis."""

import dataclasses
from typing import Any

from moejax.config.schema.leaf import leaf


def _axis(default: int, meaning: str) -> Any:
    return leaf(default, meaning, at_least=1, also=(-1,))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. One size may be -1: all that remain.

    `dcn_*` count the groups of devices (slices, nodes) between which links are slow. An axis has as
    many parts as the product of its `dcn_*` size and its other size.
    """

    data: int = _axis(-1, "parts of the batch; -1 in one axis: all devices that remain")
    fsdp: int = _axis(1, "parts of the batch, and of every parameter")
    expert: int = _axis(1, "parts of the batch, and of the experts")
    context: int = _axis(
        1, "parts of each sequence; queries stay on their device and see all keys and values"
    )
    tensor: int = _axis(1, "parts of heads, hidden widths and vocabulary")
    dcn_data: int = _axis(1, "groups between which links are slow, along data")
    dcn_fsdp: int = _axis(1, "groups between which links are slow, along fsdp")
    dcn_expert: int = _axis(1, "groups between which links are slow, along expert")
