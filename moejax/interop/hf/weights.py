"""The tensors of a folder of safetensors files, each of which must be used exactly once."""

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.interop.hf.errors import HfError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = tuple(np.dtype(each) for each in (np.float32, ml_dtypes.bfloat16, np.float16))
"""The types of weights that are read."""


class Weights:
    """The tensors of a folder, by name.

    Args:
      folder: with `model.safetensors`, or with an index and the files that it names.

    Raises:
      HfError: no such files, one that is damaged, or files that the index does not describe.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._open = contextlib.ExitStack()
        self._file_of = self._read_names()
        self._unused = set(self._file_of)

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._file_of.keys()

    def take(self, name: str) -> np.ndarray:
        """Returns a tensor, which may be taken once.

        Raises:
          HfError: there is none of that name, or it was taken before.
        """
        if name not in self._file_of:
            raise HfError(f"{self._folder} has no tensor {name}, which its config.json asks for")
        if name not in self._unused:
            raise HfError(f"the tensor {name} would be used twice")
        self._unused.remove(name)
        file_name = self._file_of[name]
        try:
            tensor = self._files[file_name].get_tensor(name)
        except (SafetensorError, AttributeError, TypeError) as error:
            path = self._folder / file_name
            raise HfError(f"{name} of {path} cannot be read ({_line(error)})") from error
        if tensor.dtype not in FLOATS:
            raise HfError(
                f"{name} has the type {tensor.dtype}; weights must be "
                f"{', '.join(str(dtype) for dtype in FLOATS)}"
            )
        if not np.isfinite(tensor).all():
            raise HfError(f"{name} holds values that are not finite; get the files again")
        return tensor

    def check_all_used(self, ignored: Collection[str] = ()) -> None:
        """Raises `HfError` if a tensor was not taken, but for those that are ignored."""
        left = sorted(self._unused - set(ignored))
        if left:
            shown = ", ".join(left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise HfError(
                f"{self._folder} has tensors that the model has no place for: {shown}{more}"
            )

    def _read_names(self) -> dict[str, str]:
        """Returns the file of each tensor."""
        if not (self._folder / INDEX).exists():
            if not (self._folder / SINGLE).exists():
                raise HfError(self._missing())
            return dict.fromkeys(self._names_in(SINGLE), SINGLE)
        file_of = self._read_index()
        found = {}
        for file_name in sorted(set(file_of.values())):
            for name in self._names_in(file_name):
                if file_of.get(name) != file_name:
                    raise HfError(f"{name} is in {file_name}, and {INDEX} does not say so")
                found[name] = file_name
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
            file_of = json.loads(path.read_bytes())["weight_map"]
            is_map = all(isinstance(name, str) for name in file_of.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HfError(f"{path} is damaged ({_line(error)}); get it again") from error
        if not is_map:
            raise HfError(f"{path} is damaged (its weight_map must name files); get it again")
        for file_name in file_of.values():
            if Path(file_name).name != file_name:
                raise HfError(f"{path} names the file {file_name!r}, which is no file beside it")
        return file_of

    def _names_in(self, file_name: str) -> list[str]:
        path = self._folder / file_name
        if not path.exists():
            raise HfError(f"{path} is missing, and {INDEX} names it; get it again")
        try:
            self._files[file_name] = self._open.enter_context(safe_open(path, "numpy"))
        except (SafetensorError, OSError) as error:
            raise HfError(f"{path} is damaged ({_line(error)}); get it again") from error
        return list(self._files[file_name].keys())

    def _missing(self) -> str:
        pickles = sorted(path.name for path in self._folder.glob("*.bin"))
        if pickles:
            return (
                f"{self._folder} has {pickles[0]}, which is a pickle: reading it would run what is "
                "in it; get the model's safetensors files"
            )
        return f"{self._folder} has neither {SINGLE} nor {INDEX}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
