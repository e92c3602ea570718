"""A comparison notices each kind of difference, and names what it cannot compare."""

import functools
import json

import numpy as np
import pytest

from cases.hf import FOLDER, reference
from moejax.cli import main
from moejax.interop.hf.conversion.compare import compare, read_reference
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config

MIXTRAL = FOLDER / "mixtral"


@functools.cache
def mixtral():
    return load_model(MIXTRAL), read_config(MIXTRAL)[1]


def test_a_difference_of_any_array_is_noticed_and_named():
    arrays = reference("mixtral")
    names = [
        "logits",
        "final_hidden",
        "hidden.0",
        "hidden.3",
        "attn_out.1",
        "mlp_in.2",
        "mlp_out.0",
        "router.1.logits",
        "router.2.combine",
        "aux_loss",
        "loss_lm",
        "loss_total",
        "grad.model.layers.0.input_layernorm.weight",
        "gradtotal.model.layers.1.block_sparse_moe.gate.weight",
        "lpad.logits",
        "rpad.logits",
        "rpad.loss_lm",
        "lpad.aux_loss",
        "gen.logits",
        "lpad.gen.logits",
    ]
    changed = dict(arrays)
    for name in names:
        moved = np.array(arrays[name], np.float64)
        moved.reshape(-1)[0] += 1e-3 * np.abs(moved).max()
        changed[name] = moved
    found = compare(*mixtral(), changed)
    assert sorted(each.name for each in found.differences if not each.is_within) == sorted(names)
    assert not found.agrees


def test_other_experts_and_other_tokens_are_noticed():
    changed = dict(reference("mixtral"))
    indices_TK = changed["router.1.indices"].copy()
    indices_TK[5, 0] = (indices_TK[5].max() + 1) % 8
    while len(set(indices_TK[5])) < 2:
        indices_TK[5, 0] = (indices_TK[5, 0] + 1) % 8
    changed["router.1.indices"] = indices_TK
    tokens_BL = changed["lpad.gen.tokens"].copy()
    tokens_BL[1, -1] += 1
    changed["lpad.gen.tokens"] = tokens_BL
    found = compare(*mixtral(), changed)
    assert found.experts_agree == {"router.0": True, "router.1": False, "router.2": True}
    assert found.tokens_agree == {"gen.tokens": True, "lpad.gen.tokens": False}
    assert all(each.is_within for each in found.differences)
    assert not found.agrees


def test_arrays_that_correspond_to_nothing_are_listed():
    few = {name: reference("mixtral")[name] for name in ("input_ids", "logits")}
    found = compare(*mixtral(), few | {"attention_maps": np.ones(3)})
    assert [each.name for each in found.differences] == ["logits"]
    assert found.not_compared == ["attention_maps"]
    assert found.agrees


def test_a_reference_without_anything_to_compare_is_refused():
    ids = reference("mixtral")["input_ids"]
    with pytest.raises(HfError, match=r"no array that is known here.*it has input_ids, logit"):
        compare(*mixtral(), {"input_ids": ids, "logit": ids})


def test_not_a_number_is_within_no_tolerance():
    arrays = {name: reference("mixtral")[name] for name in ("input_ids", "logits")}
    logits_BLV = arrays["logits"].copy()
    logits_BLV[0, 0, 0] = np.nan
    found = compare(*mixtral(), arrays | {"logits": logits_BLV}, tolerance=np.inf)
    assert not found.agrees


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": np.full((2, 5), 257)}, "input_ids of the reference must be rows of token"),
        ({"input_ids": np.zeros(5, np.int32)}, "input_ids of the reference must be rows of token"),
        ({"input_ids": np.zeros((2, 5))}, "input_ids of the reference must be rows of token"),
        ({"lpad.input_ids": np.full((1, 2), -1)}, r"lpad\.input_ids of the reference must be"),
        ({"final_hidden": np.zeros((2, 33, 9))}, r"final_hidden has the shape \(2, 33, 9\)"),
    ],
)
def test_a_reference_of_another_model_is_refused(change, words):
    arrays = {name: reference("mixtral")[name] for name in ("input_ids", "logits")}
    with pytest.raises(HfError, match=words):
        compare(*mixtral(), arrays | change)


def test_files_that_are_no_reference_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(HfError, match="is no file of arrays"):
        read_reference(path)
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(HfError, match="is no file of arrays"):
        read_reference(path)
    np.savez(path, logits=np.ones(3))
    with pytest.raises(HfError, match="has no input_ids"):
        read_reference(path)
    np.savez(path, input_ids=np.array([{"run": "me"}], object))
    with pytest.raises(HfError, match="is no file of arrays"):
        read_reference(path)


def test_the_command_prints_a_document_and_exits_1_beyond_a_tolerance(tmp_path, capsys):
    few = {name: reference("mixtral")[name] for name in ("input_ids", "logits")}
    path = tmp_path / "reference.npz"
    np.savez(path, **few)
    command = ["convert", f"--hf={MIXTRAL}", f"--compare={path}"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is True
    assert 0 < found["arrays"]["logits"]["relative"] < 2e-5
    assert found["arrays"]["logits"]["tolerance"] == 2e-5
    assert main([*command, "--tolerance=1e-9"]) == 1
    out, error = capsys.readouterr()
    assert "logits" in out
    assert "logits by" in error
    assert "at most 1e-09 is tolerated" in error
