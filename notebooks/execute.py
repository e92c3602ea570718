"""Runs notebooks top to bottom and keeps what they show: `make notebooks`.

  python notebooks/execute.py [FILE.ipynb ...]

The kernel is this interpreter, in the current folder. Without files, every notebook next to this
file is run in place.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).parent
TIMEOUT = 300  # seconds a cell


class ThisPython(AsyncKernelManager):
    """Starts kernels with this interpreter, not with the kernel that is called python3."""

    @property
    def kernel_spec(self):
        """How to start a kernel."""
        spec = super().kernel_spec
        spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return spec


def execute(
    notebook: nbformat.NotebookNode,
    folder: str | Path,
    *,
    timeout: int = TIMEOUT,
    env: dict[str, str] | None = None,
) -> None:
    """Runs all cells of a notebook, which gets their outputs.

    Args:
      notebook: as read.
      folder: where the kernel runs.
      timeout: of a cell, in seconds.
      env: the kernel's environment; by default that of this process.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
      nbclient.exceptions.CellTimeoutError: a cell took too long.
    """
    with tempfile.TemporaryDirectory() as sockets:  # instead of ports
        client = NotebookClient(
            notebook,
            km=ThisPython(transport="ipc", ip=f"{sockets}/kernel"),
            timeout=timeout,
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        client.reset_execution_trackers()
        with client.setup_kernel(cleanup_kc=True, env=os.environ.copy() if env is None else env):
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of who ran it last


def renew(path: Path) -> None:
    """Runs a notebook in place; its temporary folder, whose name says nothing, is in no output."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path.cwd(), env=os.environ | {"TMPDIR": folder})
        text = nbformat.writes(notebook)
        text = re.sub(rf"{re.escape(folder)}/\w+/", "", text)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for each in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
        print(f"Running {each.name}", flush=True)
        renew(each)
