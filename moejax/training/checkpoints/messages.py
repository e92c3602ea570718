"""What to say of a checkpoint that cannot be read or written, and what the user can do."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from moejax.training.checkpoints.meta import CheckpointError, DamageError, saved_steps

NO_RIGHTS = ("PERMISSION_DENIED", "EACCES", "EPERM")
"""How tensorstore says that the file system refuses."""


def reason_of(error: BaseException) -> str:
    """Returns the first line of the error that a chain began with.

    What libraries add to it for their developers is left out.
    """
    while error.__cause__ is not None and not isinstance(error, DamageError):
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    first_line = text.splitlines()[0]
    additions = r" \[source locations=| \[tensorstore_spec|\. See full TensorStore"
    return re.split(additions, first_line)[0][:300]


def lacks_rights(error: BaseException) -> bool:
    """Whether it is the file system that refuses."""
    return isinstance(error, PermissionError) or any(word in str(error) for word in NO_RIGHTS)


def rights_or_copy(error: BaseException) -> str:
    """Returns the remedy for a folder that cannot be opened."""
    if lacks_rights(error):
        return f"give this user (id {os.getuid()}) the right to read and write it"
    return "restore it from a copy, or use another --workdir"


def unreadable(
    workdir: Path, step: int, error: Exception, array_names: Iterable[str]
) -> CheckpointError:
    """Returns the error to raise for a step that cannot be restored.

    Only what was proven is called damage.

    Args:
      workdir: the run directory.
      step: of the checkpoint.
      error: why it cannot be read.
      array_names: of the arrays that it should hold, one of which the error may name.
    """
    folder = workdir / "checkpoints" / str(step)
    reason = reason_of(error)
    if lacks_rights(error):
        return CheckpointError(f"{folder} cannot be read ({reason}); {rights_or_copy(error)}")
    remedy = _go_on_from_older(workdir, step)
    if isinstance(error, DamageError):
        return CheckpointError(f"{folder} is damaged ({reason}); {remedy}")
    names = [name for name in array_names if name in str(error)]
    place = f" at {max(names, key=len)}" if names else ""
    return CheckpointError(f"{folder} cannot be read{place} ({reason}); {remedy}")


def _go_on_from_older(workdir: Path, step: int) -> str:
    """Returns the remedy for a step that cannot be restored: a copy, or an older step."""
    older = [other for other in saved_steps(workdir) if other < step]
    if not older:
        return "restore it from a copy; no older step is saved"
    folder = workdir / "checkpoints" / str(step)
    move = shlex.join(["mv", str(folder), str(workdir / f"damaged-{step}")])
    return f"restore it from a copy, or go on from step {older[-1]} after: {move}"
