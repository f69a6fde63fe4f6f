"""The queue of a search: what waits, runs and is done, in an Optuna study that outlives its workers.

A run is a trial. It is enqueued as WAITING with all that a worker needs to do it; a worker takes it by making it
RUNNING, keeps it alive by a heartbeat, and writes the score of each task as soon as it has it. What a killed worker
leaves is failed by Optuna when its heartbeat is missed and enqueued again, with the scores that it had.
"""

import gc
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Engine, event, text
from sqlalchemy.engine import make_url

from ...placement import check

State = Literal["waiting", "running", "done", "stopped", "failed"]
STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
# of two trials of one run, the one that counts: what is done before what is not
ORDER: tuple[State, ...] = ("done", "stopped", "running", "waiting", "failed")
POLL = 1.0  # seconds between two looks at the storage while others work


@dataclass(frozen=True)
class Run:
    """A sampled model, to be trained on every task.

    Args:
        stage: "S1", "S2", ...
        constraint: what the model was sampled under.
        model: its number among the samples of the constraint.
        seed: of its training.
        config: the adapter, as `PeftConfig.to_dict` gives it.
    """

    stage: str
    constraint: str
    model: int
    seed: int
    config: dict[str, Any] = field(compare=False)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.stage, self.constraint, self.model


@dataclass(frozen=True)
class Record:
    """What is known of a run.

    Args:
        number: the trial in the study.
        scores: task -> score; of a stopped run, those that it reached.
        parameters: how many the adapter trains, the head left out.
        seconds: how long it took.
        error: why it failed.
        worker: host and process that did it.
    """

    run: Run
    number: int
    state: State
    scores: dict[str, float]
    parameters: int | None = None
    seconds: float | None = None
    error: str | None = None
    worker: str | None = None

    @classmethod
    def of(cls, trial: FrozenTrial) -> "Record":
        attrs = trial.user_attrs
        known = {name: attrs.get(name) for name in ("parameters", "seconds", "error", "worker")}
        return cls(Run(**attrs["run"]), trial.number, STATES[trial.state], attrs.get("scores", {}), **known)


class Queue:
    """A queue for any number of workers.

    Args:
        storage: a database's URL, as SQLAlchemy takes it: "sqlite:///search.db" for a file, or
            "postgresql+psycopg://user@host/name" for workers on many machines.
        study_name: the search's name in it.
        pruner: which of Optuna's pruners stops runs; None for none.
        heartbeat: seconds between two signs of life of a run. A run without one for three times as long is taken for
            lost and waits again.
    """

    def __init__(self, storage: str, study_name: str, pruner: BasePruner | None = None, heartbeat: int = 20):
        with quiet():
            self.storage = connect(storage, heartbeat)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=study_name,
                direction="maximize",
                pruner=pruner or NopPruner(),
                load_if_exists=True,
            )
        self.lost_after = timedelta(seconds=3 * heartbeat)

    def fill(self, runs: Iterable[Run]) -> None:
        """Enqueue the runs that are not in the study yet."""
        there = {record.run.key for record in self.records()}
        for run in runs:
            if run.key not in there:
                self.study.enqueue_trial({}, user_attrs={"run": asdict(run)})

    def records(self, stage: str | None = None) -> list[Record]:
        """The runs of a stage, or of all stages, in the order in which they were enqueued."""
        chosen: dict[tuple[str, str, int], Record] = {}
        for record in map(Record.of, self._trials(stage)):
            other = chosen.setdefault(record.run.key, record)
            if ORDER.index(record.state) < ORDER.index(other.state):
                chosen[record.run.key] = record
        return list(chosen.values())

    def work(self, stage: str, do: Callable[[Trial, Run], float], look: Callable[[list[Record]], None]) -> None:
        """Take runs until none of the stage is left, and wait for those that other workers have.

        Args:
            do: carries out a run and returns its score.
            look: called with the stage's records whenever they may have changed.
        """
        with quiet():
            while True:
                records = self.records(stage)
                look(records)
                states = {record.state for record in records}
                if "waiting" in states:
                    self.study.optimize(lambda trial: self._do(trial, do), 1, catch=(Exception,), gc_after_trial=True)
                elif "running" in states:
                    time.sleep(POLL)
                    self._find_lost()
                else:
                    return

    def _do(self, trial: Trial, do: Callable[[Trial, Run], float]) -> float:
        if "run" not in trial.user_attrs or self._is_double(trial):
            raise optuna.TrialPruned  # another worker took the last one, or two workers enqueued this one
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        try:
            return do(trial, Run(**trial.user_attrs["run"]))
        except KeyboardInterrupt:  # whoever stops a worker does not mean that its run failed
            RetryHeartbeatStaleTrialCallback()(self.study, self.study.trials[trial.number])
            raise
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise

    def _is_double(self, trial: Trial) -> bool:
        """Whether the run stands in the queue under a lower number, too: then that one is carried out."""
        key = Run(**trial.user_attrs["run"]).key
        double = any(
            other.number < trial.number and Run(**other.user_attrs["run"]).key == key
            for other in self._trials(key[0])
            if other.state is not TrialState.FAIL
        )
        if double:
            trial.set_user_attr("double", True)
        return double

    def _trials(self, stage: str | None) -> Iterator[FrozenTrial]:
        for trial in self.study.get_trials(deepcopy=False):
            run = trial.user_attrs.get("run")
            if run is not None and "double" not in trial.user_attrs and stage in (None, run["stage"]):
                yield trial

    def _find_lost(self) -> None:
        """Enqueue runs of killed workers again, also of those killed before the first beat, which Optuna overlooks."""
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        with self.storage.engine.connect() as connection:
            beating = set(connection.execute(text("SELECT trial_id FROM trial_heartbeats")).scalars())
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            started = trial.datetime_start
            if trial_id not in beating and started is not None and datetime.now() - started > self.lost_after:
                self.storage.record_heartbeat(trial_id)  # the only one: it is stale soon, as any other's
        fail_stale_trials(self.study)

    def close(self) -> None:
        """Let go of the database; the next use connects again."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    # What belongs to the search as a whole

    def note(self, name: str, value: Any) -> None:
        """Write something JSON-like beside the runs."""
        self.study.set_user_attr(name, json.loads(json.dumps(value)))

    def noted(self, name: str) -> Any:
        """What was written under a name; None where nothing was."""
        return self.study.user_attrs.get(name)


def connect(url: str, heartbeat: int) -> RDBStorage:
    """The database, with its tables made if they are not there.

    SQLite lets two connections read a trial as WAITING before either writes; so each transaction begins as one that
    writes, and they go one after the other. Servers lock the trial's row.
    """
    database = make_url(url)
    is_sqlite = database.get_backend_name() == "sqlite"
    named = database.database not in (None, "", ":memory:")
    check("storage", url, named, "must name a file or a server's database, or nothing is left of the search")
    with FileLock(f"{database.database}.lock") if is_sqlite else nullcontext():  # of all, one makes the tables
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True},
            heartbeat_interval=heartbeat,
            grace_period=3 * heartbeat,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
    if is_sqlite:
        one_after_another(storage.engine)
    return storage


def one_after_another(engine: Engine) -> None:
    engine.dispose()  # connections made before the two rules

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin_to_write(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """What is in memory already is not looked through after each run, which would take half a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its log of every trial, and without the warning that heartbeats may change in a later one."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
