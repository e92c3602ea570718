"""Progress: the time left is estimated from steps, not from what came before them."""

import logging

from moejax.training.health.progress import StepProgress


def test_the_time_left_leaves_compilation_out(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr("moejax.training.health.progress.time.perf_counter", lambda: now[0])
    progress = StepProgress(num_steps=10, start_step=2)
    with caplog.at_level(logging.INFO, "moejax"):
        for step, seconds in ((3, 300), (4, 5), (5, 15), (10, 50)):
            now[0] += seconds
            progress.update(step, 4.5, 1234.0)
    assert caplog.messages == [
        "step 3/10  loss 4.500  1,234 tokens/s",
        "step 5/10  loss 4.500  1,234 tokens/s  0:50 left",
        "step 10/10  loss 4.500  1,234 tokens/s  0:00 left",
    ]
