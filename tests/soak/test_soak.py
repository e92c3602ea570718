"""The short form of `make soak`: a few kills, flipped bits, mistakes, two writers, configurations; none is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "soak/run.py"


def test_a_short_soak_finds_nothing_wrong():
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # most of its time would be compilation
    command = [sys.executable, str(SOAK), "--short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    table = re.findall(r"^(\S.*\S) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(table) == 6, done.stdout
    assert all(int(tried) > 0 and int(wrong) == 0 for _, tried, wrong in table), done.stdout


def test_a_soak_that_could_not_begin_is_not_a_success():
    done = subprocess.run(
        [sys.executable, str(SOAK), "--only=knots"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--only=knots: knots must be one of kills, flips" in done.stderr
