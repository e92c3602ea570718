"""The record of a lock: which process holds it, in JSON."""

import dataclasses
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its record says.

    Attributes:
      pid: of the process; 0 if the record cannot be read.
      host: its machine.
      boot: identifies the machine from its start on; two machines may have one name.
      since: local time at which the lock was taken.
      does: what the process does, such as "train".
      nonce: differs between any two holders.
    """

    pid: int = 0
    host: str = "?"
    boot: str = ""
    since: str = "?"
    does: str = "?"
    nonce: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return "a process that cannot be named"
        return f"process {self.pid} on {self.host} ({self.does}, since {self.since})"


def parse_holder(record: bytes) -> Holder:
    """Returns the holder that a record names.

    The holder is unknown, with `pid` 0, if the record is torn or was not written by moejax.
    """
    try:
        values: dict[str, Any] = json.loads(record.decode())
        known: dict[str, Any] = {}
        for field in dataclasses.fields(Holder):
            value = values[field.name]
            if type(value) is type(field.default):
                known[field.name] = value
        return Holder(**known)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder()


def this_process(does: str) -> Holder:
    """Returns this process as a new holder, which does `does`."""
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        boot=boot_id(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        does=does,
        nonce=uuid.uuid4().hex,
    )


def boot_id() -> str:
    """Returns what identifies this machine since its start.

    Where the system does not say, that is its network address and name.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x} {socket.gethostname()}"
