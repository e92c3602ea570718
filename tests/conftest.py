"""Eight fake CPU devices, shape checking of signatures, and strictness for tests only."""

import atexit
import collections
import gc
import os
import shutil
import tempfile
import warnings

from compiled_programs import compilation_cache_folder, compiler_settings

# Before jax starts: tests must not depend on the machine's accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.update(compiler_settings())

# Half of the time of the tests is compilation: what another file, process or session has compiled
# is read from a folder.
os.environ["JAX_COMPILATION_CACHE_DIR"] = compilation_cache_folder()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.01")

# The user's key, by which runs of these tests are known as the user's own, ends with the
# session, too.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="moejax-tests-state-")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Millions of live objects of jax's caches are looked through less often.
gc.set_threshold(100_000, 50, 50)

install_import_hook("moejax", "strict_types.check")


# A busy machine draws slowly, and is no reason to fail.
hypothesis.settings.register_profile(
    "here", suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def _warnings_of_our_own_use_are_errors():
    """A warning raised for a line of moejax is an error; those of other packages are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"moejax\..*")
        yield


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_last_for_a_file(request):
    """A program is hundreds of memory maps, and Linux gives a process 65,530: XLA crashes where
    there are none left.
    """
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # what is left stays; to look through it again and again took half a second a file


def pytest_collection_finish():
    """All modules are imported: their objects stay, and no garbage is looked for among them."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Long files first: a process takes a file at a time (`make test`), and the longest must not
    come last.
    """
    long = (
        "tests/training", "tests/moe/test_optimized", "tests/moe/expert_parallel",
        "tests/sweeps/runners",
    )  # fmt: skip
    items.sort(key=lambda item: not item.nodeid.startswith(long))


def pytest_terminal_summary(terminalreporter):
    """Prints the ten slowest of many files: seconds of set-up, tests and tear-down."""
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > 10:
        terminalreporter.section("slowest files")
        for file, total in seconds.most_common(10):
            terminalreporter.write_line(f"{total:6.0f} s  {file}")
