"""The routing of evaluations: one file each, so that any two checkpoints can be compared.

`workdir/routing/evaluations/<step>.npz` (no pickles) holds, for the validation split,

  load          [N, E]     float32  fraction of choices of each expert
  coactivation  [N, E, E]  int32    tokens that visit both experts of a pair
  experts       [N, T, K]  integer  the experts of each token of rows spread over the split; E: none
  churn         [N]        float32  fraction of those experts that the token did not have in the
                                    evaluation before this one
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
    """An evaluation does not exist, or is damaged."""


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
        for step in self.steps:
            if step > after_step:
                _path(self._folder, step).unlink()
        self._is_newest_lost = False
        steps = self.steps
        lost = [step for step in noted or () if step not in steps]
        if lost:
            self._is_newest_lost = lost[-1] > max(steps, default=-1)
            log.warning(
                "%s lacks the evaluations of step %s%s",
                self._folder,
                ", ".join(str(step) for step in lost),
                ", and the next has no churn" if self._is_newest_lost else "",
            )
        if steps:
            read_evaluation(_path(self._folder, steps[-1]))

    @property
    def steps(self) -> list[int]:
        """The steps that have been written, increasing."""
        return _listed_steps(self._folder)

    def append(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Writes an evaluation.

        Returns:
          `eval/routing_churn` compared with the newest earlier evaluation, if there is one.
        """
        experts_NTK, load_NE = evaluation.probe_NTK, evaluation.load_NE
        if experts_NTK is None or load_NE is None or evaluation.coactivation_NEE is None:
            raise ValueError("an evaluation of a dense model has no routing to log")
        num_experts = load_NE.shape[1]
        arrays = {
            "load": load_NE,
            "coactivation": evaluation.coactivation_NEE,
            "experts": experts_NTK.astype(np.min_scalar_type(num_experts)),
        }
        churn_N = self._churn(step, experts_NTK, num_experts)
        self._is_newest_lost = False
        if churn_N is not None:
            arrays["churn"] = churn_N
        self._write(step, arrays)
        return {} if churn_N is None else {"eval/routing_churn": float(churn_N.mean())}

    def _churn(self, step: int, experts_NTK: np.ndarray, num_experts: int) -> np.ndarray | None:
        """Compares the experts of tokens with those of the newest earlier evaluation, [N]."""
        earlier = [other for other in self.steps if other < step]
        if not earlier or self._is_newest_lost:
            return None
        path = _path(self._folder, earlier[-1])
        before_NTK = read_evaluation(path)["experts"]
        if before_NTK.shape != experts_NTK.shape:  # written by another version
            log.warning("%s holds the experts of other tokens: no churn at step %d", path, step)
            return None
        return np.asarray(churn(jnp.asarray(before_NTK), jnp.asarray(experts_NTK), num_experts))

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes the file of a step in one rename."""
        partial = self._folder / f"{step}.partial"
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            os.replace(partial, _path(self._folder, step))
        except OSError as error:
            raise RoutingLogError(
                f"{self._folder} cannot be written ({error.strerror}); make room there, and run "
                "the command again"
            ) from error


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
        return tuple(_listed_steps(self._folder))

    def read(self, step: int | None = None) -> dict[str, np.ndarray]:
        """Reads the arrays of an evaluation, by default of the newest.

        Raises:
          EvaluationError: there is none, or its file is damaged.
        """
        steps = self.steps
        if not steps:
            raise EvaluationError(
                f"{self._folder} has no evaluation; train until there is one (train.eval_every)"
            )
        if step is not None and step not in steps:
            known = ", ".join(str(other) for other in steps)
            raise EvaluationError(f"--step={step} was not evaluated; use one of {known}")
        return read_evaluation(_path(self._folder, steps[-1] if step is None else step))


def newest_evaluation(workdir: str | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of a run's newest evaluation, or of the one at `step`.

    Raises:
      EvaluationError: there is none, or its file is damaged.
    """
    return Evaluations(workdir).read(step)


def read_evaluation(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of one file.

    Raises:
      EvaluationError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
            if "load" not in arrays:
                raise KeyError("load")
            arrays["experts"] = arrays["experts"].astype(np.int32)
            return arrays
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
            f"{path} cannot be read ({error}); restore it from a copy, or move it away to do "
            "without that evaluation"
        ) from error


def _listed_steps(folder: Path) -> list[int]:
    """Returns the steps that have a file, increasing."""
    return sorted(int(path.stem) for path in folder.glob("*.npz") if is_number(path.stem))


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step}.npz"
