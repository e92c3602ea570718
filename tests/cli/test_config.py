"""moejax config: every leaf with its value, default, range and meaning; docs/settings.md is new."""

import json
from pathlib import Path

import pytest

from moejax.cli import main
from moejax.config import declared, settings_page

REPOSITORY = Path(__file__).parents[2]
DEBUG = f"--config={REPOSITORY / 'configs/debug.py'}"


def printed(capsys, *arguments):
    assert main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_the_page_of_settings_is_what_the_leaves_declare():
    text = (REPOSITORY / "docs/settings.md").read_text()
    assert text == settings_page(), (
        "docs/settings.md is old; run: moejax config --markdown > docs/settings.md"
    )


def test_the_command_prints_the_page(capsys):
    assert printed(capsys, "--markdown") == settings_page()


def test_every_leaf_is_on_the_page_with_its_default_and_its_meaning():
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(declared())
    for row, (key, each) in zip(rows, declared().items(), strict=True):
        assert row.startswith(f"| `{key}` |") and row.endswith(" |") and row.count("|") == 6
        assert each.leaf.meaning
        assert str(each.default) in row


def test_json_has_every_leaf_with_what_is_known_of_it(capsys):
    overrides = ["--config.moe.top_k=1", "--config.moe.renormalize=False"]
    rows = json.loads(printed(capsys, DEBUG, *overrides, "--all", "--json"))
    assert list(rows) == list(declared())
    top_k = {"value": 1, "default": 2, "differs": True, "range": "at least 1"}
    assert rows["moe.top_k"] == rows["moe.top_k"] | top_k
    score = {"value": "softmax", "default": "auto", "differs": False, "derived": True}
    assert rows["moe.score"] == rows["moe.score"] | score
    assert rows["moe.sinkhorn_iterations"]["read"] is False
    assert rows["moe.sinkhorn_iterations"]["needs"] == "moe.router=sinkhorn"
    assert rows["moe.dispatch"]["choices"] == ["dropless", "capacity"]
    assert rows["optimizer.beta1"]["takes"] == "a number, at least 0 and below 1"


def test_a_recipe_is_shown_by_what_it_changes_and_without_one_all_is_shown(capsys):
    rows = json.loads(printed(capsys, DEBUG, "--json"))
    assert rows["model.d_model"]["value"] == 32 and "attention.rope_theta" not in rows
    assert all(row["value"] != row["default"] for row in rows.values())
    defaults = json.loads(printed(capsys, "--json"))
    assert list(defaults) == list(declared())
    table = printed(capsys, DEBUG, "--config.train.seed=3")
    assert "train.seed" in table and "attention.rope_theta" not in table
    assert "settings differ from their default; --all shows the others" in table


def test_what_nothing_reads_is_marked_in_the_table(capsys):
    lines = printed(capsys, DEBUG, "--all").splitlines()
    found = [line for line in lines if line.strip().startswith("moe.sinkhorn_iterations")]
    line = found[0]
    assert "not read here: it needs moe.router=sinkhorn" in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--markdown", "--json"], ["--markdown prints the same page"]),
        (
            [DEBUG, "--config.data.files=my.jsonl"],
            ["data.files='my.jsonl' does nothing", "data.source=files"],
        ),
        (
            [DEBUG, "--config.moe.num_experts=eight"],
            ["moe.num_experts='eight' must be a whole number"],
        ),
        ([DEBUG, "--config.model.remat=maybe"], ["model.remat='maybe' must be True or False"]),
        ([DEBUG, "--config.moe.router=topk"], ["moe.router='topk'", "the nearest is softmax_topk"]),
        ([DEBUG, "--config.data.source=txt"], ["data.source='txt'", "the nearest is files"]),
        ([DEBUG, "--config.moe.num_experts=-4"], ["moe.num_experts=-4 must be at least 0"]),
        ([DEBUG, "--config.train.seed=2147483648"], ["must be at least 0 and at most 2147483647"]),
        (
            [DEBUG, "--config.moe.num_experts=0", "--config.moe.top_k=1"],
            ["moe.top_k=1 does nothing in a dense model"],
        ),
        (
            [DEBUG, "--config.moe.exchange=ring"],
            ["moe.exchange=ring does nothing with mesh.expert=1"],
        ),
    ],
)
def test_a_setting_that_cannot_be_meant_is_one_line_with_the_remedy(arguments, parts, capsys):
    assert main(["config", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(part in error for part in parts), error
