"""The metrics of speed, and the one number that is reported for a run."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

SPEED = "perf/tokens_per_s"
SECONDS = "perf/seconds"
MFU = "perf/mfu"
MEMORY = "perf/peak_bytes"
"""Keys of `metrics.jsonl`.

In order: tokens per second and seconds of an interval, model FLOPs utilisation, peak memory.
"""

ARMS = "perf/arms"
"""Key of an interval in a pack: the arms that trained together."""


def shares_of_pack(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns factors that share out the time of a pack among its arms, by key.

    Values of the line of `metrics.jsonl` are multiplied by them. The arms trained side by side on
    one machine, so that an arm's own clock does not measure what it costs.
    """
    num_arms = line.get(ARMS)
    if type(num_arms) is not int or num_arms <= 1:
        return {}
    return {SPEED: float(num_arms), SECONDS: 1 / num_arms}


def median_speed(rates: Iterable[float]) -> float | None:
    """Returns the tokens per second of a run as one number: the median over its logging intervals.

    Slow intervals, such as one during which the machine did other work, move a mean but
    not the median.

    Args:
      rates: of intervals; those that are not finite are left out.

    Returns:
      None if there is no interval.
    """
    finite = [float(rate) for rate in rates if math.isfinite(rate)]
    return statistics.median(finite) if finite else None
