"""What is logged of speed, and the one number that is said of a run's."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

SPEED, SECONDS, MFU, MEMORY = "perf/tokens_per_s", "perf/seconds", "perf/mfu", "perf/peak_bytes"
"""Keys of `metrics.jsonl`: tokens a second and seconds of an interval, model FLOPs utilisation, and memory."""

ARMS = "perf/arms"
"""Key of an interval in a pack: the arms that trained together."""


def shares_of_pack(line: Mapping[str, Any]) -> dict[str, float]:
    """By what to multiply values of a line of `metrics.jsonl` so that the time of a pack is shared out among its arms.

    They trained side by side on one machine, so that an arm's own clock says nothing of
    what it costs.
    """
    arms = line.get(ARMS)
    return {SPEED: float(arms), SECONDS: 1 / arms} if type(arms) is int and arms > 1 else {}


def median_speed(rates: Iterable[float]) -> float | None:
    """Tokens per second of a run, wherever one number is said of it: the median over its logging intervals.

    Slow intervals, such as one during which the machine did other work, move a mean but
    not the median.

    Args:
      rates: of intervals; those that are not finite are left out.

    Returns:
      None if there is none.
    """
    finite = [float(rate) for rate in rates if math.isfinite(rate)]
    return statistics.median(finite) if finite else None
