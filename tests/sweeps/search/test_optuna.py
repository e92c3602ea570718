"""What Optuna's own heartbeats, retries and limits leave out: why a search has a worker of its own.

Each test shows a promise of searches that they do not keep; test_study.py and test_faults.py show
that ours do. If one fails, Optuna has changed: see whether `sweeps/search/worker.py` can use it.
"""

import threading
import time

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    # Optuna warns that a trial that is asked for has no heartbeat outside of Study.optimize.
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning"),
]


class Retry(RetryHeartbeatStaleTrialCallback):
    """Optuna's own retry, whose process may be killed before it."""

    is_killed = False

    def __call__(self, study, trial):
        if self.is_killed:
            raise SystemExit("killed")
        super().__call__(study, trial)


@pytest.fixture
def study(tmp_path):
    """A study in a database with heartbeats, of which any is too old as soon as one looks."""
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        storage = RDBStorage(
            f"sqlite:///{tmp_path / 'a.db'}",
            heartbeat_interval=1,
            heartbeat_stale_trial_callback=Retry(max_retry=3, inherit_intermediate_values=True),
        )
    storage.heartbeat_interval = 0.01
    storage.grace_period = -1
    return optuna.create_study(study_name="s", storage=storage)


def states(study):
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def draw(trial):
    return trial.suggest_float("rate", 0, 1)


def test_a_journal_has_no_heartbeat():
    assert hasattr(RDBStorage, "record_heartbeat")
    assert not hasattr(JournalStorage, "record_heartbeat")


def test_a_trial_whose_worker_died_before_its_first_heartbeat_runs_for_ever(study):
    noticed, missed = study.ask(), study.ask()
    study._storage.record_heartbeat(noticed._trial_id)
    optuna.storages.fail_stale_trials(study)
    expected = [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert states(study) == expected and missed.number == 1


def test_a_death_between_failing_a_trial_and_retrying_it_loses_the_point(study, monkeypatch):
    study._storage.record_heartbeat(study.ask()._trial_id)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Retry, "is_killed", True)
        optuna.storages.fail_stale_trials(study)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [TrialState.FAIL]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_error_of_the_storage_ends_a_heartbeat_and_then_the_worker(study, monkeypatch):
    beats = []
    record = study._storage.record_heartbeat

    def record_but_once(trial_id):
        beats.append(trial_id)
        if len(beats) == 2:
            raise ConnectionError("the storage is away for a moment")
        record(trial_id)

    monkeypatch.setattr(study._storage, "record_heartbeat", record_but_once)

    def objective(trial):
        rate = draw(trial)
        while len(beats) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        optuna.storages.fail_stale_trials(study)  # by another worker
        return rate

    with pytest.raises(AssertionError, match="Should not reach"):
        study.optimize(objective, n_trials=2)
    assert len(beats) == 2
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_point_whose_worker_is_stopped_or_fails_is_not_tried_again(study, error):
    def objective(trial):
        draw(trial)
        raise error

    with pytest.raises(type(error)):
        study.optimize(objective)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [TrialState.FAIL]


def test_workers_that_race_at_the_end_run_more_than_the_number_of_trials(tmp_path):
    storage = f"sqlite:///{tmp_path / 'a.db'}"
    optuna.create_study(study_name="s", storage=storage)
    all_run = threading.Barrier(3, timeout=60)

    def objective(trial):
        all_run.wait()
        return draw(trial)

    def work():
        study = optuna.load_study(study_name="s", storage=storage)
        study.optimize(objective, callbacks=[MaxTrialsCallback(1)])

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    study = optuna.load_study(study_name="s", storage=storage)
    assert states(study) == [TrialState.COMPLETE] * 3
