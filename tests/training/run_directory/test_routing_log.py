"""The routing log: what was appended is read back.

A crash at any moment loses at most the entry that is being written.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moejax.training.run_directory import routing_history, routing_log, routing_store
from moejax.training.run_directory.line_file import LineFile, LineFileError
from moejax.training.run_directory.routing_log import RoutingLog, read_routing
from moejax.training.run_directory.routing_store import ADDED, FOLDER, RoutingLogError

LAYERS = [1, 3]
NUM_EXPERTS = 4


def entry(step):
    """Counts and probabilities that show the step they belong to."""
    counts = np.arange(8, dtype=np.int64).reshape(2, 4) + 100 * step
    return counts, np.full((2, 4), step / 1024, np.float32)


def append_steps(log, steps):
    for step in steps:
        log.append(step, *entry(step))


def assert_holds(workdir, steps):
    history = read_routing(workdir)
    assert history.steps.tolist() == list(steps)
    shape = (len(history.steps), 2, 4)
    assert history.counts_SNE.shape == history.probs_SNE.shape == shape
    for i, step in enumerate(steps):
        counts_NE, probs_NE = entry(step)
        np.testing.assert_array_equal(history.counts_SNE[i], counts_NE)
        np.testing.assert_array_equal(history.probs_SNE[i], probs_NE)


def damage_message(workdir):
    return rf"{workdir}/routing is damaged .*go on without its history.*: mv "


def test_what_was_appended_is_read_back_with_its_layers(tmp_path):
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [10, 20, 30])
    assert_holds(tmp_path, [10, 20, 30])
    history = read_routing(tmp_path)
    assert history.layers.tolist() == LAYERS
    assert (history.counts_SNE.dtype, history.probs_SNE.dtype) == (np.int64, np.float32)


def test_a_directory_without_a_log_has_no_history(tmp_path):
    assert read_routing(tmp_path) is None


def test_a_log_without_entries_has_an_empty_history(tmp_path):
    RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    assert_holds(tmp_path, [])


def test_counts_beyond_32_bits_survive(tmp_path):
    counts, probs = entry(1)
    RoutingLog(tmp_path, LAYERS, NUM_EXPERTS).append(1, counts + 2**40, probs)
    np.testing.assert_array_equal(read_routing(tmp_path).counts_SNE[0], counts + 2**40)


def test_a_log_that_spans_many_chunks_is_read_back_completely(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_store, "CHUNK_BYTES", 3 * 8 * 8)  # three entries a chunk
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, range(1, 11))
    assert_holds(tmp_path, range(1, 11))
    log.truncate(4)
    append_steps(log, [7])
    assert_holds(tmp_path, [1, 2, 3, 4, 7])


def test_a_slice_reads_only_its_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_store, "CHUNK_BYTES", 3 * 8 * 8)  # three entries a chunk
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), range(1, 11))
    (tmp_path / "routing/counts/c/2/0/0").write_bytes(b"damaged")  # entries 6 to 8
    history = read_routing(tmp_path)
    for start, stop in ((0, 6), (2, 4), (9, None), (-1, None), (4, 2), (10, 20)):
        expected = [entry(step)[0] for step in list(range(1, 11))[start:stop]]
        found = history.read("counts", start, stop)
        np.testing.assert_array_equal(found, np.reshape(expected, (-1, 2, 4)))
    np.testing.assert_array_equal(history.probs_SNE[8], entry(9)[1])
    with pytest.raises(ValueError, match=damage_message(tmp_path)):
        history.read("counts", 5, 7)


@pytest.mark.parametrize("columns", [1, 3, 7, 20])
def test_sums_over_neighbouring_entries_are_those_of_all_read_at_once(
    tmp_path, monkeypatch, columns
):
    monkeypatch.setattr(routing_store, "CHUNK_BYTES", 3 * 8 * 8)  # three entries a chunk
    monkeypatch.setattr(routing_history, "CHUNKS_AT_ONCE", 1)
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), range(10, 120, 10))
    history = read_routing(tmp_path)
    read = history.read
    lengths = []

    def counted_read(*arguments):
        block = read(*arguments)
        lengths.append(len(block))
        return block

    monkeypatch.setattr(history, "read", counted_read)
    steps_C, sums_CNE = history.summed("counts", columns)
    assert max(lengths) == 3 and len(sums_CNE) == min(columns, 11)
    first = 0
    for step, sums_NE in zip(steps_C, sums_CNE, strict=True):
        last = history.steps.tolist().index(step)
        np.testing.assert_array_equal(sums_NE, history.counts_SNE[first : last + 1].sum(axis=0))
        first = last + 1
    assert first == 11 and sums_CNE.dtype == np.int64
    _, probs_CNE = history.summed("probs", columns)
    assert probs_CNE.sum() == pytest.approx(8 * sum(range(10, 120, 10)) / 1024)


def test_a_history_says_what_it_holds_and_refuses_the_rest(tmp_path):
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [10, 20])
    history = read_routing(tmp_path)
    assert {"counts", "probs"} <= set(history.names) and history.num_entries == 2
    assert "2 entries, steps 10 to 20, 2 layers, 4 experts: counts, probs" in repr(history)
    message = r"/routing has no array 'gates'; use one of counts, probs"
    with pytest.raises(ValueError, match=message):
        history.read("gates")
    with pytest.raises(ValueError, match=r"num_columns=0 must be at least 1"):
        history.summed("counts", 0)


def test_sums_of_a_log_without_entries_are_empty(tmp_path):
    RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    steps_C, sums_CNE = read_routing(tmp_path).summed("counts", 5)
    assert steps_C.shape == (0,) and sums_CNE.shape == (0, 2, 4)


def test_a_resumed_run_continues_and_rewrites_what_it_repeats(tmp_path):
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [10, 20, 30])
    resumed = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    resumed.truncate(after_step=20)
    assert_holds(tmp_path, [10, 20])
    append_steps(resumed, [25, 35])
    assert_holds(tmp_path, [10, 20, 25, 35])


def test_truncating_after_the_end_changes_nothing(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, [10, 20])
    log.truncate(20)
    assert_holds(tmp_path, [10, 20])


def test_a_crash_before_the_commit_marker_loses_only_that_entry(tmp_path, monkeypatch):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, [10, 20])

    class Crash:
        """The array of markers, as the process dies."""

        shape = (1000,)

        def __getitem__(self, entry):
            raise KeyboardInterrupt

    monkeypatch.setitem(log._arrays, "step", Crash())
    with pytest.raises(KeyboardInterrupt):
        append_steps(log, [30])
    assert log._arrays["counts"][2].read().result().any()  # the rest was written
    assert_holds(tmp_path, [10, 20])
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [40])
    assert_holds(tmp_path, [10, 20, 40])


def test_a_crash_while_the_marker_array_grows_commits_nothing(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, [10, 20])
    log._arrays["step"].resize(exclusive_max=[3]).result()  # grown, not yet written
    assert_holds(tmp_path, [10, 20])


def test_a_truncated_entry_does_not_come_back_when_the_array_grows_again(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, [10, 20, 30])
    log.truncate(10)
    # A crash in the middle of the next append.
    log._arrays["step"].resize(exclusive_max=[2]).result()
    assert_holds(tmp_path, [10])
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [15])
    assert_holds(tmp_path, [10, 15])


def test_what_an_entry_lacks_does_not_come_from_a_dropped_one(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    counts, probs = entry(10)
    for step in (10, 20):
        log.append(step, counts, probs, bias=np.full(counts.shape, 9.0, np.float32))
    log.truncate(10)
    log.append(20, counts, probs)
    assert np.isnan(read_routing(tmp_path).read("bias")[1]).all()


def test_a_crash_while_the_log_is_created_leaves_nothing_in_the_way(tmp_path):
    RoutingLog(tmp_path, [0], 2)
    (tmp_path / "routing" / "zarr.json").unlink()  # the group file is written last
    assert read_routing(tmp_path) is None
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [10])
    assert_holds(tmp_path, [10])


WRITER = """
import sys
import numpy as np
from moejax.training.run_directory.routing_log import RoutingLog
log = RoutingLog(sys.argv[1], [1, 3], 4)
step = log._steps[-1] if log._steps else 0
while True:
    step += 1
    counts = np.arange(8, dtype=np.int64).reshape(2, 4) + 100 * step
    log.append(step, counts, np.full((2, 4), step / 1024, np.float32))
    print(step, flush=True)
"""


def test_a_writer_killed_at_a_random_moment_loses_no_entry_it_reported(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        reported = [int(writer.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate(timeout=30)
        reported += [int(line) for line in rest.splitlines()]
        last = max(reported)
        held = len(read_routing(tmp_path).steps)
        # The entry being written may have been finished, but not reported.
        assert last <= held <= last + 1
        assert_holds(tmp_path, range(1, held + 1))


def test_what_a_killed_writer_left_does_not_end_in_the_next_entry(tmp_path):
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [10])
    chunks = [path for path in (tmp_path / "routing").rglob("*") if path.is_file()]
    for chunk in chunks:  # as if killed before each rename
        chunk.with_name(f"{chunk.name}.__lock").write_bytes(b"x" * 5000)
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [20])
    assert_holds(tmp_path, [10, 20])


@pytest.fixture
def full_disk():
    """A function from which on this process can write no file of more than some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_no_damage(tmp_path, full_disk):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, [10])
    full_disk(64)
    message = r"routing cannot be written \(.*make room there, and run the"
    with pytest.raises(RoutingLogError, match=message) as error:
        append_steps(log, [20])
    assert "mv " not in str(error.value) and "is damaged" not in str(error.value)
    full_disk(resource.RLIM_INFINITY)
    assert_holds(tmp_path, [10])
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [20])
    assert_holds(tmp_path, [10, 20])


def test_lines_that_cannot_be_written_name_their_file(tmp_path, full_disk):
    file = LineFile(tmp_path / "metrics.jsonl", 0, None, lambda line: True)
    file.append({"step": 1})
    full_disk(20)
    message = r"metrics.jsonl cannot be written \(File too large\); make room there"
    with pytest.raises(LineFileError, match=message):
        for step in range(2, 9):
            file.append({"step": step})
    file.close()


def test_another_shape_is_refused_with_folder_and_remedy(tmp_path):
    RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    message = rf"{tmp_path}/routing .*use another workdir, or move that folder"
    for layers, num_experts in (([1, 3, 5], 4), ([0, 2], 4), (LAYERS, 8)):
        with pytest.raises(ValueError, match=message):
            RoutingLog(tmp_path, layers, num_experts)


def test_entries_of_a_wrong_shape_or_order_are_refused(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    with pytest.raises(ValueError, match=r"counts has shape \(3, 4\).* counts \(2, 4\)"):
        log.append(1, np.zeros((3, 4), np.int64), np.zeros((3, 4), np.float32))
    append_steps(log, [10])
    for step in (10, 5, -1):
        with pytest.raises(ValueError, match=rf"step={step} .*truncate"):
            append_steps(log, [step])
    assert_holds(tmp_path, [10])


def test_an_array_that_is_not_logged_is_refused(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS, ("entropy", "margin"))
    with pytest.raises(ValueError, match=r"gates has shape \(2, 4\)"):
        log.append(1, *entry(1), gates=np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="metrics logged of a layer must be the same"):
        RoutingLog(tmp_path, LAYERS, NUM_EXPERTS, ("entropy",))


def test_an_array_that_is_absent_reads_as_its_fill_value(tmp_path):
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS, ("entropy", "margin"))
    log.append(1, *entry(1), layers=np.arange(4, dtype=np.float32).reshape(2, 2))
    log.append(2, *entry(2), bias=np.ones((2, 4), np.float32))
    path = str(tmp_path / "routing" / "layers")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    layers_SNM = routing_log.tensorstore.open(spec).result()[:2].read().result()
    np.testing.assert_array_equal(layers_SNM[0], [[0, 1], [2, 3]])
    assert np.isnan(layers_SNM[1]).all()


def test_a_log_of_before_there_were_norms_is_read_and_continued(tmp_path, caplog):
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [1, 2])
    for name in ADDED:
        shutil.rmtree(tmp_path / FOLDER / name)
    assert not set(ADDED) & set(read_routing(tmp_path).names)
    log = RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
    append_steps(log, [3])
    history = read_routing(tmp_path)
    assert history.steps.tolist() == [1, 2, 3] and set(ADDED) <= set(history.names)
    assert np.isnan(history.read("weight_norms")[:2]).all()
    assert caplog.text.count("earlier version, or has lost it; its 2 entries so far") == len(ADDED)
    (tmp_path / "norms").mkdir()
    complete = RoutingLog(tmp_path / "norms", LAYERS, NUM_EXPERTS)
    counts_NE, norms_NE = entry(1)
    complete.append(1, counts_NE, norms_NE, gradient_norms=norms_NE)
    stored = read_routing(tmp_path / "norms").read("gradient_norms")[0]
    np.testing.assert_array_equal(stored, norms_NE)


def test_a_dense_run_has_no_log_to_create(tmp_path):
    with pytest.raises(ValueError, match="a dense run has none"):
        RoutingLog(tmp_path, [], 0)


@pytest.mark.parametrize("victim", ["zarr.json", "step/zarr.json", "counts/zarr.json"])
def test_a_damaged_log_is_refused_with_file_and_remedy(tmp_path, victim):
    append_steps(RoutingLog(tmp_path, LAYERS, NUM_EXPERTS), [10])
    (tmp_path / "routing" / victim).write_text(json.dumps({"zarr_format": 3}))
    with pytest.raises(ValueError, match=damage_message(tmp_path)):
        read_routing(tmp_path)
    with pytest.raises(ValueError, match=damage_message(tmp_path)):
        RoutingLog(tmp_path, LAYERS, NUM_EXPERTS)
