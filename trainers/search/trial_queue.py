"""The queue of a search: what waits, runs and is done, in an Optuna study that outlives its workers.

A run is a trial. It is enqueued as WAITING with all that a worker needs to do it; a worker takes it by making it
RUNNING, keeps it alive by a heartbeat, and writes the score of each task as soon as it has it. What a killed worker
leaves is failed by Optuna when its heartbeat is missed. A failed trial that does not say why is such a one: its run is
lost, and enqueued again with the scores that it had. Only a few runs wait at a time: each look reads all of them.
"""

import gc
import json
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ...placement import check
from ...writable import check_writable

State = Literal["waiting", "running", "done", "stopped", "failed", "lost"]
STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
# of two trials of one run, the one that counts: what is done before what is not
ORDER: tuple[State, ...] = ("done", "stopped", "failed", "running", "waiting", "lost")
AHEAD = 32  # runs that are enqueued at once, when fewer than a quarter of them wait
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
        state: "lost" of what a worker left unfinished, until it waits again.
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
        state = "lost" if trial.state is TrialState.FAIL and "error" not in attrs else STATES[trial.state]
        return cls(Run(**attrs["run"]), trial.number, state, attrs.get("scores", {}), **known)

    @property
    def known(self) -> dict[str, Any]:
        """What the next to carry out the run has to know."""
        known = {"run": asdict(self.run), "parameters": self.parameters, "seconds": self.seconds}
        return {name: value for name, value in {**known, "scores": self.scores}.items() if value}


class Queue:
    """A queue for any number of workers.

    Args:
        storage: a database's URL, as SQLAlchemy takes it: "sqlite:///search.db" for a file, or
            "postgresql+psycopg://user@host/name" for workers on many machines.
        study_name: the search's name in it.
        pruner: which of Optuna's pruners stops runs; None for none.
        heartbeat: seconds between two signs of life of a run. A run without one for three times as long is taken for
            lost and waits again.
        create: begin a study where there is none.

    Raises:
        ValueError: `storage` is no database's URL, or there is no such study and `create` is False.
    """

    def __init__(
        self,
        storage: str,
        study_name: str,
        pruner: BasePruner | None = None,
        heartbeat: int = 20,
        create: bool = True,
    ):
        with quiet():
            self.storage = connect(storage, heartbeat, create)
            if not create:
                names = optuna.get_all_study_names(self.storage)
                check("study_name", study_name, study_name in names, f"is no search in {storage}")
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=study_name,
                direction="maximize",
                pruner=pruner or NopPruner(),
                load_if_exists=True,
            )
        self.lost_after = timedelta(seconds=3 * heartbeat)

    def records(self, stage: str | None = None) -> list[Record]:
        """The runs of a stage, or of all stages, in the order in which they were enqueued."""
        chosen: dict[tuple[str, str, int], Record] = {}
        for record in map(Record.of, self._trials(stage)):
            other = chosen.setdefault(record.run.key, record)
            if ORDER.index(record.state) < ORDER.index(other.state):
                chosen[record.run.key] = record
        return list(chosen.values())

    def work(
        self, runs: Sequence[Run], do: Callable[[Trial, Run], float], look: Callable[[list[Record]], None]
    ) -> None:
        """Take runs of a stage until all are done, and wait for those that other workers have.

        Args:
            runs: all of the stage.
            do: carries out a run and returns its score.
            look: called with the stage's records whenever they may have changed.

        Raises:
            ValueError: the study has a run of the stage with another config.
        """
        with quiet():
            while runs:
                records = self.records(runs[0].stage)
                look(records)
                states, missing = Counter(record.state for record in records), self._missing(runs, records)
                if missing and states["waiting"] < AHEAD // 4:
                    for known in missing[:AHEAD]:
                        self.study.enqueue_trial({}, user_attrs=known)
                elif states["waiting"]:
                    self._take(do)
                elif states["running"]:
                    time.sleep(POLL)
                    self._find_lost()
                else:
                    return

    def _missing(self, runs: Sequence[Run], records: Sequence[Record]) -> list[dict[str, Any]]:
        """What to enqueue: runs that are not in the study, or lost."""
        there, missing = {record.run.key: record for record in records}, []
        for run in runs:
            record = there.get(run.key)
            if record is None:
                missing.append({"run": asdict(run)})
                continue
            same = (record.run.config, record.run.seed) == (run.config, run.seed)
            rule = f"has other models of {run.stage!r}, {run.constraint!r} than this space samples; choose another"
            check("study_name", self.study.study_name, same, rule)
            if record.state == "lost":
                missing.append(record.known)
        return missing

    def _take(self, do: Callable[[Trial, Run], float]) -> None:
        """Carry out the next run that waits."""
        taken: list[int] = []

        def objective(trial: Trial) -> float:
            taken.append(trial.number)
            return self._do(trial, do)

        try:
            self.study.optimize(objective, 1, catch=(Exception,), gc_after_trial=True)
        except Exception:  # of one that others took for lost, since this worker was asleep, nothing can be written
            if not taken or not self.study.get_trials(deepcopy=False)[taken[0]].state.is_finished():
                raise

    def _do(self, trial: Trial, do: Callable[[Trial, Run], float]) -> float:
        if "run" not in trial.user_attrs or self._is_double(trial):
            raise optuna.TrialPruned  # another worker took the last one, or two workers enqueued this one
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        try:
            return do(trial, Run(**trial.user_attrs["run"]))
        except (optuna.TrialPruned, StorageInternalError, UpdateFinishedTrialError):
            raise  # the database's troubles are not the run's
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise

    def _is_double(self, trial: Trial) -> bool:
        """Whether the run stands in the queue under a lower number, too: then that one is carried out."""
        key = Run(**trial.user_attrs["run"]).key
        double = any(
            other.number < trial.number and Record.of(other).run.key == key and Record.of(other).state != "lost"
            for other in self._trials(key[0])
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
        """Fail the trials of killed workers, also of those killed before the first beat, which Optuna overlooks."""
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


def connect(url: str, heartbeat: int, create: bool = True) -> RDBStorage:
    """The database, with its tables made if they are not there.

    SQLite lets two connections read a trial as WAITING before either writes; so each transaction begins as one that
    writes, and they go one after the other. Servers lock the trial's row.
    """
    try:
        database = make_url(url)
    except ArgumentError:
        rule = 'must be a database\'s URL, such as "sqlite:///search.db"'
        raise ValueError(f"`storage` (={url!r}) {rule}.") from None
    is_sqlite = database.get_backend_name() == "sqlite"
    named = database.database not in (None, "", ":memory:")
    check("storage", url, named, "must name a file or a server's database, or nothing is left of the search")
    if is_sqlite:
        file = Path(str(database.database))
        check("storage", url, file.parent.is_dir(), f"must lie in a folder that exists, unlike {file.parent}")
        check("storage", url, create or file.exists(), "must name a file that exists")
        check_writable("storage", file.parent, url)  # else the lock would be waited for without end
    with FileLock(f"{database.database}.lock") if is_sqlite else nullcontext():  # of all, one makes the tables
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True},
            heartbeat_interval=heartbeat,
            grace_period=3 * heartbeat,
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
