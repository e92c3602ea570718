"""A sweep's directory: `sweep.json` says what is to run, `arms/<id>/` are ordinary run directories.

An arm has ended when its folder holds `record.json`. Several processes may work in one directory
and divide the arms among themselves: a process that trains a pack holds a lock on each of its arms,
which its death releases (see `moejax.locks`). So no process waits for a dead one, and no arm is
trained by two, whatever packs the arms have been put into since.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moejax.locks import FolderLock, HeldError, LockedError, check_held
from moejax.paths import resolve_path
from moejax.sweeps.arms import Arm, Plan, SweepError, check_same
from moejax.sweeps.packing import Ids, pack_arms
from moejax.sweeps.store.record_files import check_inside
from moejax.sweeps.store.recorded import explain_loss, lost_arms, with_recorded_ids
from moejax.sweeps.store.records import RECORD_FILE, SWEEP_FILE, Row, collect, read_definition
from moejax.training.run_directory.layout import git_commit, versions, write_json

ARMS_FOLDER, CLAIMS_FOLDER = "arms", "claims"
IS_SEARCH = "is_search"  # in `sweep.json`: whether its arms were drawn

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A planned sweep.

    Attributes:
      directory: where it is kept.
      arms: by id, in the order of the plan.
      packs: ids of arms that train together.
      command: that planned it, recorded in each run.
    """

    directory: Path
    arms: dict[str, Arm]
    packs: tuple[Ids, ...]
    command: str

    def workdir(self, arm_id: str) -> Path:
        """Returns the run directory of an arm."""
        return self.directory / ARMS_FOLDER / arm_id

    def has_ended(self, arm_id: str) -> bool:
        """Whether the arm has its record."""
        return (self.workdir(arm_id) / RECORD_FILE).exists()

    def open_arms(self, ids: Sequence[str] | None = None) -> list[Arm]:
        """Returns the arms that have not ended, of those with the given ids or of all."""
        candidates = self.arms if ids is None else ids
        return [self.arms[arm_id] for arm_id in candidates if not self.has_ended(arm_id)]

    @contextlib.contextmanager
    def claim(self, ids: Ids) -> Iterator[bool]:
        """Yields whether this process has these arms to itself until the end of the block.

        False if another process has one of them. All processes ask for arms in the same order, so
        that of two that want some in common one gets all of its own.
        """
        with contextlib.ExitStack() as stack:
            claims = (claimed(self.directory, arm_id) for arm_id in sorted(ids))
            # `all` stops at the first arm that another process has.
            yield all(map(stack.enter_context, claims))


@contextlib.contextmanager
def claimed(directory: Path, arm_id: str) -> Iterator[bool]:
    """Yields whether this process has an arm to itself during the block; False if another has it.

    Raises:
      LockedError: the directory cannot be written.
    """
    lock = FolderLock(directory / CLAIMS_FOLDER / arm_id, f"trains arm {arm_id}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
            is_mine = True
        except HeldError:
            is_mine = False
        yield is_mine


def locked(directory: Path, name: str) -> FolderLock:
    """Returns a context in which this process alone writes one of a sweep's joint files.

    It waits until others have left theirs.
    """
    return FolderLock(directory / CLAIMS_FOLDER / name, f"writes {name}", waits=True)


def join_records(directory: Path) -> list[Row]:
    """Writes the joint files of the records that exist, one process at a time; returns the rows.

    Raises:
      RecordError: see `collect`.
      LockedError: the directory cannot be written.
    """
    check_inside(directory)
    with locked(directory, "records"):
        return collect(directory)


def write_sweep(
    directory: str | Path, plan: Plan, *, largest_pack: int, recipe: str, match: str, command: str
) -> Sweep:
    """Writes what is to run; a sweep that the directory holds already goes on.

    An arm that the directory holds keeps the id that it has there, see `store.recorded`.

    Args:
      directory: created if absent. A sweep that it holds may get more arms, and other packs.
      plan: all arms.
      largest_pack: the number of arms that train together, at most.
      recipe: path of the recipe.
      match: what arms have in common with it.
      command: that planned it.

    Raises:
      SweepError: the directory holds arms that the plan does not have, or those of a search, or
        cannot be written.
    """
    directory = resolve_path(directory)
    with _defining(directory):
        recorded: dict[str, Arm] = {}
        if (directory / SWEEP_FILE).exists():
            recorded = open_sweep(directory).arms
            _check_continues(directory, plan.arms, recorded)
        arms = with_recorded_ids(plan.arms, recorded)
        packs = pack_arms([*arms.values()], largest_pack)
        sweep = Sweep(directory, arms, packs, command)
        _write(sweep, recipe, match, is_search=False)
    return sweep


def _check_continues(directory: Path, planned: Sequence[Arm], recorded: Mapping[str, Arm]) -> None:
    """Raises `SweepError` unless all arms that a directory holds already are planned."""
    if read_definition(directory).get(IS_SEARCH):
        raise SweepError(
            f"--dir={directory} holds the arms of a search; give these points another --dir"
        )
    lost = lost_arms(planned, recorded)
    if not lost:
        return
    remedy = "give the axes it was planned with and more, or another --dir"
    change = explain_loss(lost[0], planned)
    if change:
        remedy = f"{change}; set in the recipe what it was planned with, or give another --dir"
    raise SweepError(
        f"--dir={directory} holds a sweep with {len(lost)} arms "
        f"that this one does not have ({lost[0].id} ...); {remedy}"
    )


def check_search(directory: Path) -> None:
    """Raises `SweepError` if the directory holds a sweep of given points.

    A search would add arms of its own to it.
    """
    if (directory / SWEEP_FILE).exists() and not read_definition(directory).get(IS_SEARCH):
        raise SweepError(
            f"--dir={directory} holds a sweep of given points; give the search another --dir"
        )


def add_arm(directory: str | Path, arm: Arm, *, recipe: str, command: str) -> Sweep:
    """Adds an arm that a search has drawn, with the id of `recorded_id`.

    The directory and its `sweep.json` are made if they do not exist.

    Raises:
      SweepError: the directory cannot be written, or holds something else.
    """
    directory = resolve_path(directory)
    with _defining(directory):
        check_search(directory)
        known = Sweep(directory, {}, (), command)
        if (directory / SWEEP_FILE).exists():
            known = open_sweep(directory)
        (arm_id,) = with_recorded_ids([arm], known.arms)
        if arm_id in known.arms:
            check_same(known.arms[arm_id], arm)
            return known
        packs = (*known.packs, (arm.id,))
        sweep = Sweep(directory, known.arms | {arm.id: arm}, packs, known.command)
        _write(sweep, recipe, "", is_search=True)
        return sweep


def recorded_id(directory: Path, arm: Arm) -> str:
    """Returns the id of an arm in a directory: its own unless it is recorded with another."""
    if not (directory / SWEEP_FILE).exists():
        return arm.id
    (arm_id,) = with_recorded_ids([arm], open_sweep(directory).arms)
    return arm_id


@contextlib.contextmanager
def _defining(directory: Path) -> Iterator[None]:
    """Holds the lock of `sweep.json`, so that no process overwrites what it has not read."""
    check_inside(directory)
    try:
        with locked(directory, "definition"):
            yield
    except (OSError, LockedError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise SweepError(
            f"--dir={directory} cannot be written: {reason}; use another folder"
        ) from error


def _write(sweep: Sweep, recipe: str, match: str, *, is_search: bool) -> None:
    check_held(sweep.directory / CLAIMS_FOLDER / "definition")
    content = {
        "recipe": recipe,
        "command": sweep.command,
        "match": match,
        IS_SEARCH: is_search,
        "versions": versions(),
        "git_commit": git_commit(),
        "arms": [arm.to_json() for arm in sweep.arms.values()],
        "packs": [list(pack) for pack in sweep.packs],
    }
    (sweep.directory / ARMS_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(sweep.directory / SWEEP_FILE, content)


def open_sweep(directory: str | Path) -> Sweep:
    """Returns a sweep that was planned.

    Raises:
      RecordError: there is no readable `sweep.json`.
      SweepError: an arm in it is damaged.
    """
    directory = resolve_path(directory)
    definition = read_definition(directory)
    arms = [Arm.from_json(entry) for entry in definition["arms"]]
    known = {arm.id: arm for arm in arms}
    packs = tuple(tuple(pack) for pack in definition.get("packs", []))
    if sorted(itertools.chain.from_iterable(packs)) != sorted(known):
        raise SweepError(
            f"{directory / SWEEP_FILE}: packs must hold each arm once; plan the sweep again"
        )
    return Sweep(directory, known, packs, str(definition.get("command", "")))
