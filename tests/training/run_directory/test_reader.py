"""The reader of a run directory: a last line that a crash cut off is left out, others are named."""

import pytest

from moejax.training.run_directory.reader import LineError, RunDirectory


def metrics_of(workdir, content):
    (workdir / "metrics.jsonl").write_bytes(content)
    return [line["step"] for line in RunDirectory(workdir).read_metrics()]


def test_a_last_line_that_a_crash_cut_off_is_left_out(tmp_path):
    line = b'{"step": 1, "loss/lm": 2.5}\n'
    for length in range(1, len(line) - 2):
        assert metrics_of(tmp_path, line + line[:length]) == [1]
    assert metrics_of(tmp_path, line + line[:-1]) == [1, 1]  # only its end is missing
    assert metrics_of(tmp_path, line + b"{\n\n") == [1]
    assert metrics_of(tmp_path, b"") == []


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_line_before_another_is_named(tmp_path, line):
    with pytest.raises(LineError, match=r"line 2 is damaged \("):
        metrics_of(tmp_path, b'{"step": 1}\n' + line + b'\n{"step": 3}\n')


@pytest.mark.parametrize("line", [b"[1]", b"{}", b'{"step": "1"}'])
def test_a_line_that_is_not_an_object_with_a_step_is_named(tmp_path, line):
    message = "line 1 is damaged .not a JSON object with an integer `step`."
    with pytest.raises(LineError, match=message):
        metrics_of(tmp_path, line)


def test_saved_steps_are_the_numbers_in_checkpoints(tmp_path):
    assert RunDirectory(tmp_path).saved_steps() == []
    for name in ("10", "9", "²", "20.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert RunDirectory(tmp_path).saved_steps() == [9, 10]
