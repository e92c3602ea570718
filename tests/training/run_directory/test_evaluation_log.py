"""The files of evaluations: what they hold, churn, and what a resumed run removes."""

import dataclasses

import numpy as np
import pytest

from moejax.training.evaluation import Evaluation
from moejax.training.run_directory.evaluation_log import (
    FOLDER,
    EvaluationError,
    EvaluationLog,
    read_evaluation,
)

N, T, K, E = 2, 6, 2, 4


def evaluation(seed):
    rng = np.random.default_rng(seed)
    choices = [rng.permutation(E)[:K] for _ in range(N * T)]
    return Evaluation(
        loss=1.0,
        perplexity=2.7,
        bits_per_byte=1.0,
        num_targets=9,
        load_NE=np.full((N, E), 0.25, np.float32),
        coactivation_NEE=np.ones((N, E, E), np.int32),
        probe_NTK=np.array(choices, np.int32).reshape(N, T, K),
    )


def churned(before_NTK, after_NTK):
    lost_NT = np.zeros((N, T))
    for n, t in np.ndindex(N, T):
        lost_NT[n, t] = len(set(before_NTK[n, t]) - set(after_NTK[n, t])) / K
    return lost_NT.mean(axis=1)


def test_an_evaluation_is_one_file_and_churn_compares_it_with_the_last(tmp_path):
    log = EvaluationLog(tmp_path, after_step=0)
    first, second = evaluation(0), evaluation(1)
    assert log.append(9, first) == {}
    found = log.append(10, second)  # 9 comes before 10, though not as text
    expected_N = churned(first.probe_NTK, second.probe_NTK)
    assert found == {"eval/routing_churn": pytest.approx(expected_N.mean())}
    assert expected_N.mean() > 0
    arrays = read_evaluation(tmp_path / FOLDER / "10.npz")
    np.testing.assert_allclose(arrays["churn"], expected_N)
    np.testing.assert_array_equal(arrays["experts"], second.probe_NTK)
    np.testing.assert_array_equal(arrays["load"], second.load_NE)
    np.testing.assert_array_equal(arrays["coactivation"], second.coactivation_NEE)
    assert "churn" not in read_evaluation(tmp_path / FOLDER / "9.npz")
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"9.npz", "10.npz"}


def test_a_resumed_run_writes_later_evaluations_again(tmp_path):
    log = EvaluationLog(tmp_path, after_step=0)
    for step in (5, 10, 15):
        log.append(step, evaluation(step))
    resumed = EvaluationLog(tmp_path, after_step=10)
    assert sorted(path.stem for path in (tmp_path / FOLDER).iterdir()) == ["10", "5"]
    # The same step again compares with the one before it, not with itself.
    again = resumed.append(10, evaluation(10))
    expected_N = churned(evaluation(5).probe_NTK, evaluation(10).probe_NTK)
    assert again["eval/routing_churn"] == pytest.approx(expected_N.mean())


def test_experts_of_other_tokens_are_not_compared(tmp_path, caplog):
    log = EvaluationLog(tmp_path, after_step=0)
    log.append(5, evaluation(0))
    second = evaluation(1)
    fewer = dataclasses.replace(second, probe_NTK=second.probe_NTK[:, :4])
    assert log.append(10, fewer) == {} and "5.npz holds the experts of other tokens" in caplog.text
    assert "churn" not in read_evaluation(tmp_path / FOLDER / "10.npz")


def test_a_damaged_file_is_named_whatever_byte_is_wrong(tmp_path):
    EvaluationLog(tmp_path, after_step=0).append(5, evaluation(0))
    path = tmp_path / FOLDER / "5.npz"
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 5):
        flipped = bytes([content[place] ^ 0xFF])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        try:
            read_evaluation(path)
        except EvaluationError as error:
            refused += 1
            assert f"{path} cannot be read" in str(error)
    assert refused > len(content) / 10  # some bytes are times and such


def test_a_dense_evaluation_has_no_routing_to_log(tmp_path):
    dense = Evaluation(1.0, 2.7, 1.0, 9, None)
    with pytest.raises(ValueError, match="dense model"):
        EvaluationLog(tmp_path, 0).append(1, dense)
