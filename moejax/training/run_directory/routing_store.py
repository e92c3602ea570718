"""The files of `routing/`: a group and its arrays, their checksums, and what is said of damaged ones."""

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
CHUNK_BYTES = (
    2**20
)  # an append rewrites one chunk: about a megabyte, so that long runs leave few files
CHECKSUM = "crc32c"  # the codec
ARRAYS: Mapping[str, tuple[str, int | str]] = {
    "counts": ("int64", 0),
    "probs": ("float32", "NaN"),
    "importance": ("float32", "NaN"),
    "idle_steps": ("int32", 0),
    "bias": ("float32", "NaN"),
    "layers": ("float32", "NaN"),
    "step": ("int64", UNFINISHED),
}
"""Type and fill value of each; `step` is the last, in which order they are written."""


class RoutingLogError(ValueError):
    """A routing log that cannot be used: the message names the folder and the remedy."""


def finished_steps(step_array: tensorstore.TensorStore) -> Int64[np.ndarray, "S"]:
    """Steps in front of the first unfinished entry."""
    steps = step_array.read().result()
    unfinished = np.flatnonzero(steps == UNFINISHED)
    return steps[: unfinished[0]] if unfinished.size else steps


def create_arrays(folder: Path, attributes: dict[str, Any]) -> None:
    """Makes empty arrays, then the group file: a folder without it is not a log yet and is made anew."""
    shapes = array_shapes(attributes)
    if min(shapes["counts"]) < 1:
        raise RoutingLogError(
            f"a routing log needs MoE layers and experts, got {attributes}; a dense run has none"
        )
    entries = chunk_entries(shapes)
    for name, (dtype, fill) in ARRAYS.items():
        inner = list(shapes[name])
        last = "metric" if name == "layers" else "expert"
        metadata = {
            "shape": [0, *inner],
            "data_type": dtype,
            "fill_value": fill,
            "dimension_names": ["step", "layer", last][: 1 + len(inner)],
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [entries, *(max(size, 1) for size in inner)]},
            },
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd"},
                {"name": CHECKSUM},
            ],
        }
        spec = _spec(folder, name) | {"metadata": metadata}
        tensorstore.open(spec, create=True, delete_existing=True).result()
    write_group(folder, attributes)


def remove_unfinished_writes(folder: Path) -> None:
    """Removes what a writer that was killed within a write left behind; only the one writer may call this.

    TensorStore writes a file as `NAME.__lock` and renames it. One left by a killed process is
    written over without being cut to the new length, so that the old end would follow the new
    content into the file.
    """
    for path in folder.rglob("*.__lock"):
        path.unlink(missing_ok=True)


def write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Writes the group file in one rename; its attributes carry a digest."""
    sealed = attributes | {"digest": _digest(attributes)}
    group = {"zarr_format": 3, "node_type": "group", "attributes": sealed}
    replace_file(folder / GROUP, json.dumps(group).encode())


def _digest(attributes: Mapping[str, Any]) -> str:
    return hashlib.blake2b(
        json.dumps(attributes, sort_keys=True).encode(), digest_size=16
    ).hexdigest()


def read_group(folder: Path) -> dict[str, Any]:
    """The group's attributes; raises `ValueError` if they differ from what was written."""
    attributes = json.loads((folder / GROUP).read_bytes().decode())["attributes"]
    others = {key: value for key, value in attributes.items() if key != "digest"}
    if "digest" in attributes and attributes["digest"] != _digest(others):
        raise ValueError(f"{GROUP} differs from the digest written with it")
    if set(others) - {"layers", "num_experts", "metrics"}:
        raise ValueError(f"{GROUP} has the attributes {', '.join(others)}")
    return attributes


def has_entries(folder: Path) -> bool:
    """Whether a folder without a group file holds entries: making it was not only begun."""
    return (folder / "step" / GROUP).exists() and len(
        finished_steps(open_array(folder, "step"))
    ) > 0


def has_checksums(array: tensorstore.TensorStore) -> bool:
    """Whether the chunks of an array end with their checksums; those of earlier versions do not."""
    return any(codec["name"] == CHECKSUM for codec in array.spec().to_json()["metadata"]["codecs"])


def check_stored(name: str, array: tensorstore.TensorStore) -> None:
    """Raises `ValueError` if a chunk of finished entries is gone, for which the fill value would be read."""
    if not array.size or not has_checksums(array):
        return
    if not array.storage_statistics(query_fully_stored=True).result().fully_stored:
        raise ValueError(f"chunks of {name} are lost")


def array_shapes(attributes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Each array's shape without its first axis."""
    num_layers = len(attributes["layers"])
    by_expert = (num_layers, attributes["num_experts"])
    own = {"layers": (num_layers, len(attributes["metrics"])), "step": ()}
    return {name: own.get(name, by_expert) for name in ARRAYS}


def chunk_entries(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many entries a chunk holds."""
    return int(np.clip(CHUNK_BYTES // (8 * math.prod(shapes["counts"])), 1, 256))


def _spec(folder: Path, name: str) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": str(folder.resolve() / name)}
    return {"driver": "zarr3", "kvstore": kvstore, "store_data_equal_to_fill_value": True}


def open_array(folder: Path, name: str) -> tensorstore.TensorStore:
    """Opens one array of the group."""
    return tensorstore.open(_spec(folder, name), open=True).result()


def read_attributes(folder: Path) -> dict[str, Any]:
    """The layers, the number of experts and the metrics that the group file names."""
    attributes = read_group(folder)
    return {
        "layers": list(attributes["layers"]),
        "num_experts": int(attributes["num_experts"]),
        "metrics": list(attributes["metrics"]),
    }


@contextlib.contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turns what using a damaged or unreadable log, or a full disk, raises into a `RoutingLogError` with its remedy."""
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
        text = " ".join(
            re.split(r" \[(source locations|tensorstore_spec|os_error_code)", str(error))[0].split()
        )[:300]
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in text:
            raise RoutingLogError(
                f"{folder} cannot be read ({text}); give this user the right to it"
            ) from error
        if "Error writing" in text:
            raise RoutingLogError(
                f"{folder} cannot be written ({text}); make room there, and run the command again"
            ) from error
        state = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise RoutingLogError(
            f"{folder} {state} ({type(error).__name__}: {text}); restore it from a copy, or go on without its history, "
            f"that of evaluations included: {move_command(folder)}"
        ) from error


def move_command(folder: Path) -> str:
    """The command that puts a log out of the way."""
    return shlex.join(["mv", str(folder), str(folder.with_name("damaged-routing"))])
