"""The notebooks: they run from top to bottom, are short, and are committed as they ran."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_LINES = 10  # of a definition
MAX_BYTES = 1_000_000
CELL_SECONDS = 180  # against cells that hang; other work may run at the same time
MACHINE = re.compile(
    r"(?<![\w.])/(tmp|root|work|home|Users|content|var|opt)/|https?://|localhost|\b\d+(\.\d+){3}\b"
)
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=]+")

of_each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def load_execute():
    """Returns the module `notebooks/execute.py`, which is in no package."""
    path = ROOT / "notebooks" / "execute.py"
    spec = importlib.util.spec_from_file_location("execute_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows_something(cell):
    """Whether a cell ends in a value, a plot or a print."""
    return isinstance(ast.parse(cell.source).body[-1], ast.Expr)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of kernels, which import this checkout and do little.

    They share a run and a compilation cache.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MOEJAX_STEPS": "12",
    }
    for name in ("MOEJAX_RUN", "MOEJAX_RUNS", "MOEJAX_HF", "MOEJAX_FILES"):
        env.pop(name, None)
    (cell,) = [cell for cell in nbformat.read(PATHS[0], as_version=4).cells if cell.id == "run"]
    # As the notebook trains a run where there is none.
    script = f"{cell.source}\nprint(os.path.abspath(RUN))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.splitlines()[-1])
    return env | {"MOEJAX_RUN": str(run), "MOEJAX_RUNS": str(run.parents[1])}


def test_there_are_notebooks():
    assert len(PATHS) == 6


@pytest.mark.slow
@of_each
def test_a_notebook_runs_from_top_to_bottom(path, environment, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    load_execute().execute(notebook, tmp_path, timeout=CELL_SECONDS, env=environment)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert cell.outputs or not shows_something(cell), cell.source


@of_each
def test_definitions_are_short(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MAX_LINES, f"{cell.id}: {ast.unparse(node)[:60]} has {lines} lines"


@of_each
def test_a_notebook_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        has_output = cell.outputs or not shows_something(cell)
        assert has_output, f"{cell.id} has no output; run `make notebooks`"
        assert not any(output.output_type == "error" for output in cell.outputs), cell.id
    assert path.stat().st_size < MAX_BYTES


@of_each
def test_a_notebook_says_nothing_about_the_machine_it_ran_on(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
        text = BASE64.sub("", json.dumps(cell))
        assert not MACHINE.search(text), f"{cell.id}: {MACHINE.search(text)}"
