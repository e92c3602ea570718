"""Who may import whom: layers one way, one library one door. Read from the source, so nothing is
imported here.
"""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moejax"
FILES = sorted(PACKAGE.rglob("*.py"))

RANKS = [
    {"config", "extras", "lock_record", "locks", "paths", "seeds", "strict_json"},
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
    "orbax": ["training/checkpoints/checkpoint.py", "training/checkpoints/streamed.py"],
    "tensorflow_datasets": ["data/"],
    "grain": ["data/"],
    "ml_collections": ["config/", "cli/"],
    "absl": [
        "config/",
        "cli/",
        "kernels/grouped_matmul/tokamax.py",
    ],  # tokamax reads its options from absl flags
    "tokamax": ["kernels/"],
    "optuna": ["sweeps/"],
    "optuna_dashboard": ["sweeps/"],
    "sqlalchemy": ["sweeps/"],
    "submitit": ["sweeps/"],
    "matplotlib": ["inspection/figures/", "sweeps/report/"],
    # Pages, and chats of released models, whose templates run apart.
    "jinja2": ["inspection/", "sweeps/report/", "interop/hf/text/render.py"],
    "tokenizers": ["data/tokenizers/"],
    "sentencepiece": ["data/tokenizers/"],
    "panel": ["inspection/viewer/"],
    "bokeh": ["inspection/viewer/"],
}


OWN_WEIGHTS = (
    "moe/router/modules.py",
    "moe/dispatch/on_device.py",
)  # in folders that need no Flax else


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
                base = ".".join(
                    [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                )
            # `from a import b` may import the module a.b.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def layer_of(name):
    """The layer that a dotted name of moejax belongs to; None for the package itself and other
    libraries.
    """
    parts = name.split(".")
    return parts[1] if parts[0] == "moejax" and len(parts) > 1 and parts[1] in layers() else None


@functools.cache
def layers():
    return {dotted_name(path).split(".")[1] for path in FILES if dotted_name(path).count(".")} - {
        "__main__"
    }


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


def violations(check):
    """What `check(path)` finds in each file, in one list that names the file."""
    return [f"{inside(path)}: {found}" for path in FILES for found in check(path)]


def circles(knows):
    """Circles of a graph, each named by a node that reaches itself."""
    found = set()
    for start in knows:
        todo, seen = list(knows[start]), set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(knows.get(name, ()))
        if start in seen:
            found.add(start)
    return found


def test_every_part_of_the_package_has_a_rank():
    assert layers() <= set(RANK)
    assert {"config", "moe", "models", "training", "cli"} <= layers()


def test_imports_run_one_way():
    def check(path):
        own = layer_of(dotted_name(path))
        others = {layer_of(name) for name in imports(path)} - {None, own}
        # moejax/__init__.py and __main__.py have no layer.
        return [other for other in others if own and RANK[other] > RANK[own]]

    assert violations(check) == []


def test_neighbours_of_one_rank_do_not_import_each_other_both_ways():
    knows = {
        (layer_of(dotted_name(path)), layer_of(name)) for path in FILES for name in imports(path)
    }
    for one, other in knows:
        if one and other and one != other and RANK[one] == RANK[other]:
            assert (other, one) not in knows, f"{one} and {other} import each other"


def files_imported(path, names):
    """Files that a file imports; of `from package import file` the file, not the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in names else node.module)
    return found & names


def test_no_file_imports_itself_through_others():
    names = {dotted_name(path) for path in FILES}
    assert circles({dotted_name(path): files_imported(path, names) for path in FILES}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}


def test_no_folder_has_more_files_than_one_looks_through():
    # A file a verb, as `moejax --help` lists them.
    folders = {path.parent for path in FILES} - {PACKAGE / "cli/verbs"}
    counts = {
        inside(folder): len([*folder.glob("*.py")]) - 1 for folder in folders if folder != PACKAGE
    }
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def test_each_library_comes_in_by_its_own_door():
    def check(path):
        for name in imports(path):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None and not inside(path).startswith(tuple(doors)):
                yield name

    assert violations(check) == []


def test_no_file_imports_tests_or_recipes_or_experiments_or_notebooks():
    outside = {"tests", "oracle", "cases", "conftest", "configs", "experiments", "notebooks"}
    assert violations(lambda path: outside & {name.split(".")[0] for name in imports(path)}) == []


def test_routers_losses_dispatch_and_statistics_need_neither_flax_nor_a_mesh():
    folders = ("moe/router/", "moe/balancing/", "moe/dispatch/")
    files = [
        path
        for path in FILES
        if inside(path).startswith(folders) and inside(path) not in OWN_WEIGHTS
    ]
    assert len(files) >= 15 and all((PACKAGE / name).exists() for name in OWN_WEIGHTS)
    for path in files:
        names = reached(path)
        forbidden = ("flax", "jax.sharding", "moejax.sharding", "jax.experimental")
        assert [name for name in names if name.startswith(forbidden)] == [], inside(path)


def test_collectives_are_in_expert_parallel_alone():
    collectives = {
        "psum",
        "pmean",
        "all_gather",
        "all_to_all",
        "ppermute",
        "psum_scatter",
        "ragged_all_to_all",
    }
    users = {
        (inside(path), node.attr)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in collectives | {"shard_map"}
    }
    # Attention on parts of a sequence says which arrays it needs whole, and XLA moves them; nothing
    # moves between arms.
    others = {
        ("nn/attention/attend.py", "shard_map"),
        ("training/packed/arms.py", "shard_map"),
    }
    assert others < users
    assert {Path(file).parent.as_posix() for file, name in users - others} == {
        "moe/expert_parallel"
    }, users


def test_no_file_asserts_bare_or_is_longer_than_400_lines():
    def check(path):
        source = path.read_text()
        if source.count("\n") > 400:
            yield f"{source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assert):
                yield f"assert in line {node.lineno}"

    assert violations(check) == []


def test_no_nnx_transform_and_no_sow_is_used():
    transforms = {"jit", "grad", "value_and_grad", "scan", "remat", "vmap"}

    def check(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "sow":
                yield f"sow in line {node.lineno}"
            if (
                isinstance(node, ast.Attribute)
                and node.attr in transforms
                and getattr(node.value, "id", "") == "nnx"
            ):
                yield f"nnx.{node.attr} in line {node.lineno}"

    assert violations(check) == []


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
