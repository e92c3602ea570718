"""Eight ways in which a file can be damaged."""

import shutil

WAYS = ("bit", "first byte", "truncated", "emptied", "removed", "folder", "random", "extended")


def damage(path, how, rng):
    """Damages a file.

    Args:
      path: where it is.
      how: one of `WAYS`.
      rng: a NumPy generator, which says where.
    """
    raw = bytearray(path.read_bytes())
    if how == "bit":
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    elif how == "first byte":
        raw[0] ^= 0xFF
    elif how == "truncated":
        del raw[len(raw) // 2 :]
    elif how == "emptied":
        raw.clear()
    elif how == "random":
        raw[:] = rng.bytes(len(raw))
    elif how == "extended":
        raw += rng.bytes(64)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "removed":
        path.write_bytes(raw)


def restore(path, raw):
    """Puts a damaged file back."""
    if path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(raw)
