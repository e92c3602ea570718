"""The reader of a run directory: a last line that a crash cut off is left out, others are named."""

import pytest

from moejax.inspection.viewer.metrics_reader import MetricsReader
from moejax.training.health.alarms import read_alarms
from moejax.training.run_directory.line_file import LineFile
from moejax.training.run_directory.reader import LineError, RunDirectory


def metrics_of(workdir, content):
    (workdir / "metrics.jsonl").write_bytes(content)
    return [line["step"] for line in RunDirectory(workdir).read_metrics()]


def test_a_last_line_that_a_crash_cut_off_is_left_out(tmp_path):
    line = b'{"step": 1, "loss/lm": 2.5}\n'
    for length in range(1, len(line) - 2):
        assert metrics_of(tmp_path, line + line[:length]) == [1]
    assert metrics_of(tmp_path, line + line[:-1]) == [1, 1]  # only its end is missing
    assert metrics_of(tmp_path, b"") == []


ALARM = b'{"step": 1, "rule": "ties", "state": "on", "layers": [0]}\n'


@pytest.mark.parametrize(
    ("tail", "num_lines"),
    [(b'{"step"', 1), (b"\0\0", 1), (b"\n\n", 1), (ALARM[:-1], 2), (ALARM, 2)],
)
def test_writer_and_readers_know_the_same_last_line(tmp_path, tail, num_lines):
    for name in ("metrics.jsonl", "alarms.jsonl"):
        (tmp_path / name).write_bytes(ALARM + tail)
    assert len(list(RunDirectory(tmp_path).read_metrics())) == num_lines
    assert len(read_alarms(tmp_path)) == num_lines
    viewer = MetricsReader(tmp_path / "metrics.jsonl")
    viewer.read_on(2**20)
    assert viewer._num_lines == num_lines
    file = LineFile(tmp_path / "alarms.jsonl", 1, None, lambda line: True)
    assert len(file.lines) == num_lines
    file.append({"step": 2})
    file.close()
    assert (tmp_path / "alarms.jsonl").read_bytes() == ALARM * num_lines + b'{"step": 2}\n'


def test_a_last_line_with_a_line_break_was_not_cut_off_and_is_damaged(tmp_path, caplog):
    (tmp_path / "alarms.jsonl").write_bytes(ALARM + b'{"step"\n')
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + b'{"step"\n')
    with pytest.raises(LineError, match=r"line 2 is damaged \("):
        list(RunDirectory(tmp_path).read_metrics())
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_alarms(tmp_path)
    viewer = MetricsReader(tmp_path / "metrics.jsonl")
    viewer.read_on(2**20)
    assert "line 2 is damaged" in viewer.problem
    assert len(LineFile(tmp_path / "alarms.jsonl", 1, None, lambda line: True).lines) == 1
    assert "a part of its history is lost or damaged" in caplog.text


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
