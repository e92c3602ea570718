"""The files of `routing/`: a group and its arrays, their checksums, and messages about damage."""

import contextlib
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Int64

from moejax.paths import replace_file

FOLDER = "routing"
GROUP = "zarr.json"
UNFINISHED = -1  # the fill value of `step`
CHUNK_BYTES = 2**20
"""An append rewrites one chunk: about a megabyte, so that long runs leave few files."""

CHECKSUM = "crc32c"
"""The codec."""

ARRAYS: Mapping[str, tuple[str, int | str]] = {
    "counts": ("int64", 0),
    "probs": ("float32", "NaN"),
    "importance": ("float32", "NaN"),
    "idle_steps": ("int32", 0),
    "bias": ("float32", "NaN"),
    "layers": ("float32", "NaN"),
    "gradient_norms": ("float32", "NaN"),
    "update_norms": ("float32", "NaN"),
    "weight_norms": ("float32", "NaN"),
    "step": ("int64", UNFINISHED),
}
"""Type and fill value of each, in the order in which they are written: `step` is the last."""


ADDED = ("gradient_norms", "update_norms", "weight_norms")
"""Arrays that logs of earlier versions lack."""


class RoutingLogError(ValueError):
    """A routing log that cannot be used: the message names the folder and the remedy."""


def finished_steps(step_array: tensorstore.TensorStore) -> Int64[np.ndarray, "S"]:
    """Returns the steps before the first unfinished entry."""
    steps = step_array.read().result()
    unfinished = np.flatnonzero(steps == UNFINISHED)
    return steps[: unfinished[0]] if unfinished.size else steps


def create_arrays(folder: Path, attributes: dict[str, Any]) -> None:
    """Makes empty arrays, then the group file.

    A folder without the group file is not a log yet, and is made again.
    """
    shapes = array_shapes(attributes)
    if min(shapes["counts"]) < 1:
        raise RoutingLogError(
            f"a routing log needs MoE layers and experts, got {attributes}; a dense run has none"
        )
    for name in ARRAYS:
        create_array(folder, name, shapes)
    write_group(folder, attributes)


def create_array(
    folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> tensorstore.TensorStore:
    """Makes one array, empty."""
    metadata = _metadata(name, shapes[name], chunk_entries(shapes))
    spec = _spec(folder, name) | {"metadata": metadata}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def _metadata(name: str, inner: tuple[int, ...], num_entries: int) -> dict[str, Any]:
    """Returns the Zarr metadata of an empty array.

    Args:
      name: of the array.
      inner: its shape without the first axis.
      num_entries: how many entries a chunk holds.
    """
    dtype, fill_value = ARRAYS[name]
    dimension_names = ["step", "layer", "metric" if name == "layers" else "expert"]
    chunk_shape = [num_entries, *(max(size, 1) for size in inner)]
    return {
        "shape": [0, *inner],
        "data_type": dtype,
        "fill_value": fill_value,
        "dimension_names": dimension_names[: 1 + len(inner)],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd"},
            {"name": CHECKSUM},
        ],
    }


def remove_unfinished_writes(folder: Path) -> None:
    """Removes what a killed writer left of a write; only the one writer may call this.

    TensorStore writes a file as `NAME.__lock` and renames it. A file left by a killed process is
    overwritten without being truncated first, so that its old end would follow the new content.
    """
    for path in folder.rglob("*.__lock"):
        path.unlink(missing_ok=True)


def write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Writes the group file in one rename; its attributes carry a digest."""
    sealed = attributes | {"digest": _digest(attributes)}
    group = {"zarr_format": 3, "node_type": "group", "attributes": sealed}
    replace_file(folder / GROUP, json.dumps(group).encode())


def _digest(attributes: Mapping[str, Any]) -> str:
    text = json.dumps(attributes, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_group(folder: Path) -> dict[str, Any]:
    """Reads the group's attributes; raises `ValueError` if they differ from what was written."""
    group = json.loads((folder / GROUP).read_bytes().decode())
    attributes = group["attributes"]
    others = {key: value for key, value in attributes.items() if key != "digest"}
    if "digest" in attributes and attributes["digest"] != _digest(others):
        raise ValueError(f"{GROUP} differs from the digest written with it")
    if set(others) - {"layers", "num_experts", "metrics"}:
        raise ValueError(f"{GROUP} has the attributes {', '.join(others)}")
    return attributes


def has_entries(folder: Path) -> bool:
    """Whether a folder without a group file holds entries: its creation was finished once."""
    if not (folder / "step" / GROUP).exists():
        return False
    return len(finished_steps(open_array(folder, "step"))) > 0


def has_checksums(array: tensorstore.TensorStore) -> bool:
    """Whether the chunks of an array end with their checksums; those of earlier versions do not."""
    codecs = array.spec().to_json()["metadata"]["codecs"]
    return any(codec["name"] == CHECKSUM for codec in codecs)


def check_stored(name: str, array: tensorstore.TensorStore) -> None:
    """Raises `ValueError` if a chunk of finished entries is gone.

    The fill value would be read in its place.
    """
    if not array.size or not has_checksums(array):
        return
    statistics = array.storage_statistics(query_fully_stored=True).result()
    if not statistics.fully_stored:
        raise ValueError(f"chunks of {name} are lost")


def array_shapes(attributes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns each array's shape without its first axis."""
    num_layers = len(attributes["layers"])
    by_expert = (num_layers, attributes["num_experts"])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ARRAYS, by_expert)
    shapes["layers"] = (num_layers, len(attributes["metrics"]))
    shapes["step"] = ()
    return shapes


def chunk_entries(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns how many entries a chunk holds."""
    entry_bytes = 8 * math.prod(shapes["counts"])  # of int64
    return int(np.clip(CHUNK_BYTES // entry_bytes, 1, 256))


def _spec(folder: Path, name: str) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": str(folder.resolve() / name)}
    return {"driver": "zarr3", "kvstore": kvstore, "store_data_equal_to_fill_value": True}


def open_array(folder: Path, name: str) -> tensorstore.TensorStore:
    """Opens one array of the group."""
    return tensorstore.open(_spec(folder, name), open=True).result()


def read_attributes(folder: Path) -> dict[str, Any]:
    """Reads the layers, the number of experts and the metrics that the group file names."""
    attributes = read_group(folder)
    return {
        "layers": list(attributes["layers"]),
        "num_experts": int(attributes["num_experts"]),
        "metrics": list(attributes["metrics"]),
    }


@contextlib.contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turns the errors of a damaged or unreadable log, or a full disk, into a `RoutingLogError`."""
    try:
        yield
    except RoutingLogError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
        OSError,
    ) as error:
        raise _explain(folder, error) from error


def _explain(folder: Path, error: Exception) -> RoutingLogError:
    """Returns the error to raise for a log that cannot be used, with its remedy."""
    # TensorStore adds to its messages what is for its developers.
    additions = r" \[(source locations|tensorstore_spec|os_error_code)"
    message = re.split(additions, str(error))[0]
    text = " ".join(message.split())[:300]
    if isinstance(error, PermissionError) or "PERMISSION_DENIED" in text:
        return RoutingLogError(f"{folder} cannot be read ({text}); give this user the right to it")
    if "Error writing" in text:
        return RoutingLogError(
            f"{folder} cannot be written ({text}); make room there, and run the command again"
        )
    state = "cannot be read" if isinstance(error, OSError) else "is damaged"
    return RoutingLogError(
        f"{folder} {state} ({type(error).__name__}: {text}); restore it from a copy, or go on "
        f"without its history, that of evaluations included: {move_command(folder)}"
    )


def move_command(folder: Path) -> str:
    """Returns the command that moves a log out of the way."""
    return shlex.join(["mv", str(folder), str(folder.with_name("damaged-routing"))])
