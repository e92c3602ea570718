"""The arms of a sweep under the names of their points, for analyses of an experiment."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from moejax.sweeps.arms import Arm, SweepError, describe
from moejax.sweeps.space import Point
from moejax.sweeps.store.directory import Sweep, open_sweep
from moejax.sweeps.store.records import read_record

SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class NamedArm:
    """An arm that was trained to the end.

    Attributes:
      name: of its point.
      seed: of its configuration.
      arm: with its configuration and its count of parameters.
      workdir: its run directory.
    """

    name: str
    seed: int
    arm: Arm
    workdir: Path


def named_arms(directory: str | Path, points: Mapping[str, Point]) -> list[NamedArm]:
    """Returns the arms of a sweep in the order of `points`, those of one name by their seeds.

    Args:
      directory: of the sweep.
      points: by name, what arms override; seeds may be in them or not.

    Raises:
      RecordError: there is no readable sweep.
      SweepError: an arm is not trained to the end, or of none of the points.
    """
    sweep = open_sweep(directory)
    _check_done(sweep)
    order = [*points]

    def place(found: NamedArm) -> tuple[int, int]:
        return order.index(found.name), found.seed

    named = [_named(sweep, arm, points) for arm in sweep.arms.values()]
    return sorted(named, key=place)


def _check_done(sweep: Sweep) -> None:
    open_ids = []
    for arm_id in sweep.arms:
        row = read_record(sweep.workdir(arm_id))
        if row is None or row["status"] != "done":
            open_ids.append(arm_id)
    if open_ids:
        raise SweepError(
            f"{len(open_ids)} of {len(sweep.arms)} arms in {sweep.directory} are not trained to "
            f"the end ({open_ids[0]} ...); run moejax sweep again, or see what its report says"
        )


def _named(sweep: Sweep, arm: Arm, points: Mapping[str, Point]) -> NamedArm:
    own = _without_seed(arm.overrides)
    for name, point in points.items():
        if _without_seed(point) == own:
            return NamedArm(name, arm.config.train.seed, arm, sweep.workdir(arm.id))
    raise SweepError(
        f"arm {arm.id} in {sweep.directory}, {describe(own)}, is none of {', '.join(points)}; "
        "give the directory of the sweep of these"
    )


def _without_seed(point: Mapping[str, object]) -> Point:
    return {key: value for key, value in point.items() if key != SEED}
