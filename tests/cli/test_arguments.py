"""Wrong command lines: one line says what was typed and what to write, exit 2, nothing is made."""

import json
import os
import sys
from pathlib import Path

import pytest

from moejax.cli import VERBS, main

REPOSITORY = Path(__file__).parents[2]
DEBUG = str(REPOSITORY / "configs/debug.py")
TRAIN = ["train", f"--config={DEBUG}"]
SWEEP = ["sweep", f"--config={DEBUG}"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs a wrong command line in an empty folder, and returns its error."""
    monkeypatch.chdir(tmp_path)

    def run(arguments):
        before = sorted(tmp_path.iterdir())
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == "", arguments
        assert captured.err.startswith("moejax: ") and captured.err.count("\n") == 1, captured.err
        assert sorted(tmp_path.iterdir()) == before, arguments
        return captured.err

    return run


COMMAND_LINES = [
    ([*TRAIN, "moe.num_experts=8"], "write --config.moe.num_experts=8"),
    ([*TRAIN, "config.moe.num_experts=8"], "write --config.moe.num_experts=8"),
    ([*TRAIN, "moe.num_expert=8"], "the nearest is moe.num_experts"),
    ([*TRAIN, "num_steps=8"], "write --config.train.num_steps=8"),
    ([*TRAIN, "workdir=runs/x"], "write --workdir=runs/x"),
    ([*TRAIN, "--json", "true"], "--FLAG=true"),
    ([*TRAIN, "--", "--json"], "takes flags alone, not --json"),
    ([*TRAIN, "-"], "takes flags alone, not -"),
    (["train", DEBUG], f"write --config={DEBUG}"),
    (["train", "x.py:wide"], "write --config=x.py:wide"),
    (
        [f"--config={DEBUG}", "train"],
        f"stands before the verb; write moejax train --config={DEBUG}",
    ),
    (["--json", "--workdir=x"], "the verb is missing"),
    ([DEBUG], f"write moejax train --config={DEBUG}"),
    (["help", "banana"], "banana is not a verb"),
    ([*TRAIN, "--lr=0.1"], "write --config.optimizer.learning_rate=0.1"),
    ([*TRAIN, "--learning_rate=0.1"], "write --config.optimizer.learning_rate=0.1"),
    ([*TRAIN, "--moe.num_experts=8"], "write --config.moe.num_experts=8"),
    ([*TRAIN, "--config.num_experts=8"], "the nearest is moe.num_experts"),
    ([*TRAIN, "--dir=runs/x"], "write --workdir=runs/x"),
    ([*TRAIN, "--wrokdir=runs/x"], "the nearest is --workdir"),
    ([*TRAIN, "--undefok=typo", "--typo=1"], "--undefok is no flag of moejax train"),
    ([*TRAIN, "--flagfile=flags.txt"], "--flagfile is no flag of moejax train"),
    ([*SWEEP, "--workdir=runs/x", "moe.top_k=1,2"], "write --dir=runs/x"),
    ([*TRAIN, "--workdir=a", "--workdir=b"], "--workdir is given twice, as a and as b"),
    ([*TRAIN, "--json", "--nojson"], "--json is given twice, as true and as false"),
    (
        [*TRAIN, "--config.moe.top_k=1", "--config.moe.top_k=2"],
        "--config.moe.top_k is given twice, as 1 and as 2",
    ),
    ([*TRAIN, "--config=x.py"], f"--config is given twice, as {DEBUG} and as x.py"),
    ([*TRAIN, "--workdir"], "--workdir lacks its value"),
    ([*TRAIN, "--workdir="], "--workdir= has an empty value"),
    ([*SWEEP, "--storage", ""], "--storage= has an empty value"),
    ([*TRAIN, "--workdir", "--json"], "--workdir lacks its value"),
    (
        ["train", "--config.moe.top_k=1"],
        "--config.moe.top_k=1 changes a recipe, and --config is missing",
    ),
    ([*TRAIN, "--config.moe.num_experts=eight"], "moe.num_experts"),
    ([*TRAIN, "--config.model.remat=maybe"], "model.remat"),
    (
        ["eval", "--workdir=.", "--config=x.py"],
        "takes the configuration that its run was trained with",
    ),
    (
        ["eval", "--workdir=.", "--config.moe.top_k=1"],
        "takes the configuration that its run was trained with",
    ),
    (["eval", "--workdir=.", "--top_k=1"], "takes the configuration that its run was trained with"),
    (["eval", "."], "write --workdir=."),
    (["placement", "--workdir=.", "--devices=two"], "--devices=two must be an integer"),
    (["generate", "--workdir=.", "--temperature=hot"], "--temperature=hot must be a number"),
    (["generate", "--workdir=.", "--temp=1"], "write --temperature=1"),
    (
        ["generate", "--workdir=.", "--seed=-1"],
        "--seed=-1 must be an integer in the range [0, 2147483647]",
    ),
    (
        ["generate", "--workdir=.", "--seed=4294967296"],
        "--seed=4294967296 must be an integer in the range",
    ),
    (["generate", "--workdir=.", f"--seed={10**40}"], "must be an integer in the range"),
    (
        [*SWEEP, "--search=random", "--search_seed=-1", "moe.top_k=1,2"],
        "--search_seed=-1 must be an integer in",
    ),
    ([*SWEEP, "--seeds=0"], "--seeds=0 must be at least 1"),
    (
        [*SWEEP, "--dry-run", "moe.num_experts=log:4..8"],
        "moe.num_experts=log:4..8: a range is of fractions",
    ),
    (
        [*SWEEP, "--dry-run", "optimizer.learning_rate=log:2..1:3"],
        "optimizer.learning_rate from 2 to 1 is no range",
    ),
    ([*SWEEP, "--cores=0", "moe.top_k=1,2"], "--cores=0 is for moejax sweep work"),
    ([*SWEEP, DEBUG], f"write --config={DEBUG}"),
    (["sweep", "report", "a", "--seeds=3"], "--seeds=3 is not for moejax sweep report"),
    (["sweep", "report", "a", "b"], "name one sweep"),
    (["sweep", "work", "--dir=.", "--cores=a"], "--cores=a must be numbers of cores"),
    (["sweep", "dashboard", "--storage=no.journal"], "there is no study in"),
    (["sweep", "dashboard", "--storage=no.db"], "there is no study in"),
    (["sweep", "worker", "--storage=no.journal", "--study=s"], "there is no study 's'"),
    (
        ["bench", "layer", f"--config={DEBUG}"],
        "--config belongs to moejax bench compiled_step, step",
    ),
    (
        ["bench", "import", f"--config={DEBUG}"],
        "--config belongs to moejax bench compiled_step, step",
    ),
    (
        ["bench", "import", "--config.moe.top_k=1"],
        "--config.moe.top_k=1 changes a recipe, and --config is missing",
    ),
    ([*TRAIN, "--wait_s=7"], "--wait_s=7 needs --distributed or --coordinator"),
    (["doctor", "--wait_s=7"], "--wait_s=7 needs --distributed or --coordinator"),
    (
        ["doctor", f"--config={DEBUG}", "--mesh=expert=2,data=1,expert=4"],
        "expert is given 2 times; give each axis once",
    ),
    (
        ["sweep", "worker", "--study=s", "--storage=no.journal", "--config.moe.top_k=1"],
        "--config.moe.top_k=1",
    ),
    (
        ["bench", "compiled", "--target=h10"],
        "--target=h10 must be one of h100, b200, v5p, v6e; the nearest is h100",
    ),
    (["report", "a", "b"], "a is not a folder"),
    ([*TRAIN, "--workdir=p[1]/run"], "has [ in it, which is read as a pattern"),
    ([*SWEEP, "--dir=p*", "moe.top_k=2,3"], "has * in it, which is read as a pattern"),
    (["eval", "postgresql://u:SECRET@h/d"], "not ***; leave it out"),
    (
        ["sweep", "--storage=postgresql:/u:SECRET@h", "--storage=postgresql://u:SECRET@h"],
        "--storage is given twice",
    ),
    (
        ["--storage=postgresql://u:SECRET@h", "sweep"],
        "*** stands before the verb; write moejax sweep ***",
    ),
    (["report", "--workdir=.", "--output=x.html"], "--output=x.html is for comparisons"),
]


def test_a_wrong_command_line_is_one_line_that_says_what_to_write(refused):
    for arguments, fragment in COMMAND_LINES:
        error = refused(arguments)
        assert fragment in error and "SECRET" not in error, (arguments, error)


PATHS = {
    "gs://bucket/x": "buckets are not supported yet",
    "s3://bucket/x": "buckets are not supported yet",
    "https://host/x": "buckets are not supported yet",
    "a\0b": "cannot be a path",
    "~nosuchuser/x": "",
    "\udce9": "is not UTF-8",
}
FLAGS_OF_PATHS = [
    ["train", "--config=CONFIG", "--workdir=PATH"],
    ["train", "--config=PATH"],
    ["eval", "--workdir=PATH"],
    ["generate", "--workdir=PATH"],
    ["report", "--workdir=PATH"],
    ["report", "PATH", "PATH"],
    ["view", "--workdir=PATH"],
    ["placement", "--workdir=PATH"],
    ["counterfactuals", "--workdir=PATH"],
    ["sweep", "--config=CONFIG", "--dir=PATH", "moe.top_k=1,2"],
    ["sweep", "report", "PATH"],
    ["sweep", "work", "--dir=PATH"],
    ["sweep", "worker", "--study=s", "--storage=s.journal", "--dir=PATH"],
    ["bench", "layer", "--csv=PATH"],
    ["doctor", "--config=PATH"],
]
WRITERS = [
    words
    for words in FLAGS_OF_PATHS
    if words[0] in ("sweep", "bench") or "--config=CONFIG" in words
]


def test_a_path_that_cannot_work_is_refused_by_every_flag_that_takes_one(refused):
    for words in FLAGS_OF_PATHS:
        for path, fragment in PATHS.items():
            arguments = [word.replace("PATH", path).replace("CONFIG", DEBUG) for word in words]
            error = refused(arguments)
            printable_part = path.split("\0")[0].strip("\udce9")
            is_named = printable_part in error or words[:2] == ["sweep", "report"]
            assert fragment in error and is_named, (arguments, error)


def test_a_home_folder_is_expanded_and_refused_first_if_it_cannot_be_written(
    refused, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home))
    for words in FLAGS_OF_PATHS:
        arguments = [word.replace("PATH", "~/file/x").replace("CONFIG", DEBUG) for word in words]
        error = refused(arguments)
        assert "file/x" in error
        if words in WRITERS:
            assert "cannot be written" in error and f"{home}/file is not a folder" in error, error
    (home / "read-only").mkdir(mode=0o500)
    for words in WRITERS if os.getuid() else []:  # root may write anywhere
        arguments = [
            word.replace("PATH", "~/read-only/x").replace("CONFIG", DEBUG) for word in words
        ]
        assert "cannot be written" in refused(arguments)


def test_a_word_that_means_nothing_to_a_verb_is_refused_by_every_verb(refused):
    for verb in VERBS:
        for word in ("banana", "moe.num_experts=8", "--banana", "--banana=3"):
            config = [f"--config={DEBUG}"] if verb in ("train", "sweep", "ladder", "config") else []
            is_axis = "=" in word and not word.startswith("-")
            if verb in ("sweep", "ladder") and is_axis:
                continue
            error = refused([verb, *config, word])
            name = word.lstrip("-").partition("=")[0]
            message = error.removeprefix("moejax: ")
            assert name in error, error
            assert "; " in error or ": " in message, error


RECIPE = "from ml_collections import ConfigDict\nfrom moejax import config as c\n"
GET = f"{RECIPE}def get_config():\n    config = c.default()\n"
UNUSABLE_RECIPES = [
    ("import no_such_module\n", "line 1: No module named 'no_such_module'; install it"),
    ("from . import other\n", "line 1: `from . import other` is relative"),
    ("def get_config(:\n", "line 1: invalid syntax: def get_config(:"),
    (f"{GET}    return {{}}['a']\n", "line 5: KeyError: 'a', at `return {}['a']`"),
    (
        f"{GET}    config.moe.num_expert = 4\n",
        "moe.num_expert is not a config key; the nearest is moe.num_experts",
    ),
    (
        f"{GET}    config.mode.d_model = 4\n",
        "line 5: mode is not a config key; the nearest is model",
    ),
    (
        f"{GET}    config['moe']['top_q'] = 4\n",
        "line 5: moe.top_q is not a config key; the nearest is moe.top_k",
    ),
    (
        f"{GET}    config.moe.num_experts = '8'\n",
        "line 5: `config.moe.num_experts = '8'`: num_experts=8 is str",
    ),
    (GET, "line 3: get_config returns nothing; end it with `return config`"),
    (f"{RECIPE}config = c.default()\n", "has no function get_config"),
    ("get_config = 3\n", "has no function get_config"),
    (
        "def get_config(arg):\n    return {}\n",
        "get_config needs an argument; write --config=recipe.py:ARG",
    ),
    (
        "def get_config():\n    return [1]\n",
        "get_config returns list; it must return a ConfigDict",
    ),
    (
        "def get_config():\n    return {'moe': {'num_expert': 3}}\n",
        "moe.num_expert is not a config key",
    ),
    ("import sys\nsys.exit(3)\n", "line 2: `sys.exit(3)` ends the program"),
    (
        "def f():\n    raise ValueError('a: b')\ndef get_config():\n    f()\n",
        "line 2: ValueError: a: b, at `raise",
    ),
    ("x = '\udcff'\n", "invalid start byte"),
]


def test_a_recipe_that_fails_is_one_line_with_its_place_and_the_cause(refused, tmp_path):
    recipe = tmp_path / "recipe.py"
    for text, fragment in UNUSABLE_RECIPES:
        recipe.write_bytes(text.encode(errors="surrogateescape"))
        error = refused(["train", "--config=recipe.py"])
        is_file_named = "recipe.py" in error or "return {'moe'" in text
        assert fragment in error and is_file_named, (text, error)
    recipe.write_text("def get_config():\n    return {}\ndef sweep():\n    yield 1 / 0\n")
    assert "recipe.py, line 4: ZeroDivisionError" in refused(["sweep", "--config=recipe.py"])
    recipe.write_text("1 / 0\n")
    with pytest.raises(ValueError, match="line 1: ZeroDivisionError"):
        main(["train", "--config=recipe.py", "--debug"])


def test_the_argument_of_a_recipe_reaches_it_or_is_refused(refused, tmp_path):
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    error = refused(["train", "--config=plain.py:wide"])
    assert "get_config takes no argument; leave :wide out" in error
    (tmp_path / "a:b.py").write_text("def get_config(arg):\n    raise ValueError(arg)\n")
    assert "ValueError: c:d" in refused(["train", "--config=a:b.py:c:d"])
    with_arguments = {
        "attention.py": "attention has no kind banana; use windows, chunks, latent",
        "fork.py": "fork has no banana; use trunk, decay, experts, frozen, upcycle, drop, granular",
        "gpt_oss_shapes.py": "gpt-oss has no size banana; use 20b or 120b",
        "norms.py": "norms has no kind banana; use sandwich, post, parallel, granite",
        "optimizers.py": "optimizers has no banana; use muon, muonh, adafactor, lion, sgd",
    }
    for path in sorted((REPOSITORY / "configs").rglob("*.py")):
        expected = with_arguments.get(path.name, "takes no argument")
        assert expected in refused(["sweep", f"--config={path}:banana"]), path


def test_the_error_about_a_missing_recipe_gives_the_nearest_names(refused, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/debug.py").write_text("")
    (tmp_path / "configs/text.json").write_text("{}")
    guess = "did you mean --config=configs/debug.py?"
    in_folder = "is a folder; name a recipe in it, such as --config=configs/debug.py"
    for arguments, fragment in (
        (["train", "--config=configs/debug"], guess),
        (["train", "--config=debug"], guess),
        (["sweep", "--config=config/debgu.py"], guess),
        (["train", "--config=configs"], in_folder),
        (["train", "--config=configs/text.json"], "is no recipe, which is a Python file"),
        (["train", "--config=xyz"], "such as --config=configs/tiny_moe.py"),
    ):
        assert fragment in refused(arguments), arguments


def test_the_recipe_its_settings_and_other_flags_come_in_any_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    orders = [
        ["--config.moe.top_k=1", "--dry-run", "--config", DEBUG, "moe.num_experts=4,8", "--json"],
        [
            f"-config={DEBUG}",
            "moe.num_experts=4,8",
            "--json",
            "--dry-run",
            "--config.moe.top_k",
            "1",
        ],
    ]
    found = []
    for order in orders:
        assert main(["sweep", *order, "--config.moe.renormalize=false"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["arms"] == 2


def test_help_is_short_and_says_where_settings_are(capsys):
    for verb in VERBS:
        texts = []
        for arguments in ([verb, "--help"], ["help", verb], ["--help", verb]):
            assert main(arguments) == 0
            texts.append(capsys.readouterr().out)
        first, *others = texts
        assert others == [first, first] and first.startswith(f"moejax {verb}: ")
        assert first.count("\n") < 60 and "d_model" not in first, verb
    assert main(["train", "--help"]) == 0
    assert "--helpfull lists all" in capsys.readouterr().out
    assert main(["train", "--helpfull"]) == 0
    assert "--config.moe.top_k=2" in capsys.readouterr().out


def test_a_terminal_without_a_character_shows_it_as_an_escape(monkeypatch):
    for encoding in ("ascii", "latin-1", "cp1252"):
        read, write = os.pipe()
        with os.fdopen(write, "w", encoding=encoding) as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert main(["help"]) == 0
            print("日本 \udce9 é")
        with os.fdopen(read, "rb") as shown:
            last = shown.read().splitlines()[-1].decode(encoding)
        assert last.startswith("\\u65e5\\u672c \\udce9 ") and last[-1] in "é9"
        monkeypatch.undo()
