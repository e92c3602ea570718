"""What evaluations saw of the routing: one file each, so that any two checkpoints can be compared.

`workdir/routing/evaluations/<step>.npz` (no pickles) holds, for the validation split,

  load          [N, E]     float32  fraction of choices of each expert
  coactivation  [N, E, E]  int32    tokens that visit both experts of a pair
  experts       [N, T, K]  integer  the experts of each token of rows spread over the split; E: none
  churn         [N]        float32  fraction of those experts that the evaluation before this one did not have there
"""

import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moejax.moe.router.by_token import churn
from moejax.paths import is_number
from moejax.training.evaluation import Evaluation
from moejax.training.run_directory.routing_store import RoutingLogError

FOLDER = "routing/evaluations"

log = logging.getLogger("moejax")


class EvaluationError(ValueError):
    """No such evaluation, or a damaged one."""


class EvaluationLog:
    """Writes and compares evaluations of a run with experts.

    Args:
      workdir: the run directory.
      after_step: files of later steps are removed: a resumed run writes them again.
      noted: `steps` at that step, from its checkpoint; None if they are not known.

    Raises:
      EvaluationError: the newest evaluation, with which the next is to be compared, is damaged.
    """

    def __init__(self, workdir: str | Path, after_step: int, noted: Sequence[int] | None = None):
        self._folder = Path(workdir) / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        for step, path in self._files():
            if step > after_step:
                path.unlink()
        self._is_newest_lost = False
        steps = self.steps
        lost = [step for step in noted or () if step not in steps]
        if lost:
            self._is_newest_lost = lost[-1] > max(steps, default=-1)
            churn = ", and the next has no churn" if self._is_newest_lost else ""
            log.warning(
                "%s lacks the evaluations of step %s%s",
                self._folder,
                ", ".join(map(str, lost)),
                churn,
            )
        if steps:
            read_evaluation(self._folder / f"{steps[-1]}.npz")

    @property
    def steps(self) -> list[int]:
        """The steps that have been written, rising."""
        return [step for step, _ in self._files()]

    def append(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Writes an evaluation; returns `eval/routing_churn` against the newest earlier one, if there is one."""
        experts_NTK, load_NE = evaluation.probe_NTK, evaluation.load_NE
        if experts_NTK is None or load_NE is None or evaluation.coactivation_NEE is None:
            raise ValueError("an evaluation of a dense model has no routing to log")
        small = experts_NTK.astype(np.min_scalar_type(load_NE.shape[1]))
        arrays = {"load": load_NE, "coactivation": evaluation.coactivation_NEE, "experts": small}
        earlier = [path for before, path in self._files() if before < step]
        is_newest_lost, self._is_newest_lost = self._is_newest_lost, False
        if earlier and not is_newest_lost:
            before_NTK = read_evaluation(earlier[-1])["experts"]
            if before_NTK.shape == experts_NTK.shape:
                arrays["churn"] = np.asarray(
                    churn(jnp.asarray(before_NTK), jnp.asarray(experts_NTK), load_NE.shape[1])
                )
            else:  # written by another version
                log.warning(
                    "%s holds the experts of other tokens: no churn at step %d", earlier[-1], step
                )
        partial = self._folder / f"{step}.partial"
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            os.replace(partial, self._folder / f"{step}.npz")
        except OSError as error:
            raise RoutingLogError(
                f"{self._folder} cannot be written ({error.strerror}); make room there, and run the command again"
            ) from error
        return {"eval/routing_churn": float(arrays["churn"].mean())} if "churn" in arrays else {}

    def _files(self) -> list[tuple[int, Path]]:
        """Steps and files, in order."""
        return sorted(
            (int(path.stem), path) for path in self._folder.glob("*.npz") if is_number(path.stem)
        )


class Evaluations:
    """The evaluations that a run directory holds; each is read when it is asked for.

    Args:
      workdir: the run directory.
    """

    def __init__(self, workdir: str | Path):
        self._folder = Path(workdir) / FOLDER

    def __repr__(self) -> str:
        return f"Evaluations(steps={list(self.steps)})"

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were evaluated, oldest first."""
        return tuple(
            sorted(int(path.stem) for path in self._folder.glob("*.npz") if is_number(path.stem))
        )

    def read(self, step: int | None = None) -> dict[str, np.ndarray]:
        """The arrays of an evaluation, by default of the newest.

        Raises:
          EvaluationError: there is none, or its file is damaged.
        """
        steps = self.steps
        if not steps:
            raise EvaluationError(
                f"{self._folder} has no evaluation; train until there is one (train.eval_every)"
            )
        if step is not None and step not in steps:
            raise EvaluationError(
                f"--step={step} was not evaluated; use one of {', '.join(map(str, steps))}"
            )
        return read_evaluation(self._folder / f"{steps[-1] if step is None else step}.npz")


def newest_evaluation(workdir: str | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a run's newest evaluation, or of that at `step`.

    Raises:
      EvaluationError: there is none, or its file is damaged.
    """
    return Evaluations(workdir).read(step)


def read_evaluation(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of one file.

    Raises:
      EvaluationError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
            return found | {"load": found["load"], "experts": found["experts"].astype(np.int32)}
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}); restore it from a copy, or move it away to do without that evaluation"
        ) from error
