"""A tensor as it is in a safetensors file."""

import dataclasses
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.interop.hf.errors import ConversionInterruptedError, HfError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}
"""The types that are read, by how a header calls them."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is.

    Attributes:
      name: of the tensor.
      path: of its file.
      type: how the header calls its type, such as F32.
      shape: of the tensor.
      offset: of its first byte in the file.
    """

    name: str
    path: Path
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """Of the values; of a type that is one of `DTYPES`."""
        return DTYPES[self.type]

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns the tensor, or some of its rows.

        Raises:
          HfError: the file ends too early, or values are not finite.
        """
        values = self.read_raw(rows)
        if not np.isfinite(values).all():
            raise HfError(f"{self.name} holds values that are not finite; get the files again")
        return values

    def read_raw(self, rows: slice | None = None) -> np.ndarray:
        """Returns the tensor or some of its rows, whatever the values are."""
        shape = self.shape
        offset = self.offset
        if rows is not None:
            row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
            start, stop, _ = rows.indices(shape[0])
            offset += start * row_bytes
            shape = (stop - start, *shape[1:])
        num_bytes = math.prod(shape) * self.dtype.itemsize
        try:
            data = np.fromfile(self.path, np.uint8, num_bytes, offset=offset)
        except OSError as error:
            raise ConversionInterruptedError(
                f"{self.name} of {self.path} cannot be read ({error}); look at the file system, "
                "and run the command again"
            ) from error
        if data.size != num_bytes:
            raise HfError(f"{self.path} ends within {self.name}; get it again")
        return data.view(self.dtype).reshape(shape)
