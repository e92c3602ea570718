"""The short form of `make soak`: a few trials of each kind, none of which goes wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "soak/run.py"


@pytest.mark.slow
def test_a_short_soak_finds_nothing_wrong():
    # Otherwise most of its time would be compilation.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(SOAK), "--short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    table = re.findall(r"^(\S.*\S) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(table) == 6, done.stdout
    for _, tried, wrong in table:
        assert int(tried) > 0 and int(wrong) == 0, done.stdout


def test_a_soak_that_could_not_begin_is_not_a_success():
    command = [sys.executable, str(SOAK), "--only=knots"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only=knots: knots must be one of kills, flips" in done.stderr
