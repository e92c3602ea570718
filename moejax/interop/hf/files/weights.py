"""Tensors in safetensors files, read without running anything that is in them.

A tensor is found in the header of its file and read from there, all of it or some rows, so that a
checkpoint of any size takes no more memory than what is asked for. Weights that are stored in
blocks with scales (`quantized`) are one tensor here.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.files.json_objects import read_json
from moejax.interop.hf.files.quantized import Source, join_quantized
from moejax.interop.hf.files.stored import StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
"""The types of weights that are read as they are."""


class Weights:
    """The tensors of a folder, by name.

    Args:
      folder: with `model.safetensors`, or with an index and the files that it names.
      quantization: `quantization_config` of its `config.json`; None where weights are plain.

    Raises:
      HfError: no such files, one that is damaged, or files that the index does not describe.
    """

    def __init__(self, folder: Path, quantization: Any = None):
        self._folder = folder
        self._sources: dict[str, Source] = join_quantized(self._read_names(), quantization)
        self._unused = set(self._sources)

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._sources.keys()

    def source(self, name: str) -> Source:
        """Returns one of the tensors, without claiming it."""
        return self._sources[name]

    def claim(self, name: str) -> Source:
        """Returns a tensor that is not read yet, and may be claimed once.

        Raises:
          HfError: there is none of that name, it was claimed before, or its type is none of
            weights.
        """
        if name not in self._sources:
            raise HfError(f"{self._folder} has no tensor {name}, which its config.json asks for")
        if name not in self._unused:
            raise HfError(f"the tensor {name} would be used twice")
        self._unused.remove(name)
        source = self._sources[name]
        if isinstance(source, StoredTensor) and source.type not in FLOATS:
            raise HfError(f"{name} has the type {source.type}; weights must be {', '.join(FLOATS)}")
        return source

    def check_all_used(self, ignored: Collection[str] = ()) -> None:
        """Raises `HfError` if a tensor was not claimed, but for those that are ignored."""
        left = sorted(self._unused - set(ignored))
        if left:
            shown = ", ".join(left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise HfError(
                f"{self._folder} has tensors that the model has no place for: {shown}{more}"
            )

    def _read_names(self) -> dict[str, StoredTensor]:
        """Returns where each tensor is."""
        if not (self._folder / INDEX).exists():
            if not (self._folder / SINGLE).exists():
                raise HfError(self._missing())
            return self._read_header(SINGLE)
        file_of = self._read_index()
        found: dict[str, StoredTensor] = {}
        for file_name in sorted(set(file_of.values())):
            tensors = self._read_header(file_name)
            for name in tensors:
                if file_of.get(name) != file_name:
                    raise HfError(f"{name} is in {file_name}, and {INDEX} does not say so")
            found |= tensors
        files = {path.name for path in self._folder.glob("*.safetensors")}
        for file_name in sorted(files - set(file_of.values())):
            raise HfError(
                f"{self._folder / file_name} is not in {INDEX}; move it away, or get both again"
            )
        for name in sorted(file_of.keys() - found.keys()):
            raise HfError(f"{INDEX} says that {name} is in {file_of[name]}, and it is not")
        return found

    def _read_index(self) -> dict[str, str]:
        path = self._folder / INDEX
        try:
            file_of = read_json(path.read_bytes())["weight_map"]
            is_map = all(isinstance(name, str) for name in file_of.values())
        except PermissionError as error:
            raise HfError(_forbidden(path)) from error
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise HfError(f"{path} is damaged ({_line(error)}); get it again") from error
        if not is_map:
            raise HfError(f"{path} is damaged (its weight_map must name files); get it again")
        for file_name in file_of.values():
            if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
                raise HfError(f"{path} names the file {file_name!r}, which is no file beside it")
        return file_of

    def _read_header(self, file_name: str) -> dict[str, StoredTensor]:
        """Returns the tensors of a file, whose header the library finds to be in order."""
        path = self._folder / file_name
        if not path.exists():
            raise HfError(f"{path} is missing, and {INDEX} names it; get it again")
        try:
            with safe_open(path, "numpy"):
                pass
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = read_json(file.read(header_bytes))
        except PermissionError as error:
            raise HfError(_forbidden(path)) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise HfError(f"{path} is damaged ({_line(error)}); get it again") from error
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            tensors[name] = StoredTensor(
                name=name,
                path=path,
                type=entry["dtype"],
                shape=tuple(entry["shape"]),
                offset=8 + header_bytes + entry["data_offsets"][0],
            )
        return tensors

    def _missing(self) -> str:
        pickles = sorted(path.name for path in self._folder.glob("*.bin"))
        if pickles:
            return (
                f"{self._folder} has {pickles[0]}, which is a pickle: reading it would run what is "
                "in it; get the model's safetensors files"
            )
        return f"{self._folder} has neither {SINGLE} nor {INDEX}"


def _forbidden(path: Path) -> str:
    return f"{path} cannot be read (Permission denied); give this user the right to read it"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
