"""Starts two processes that train in one folder: one trains, and the other says which one does."""

import time

import numpy as np

from soak.field import Field, difference, end, refusal


def trial(field: Field, seed: int) -> str:
    """Starts two trainings of one run at nearly the same time; returns what was wrong."""
    rng = np.random.default_rng(seed)
    workdir = field.new_run(f"writers-{seed}")
    first = field.start(workdir)
    time.sleep(rng.uniform(0.0, 4.0))
    second = field.start(workdir)
    ends = [end(first), end(second)]
    codes = [code for code, _ in ends]
    if 0 not in codes:
        return f"neither trained: {codes}: {ends[0][1][-300:]} {ends[1][1][-300:]}"
    for code, errors in ends:
        if code == 0:
            continue  # both may have trained, one after the end of the other
        problem = refusal(code, errors)
        if problem:
            return problem
        if "is being written by process" not in errors:
            return f"the refused one does not say who writes: {errors[-300:]}"
    return difference(workdir, field.undisturbed)
