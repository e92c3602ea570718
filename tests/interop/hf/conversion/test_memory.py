"""Freed memory stays with the process that converts."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys

import numpy as np

from moejax.interop.hf.conversion.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    np.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**22)  # 32 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(argument: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc")
def test_an_array_takes_the_pages_of_the_one_before():
    assert page_faults("keep") < page_faults("as it is") / 10
