"""What is logged of speed, and the one number that is said of a run's."""

import math
import statistics
from collections.abc import Iterable

SPEED, SECONDS, MFU, MEMORY = "perf/tokens_per_s", "perf/seconds", "perf/mfu", "perf/peak_bytes"
"""Keys of `metrics.jsonl`: tokens a second and seconds of an interval, model FLOPs utilisation, and memory."""


def median_speed(rates: Iterable[float]) -> float | None:
    """Tokens per second of a run, wherever one number is said of it: the median over its logging intervals.

    Slow intervals, such as one during which the machine did other work, move a mean but not the median.

    Args:
      rates: of intervals; those that are not finite are left out.

    Returns:
      None if there is none.
    """
    finite = [float(rate) for rate in rates if math.isfinite(rate)]
    return statistics.median(finite) if finite else None
