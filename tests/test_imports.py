"""Who may import whom: layers one way, one library one door. Read from the source, so nothing is imported here."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moejax"
FILES = sorted(PACKAGE.rglob("*.py"))

RANKS = [
    {"config", "extras", "locks", "paths", "seeds", "strict_json"},
    {"kernels", "sharding", "compilation_cache"},
    {"moe"},
    {"nn"},
    {"models"},
    {"data", "training", "planning", "interop", "inference"},
    {"inspection"},
    {"sweeps"},
    {"benchmarks"},
    {"cli"},
]
RANK = {layer: rank for rank, layers in enumerate(RANKS) for layer in layers}

DOORS = {
    "orbax": ["training/checkpoint.py"],
    "tensorflow_datasets": ["data/"],
    "grain": ["data/"],
    "ml_collections": ["config/", "cli/"],
    "absl": ["config/", "cli/", "kernels/grouped_matmul/tokamax.py"],  # tokamax reads its options from absl flags
    "tokamax": ["kernels/"],
    "optuna": ["sweeps/"],
    "optuna_dashboard": ["sweeps/"],
    "sqlalchemy": ["sweeps/"],
    "submitit": ["sweeps/"],
    "matplotlib": ["inspection/"],
    "panel": ["inspection/"],
    "bokeh": ["inspection/"],
}


def dotted_name(path):
    """`moejax.moe.layer` of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path):
    """Dotted names of what a file imports, anywhere in it; relative imports made absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            # `from a import b` may import the module a.b.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def layer_of(name):
    """The layer that a dotted name of moejax belongs to; None for the package itself and other libraries."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moejax" and len(parts) > 1 and parts[1] in layers() else None


@functools.cache
def layers():
    return {dotted_name(path).split(".")[1] for path in FILES if dotted_name(path).count(".")} - {"__main__"}


@functools.cache
def reached(path):
    """Everything a file imports, directly or through files of moejax."""
    by_name = {dotted_name(file): file for file in FILES}
    todo, seen, found = [path], {path}, set()
    while todo:
        for name in imports(todo.pop()):
            found.add(name)
            # Importing a.b.c runs a, a.b and a.b.c.
            for depth in range(1, name.count(".") + 2):
                file = by_name.get(".".join(name.split(".")[:depth]))
                if file and file not in seen:
                    seen.add(file)
                    todo.append(file)
    return found


def inside(path):
    return path.relative_to(PACKAGE).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=inside)


def test_every_part_of_the_package_has_a_rank():
    assert layers() <= set(RANK)
    assert {"config", "moe", "models", "training", "cli"} <= layers()


@every_file
def test_imports_run_one_way(path):
    own = layer_of(dotted_name(path))
    if own is None:
        return  # moejax/__init__.py and __main__.py
    for name in imports(path):
        other = layer_of(name)
        if other is None or other == own:
            continue
        assert RANK[other] <= RANK[own], f"{inside(path)} imports {name}"
        # Neighbours of one rank may know each other in one direction; config.py and sharding.py are files of their own.


def test_neighbours_of_one_rank_do_not_import_each_other_both_ways():
    knows = {(layer_of(dotted_name(path)), layer_of(name)) for path in FILES for name in imports(path)}
    for one, other in knows:
        if one and other and one != other and RANK[one] == RANK[other]:
            assert (other, one) not in knows, f"{one} and {other} import each other"


@every_file
def test_each_library_comes_in_by_its_own_door(path):
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or any(inside(path).startswith(door) for door in doors), f"{inside(path)} imports {name}"


@every_file
def test_nobody_imports_tests_or_recipes_or_experiments_or_notebooks(path):
    outside = {"tests", "oracle", "conftest", "configs", "experiments", "notebooks"}
    assert not outside & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in FILES
        if inside(path).startswith("moe/routers/")
        or inside(path) in ("moe/balance.py", "moe/dispatch.py", "moe/stats.py")
    ],
    ids=inside,
)
def test_routers_losses_dispatch_and_statistics_need_neither_flax_nor_a_mesh(path):
    names = reached(path)
    assert not [name for name in names if name.split(".")[0] == "flax"]
    assert not [name for name in names if name.startswith(("jax.sharding", "moejax.sharding", "jax.experimental"))]


def test_the_files_that_need_neither_flax_nor_a_mesh_exist():
    assert len([path for path in FILES if inside(path).startswith("moe/routers/")]) >= 2
    assert all((PACKAGE / "moe" / name).exists() for name in ("balance.py", "dispatch.py", "stats.py"))


def test_collectives_are_in_the_exchange_alone():
    collectives = {"psum", "pmean", "all_gather", "all_to_all", "ppermute", "psum_scatter", "ragged_all_to_all"}
    users = {
        (inside(path), node.attr)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in collectives | {"shard_map"}
    }
    # Attention on parts of a sequence says which arrays it needs whole, and XLA moves them; nothing moves between arms.
    others = {("nn/attention.py", "shard_map"), ("training/packed.py", "shard_map")}
    assert {file for file, name in users - others} == {"moe/exchange.py"}, users


@every_file
def test_no_file_asserts_bare_or_is_longer_than_400_lines(path):
    source = path.read_text()
    assert source.count("\n") <= 400
    assert not [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


@every_file
def test_no_nnx_transform_and_no_sow_is_used(path):
    transforms = {"jit", "grad", "value_and_grad", "scan", "remat", "vmap", "sow"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in transforms:
            assert getattr(node.value, "id", "") != "nnx" and node.attr != "sow", f"{inside(path)}:{node.lineno}"


def test_no_file_is_a_drawer_for_odds_and_ends():
    assert not {"utils", "util", "common", "helpers", "misc"} & {path.stem for path in FILES}


def test_a_forbidden_import_would_be_seen_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "moejax" / "moe" / "layer.py"
    file.parent.mkdir(parents=True)
    for line, name in [
        ("import moejax.training.step", "moejax.training.step"),
        ("from moejax import training", "moejax.training"),
        ("from ..training import step", "moejax.training.step"),
        ("def f():\n    from moejax.training.step import train", "moejax.training.step"),
    ]:
        file.write_text(line)
        imports.cache_clear()
        assert name in imports(file), line
    imports.cache_clear()
