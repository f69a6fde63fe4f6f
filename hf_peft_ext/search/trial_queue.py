"""The queue of a search: its runs as trials of an Optuna study, for any number of workers.

A run is enqueued as a WAITING trial; its user attributes hold all that a worker needs. The worker that takes the trial
sends heartbeats and writes the score of each task at once. Optuna fails a trial whose heartbeats are missing. Such a
trial has no error: its run is lost, and is enqueued again with its scores.
"""

import gc
import json
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from hf_peft_ext.search.database import connect
from hf_peft_ext.search.run_record import PRECEDENCE, Record, Run
from hf_peft_ext.validation.checks import check

AHEAD = 32  # runs enqueued at once, when less than a quarter of them wait; each poll reads all that wait
POLL = 1.0  # seconds between two polls while other workers run


class Queue:
    """A queue for any number of workers.

    Optuna's RetryHeartbeatStaleTrialCallback is not used: it fails a trial and enqueues its copy in two writes, so a
    worker killed between them would lose the run. Here every poll enqueues whatever is missing or lost.

    Args:
        storage: a database's URL, for SQLAlchemy: "sqlite:///search.db" for a file, or
            "postgresql+psycopg://user@host/name" for workers on many machines.
        study_name: the search's name in it.
        pruner: the Optuna pruner that stops runs; None for none.
        heartbeat: seconds between two heartbeats of a run. A run without one for three times as long is lost.
        create: create the study if there is none.

    Raises:
        ValueError: `storage` cannot be used, or there is no such study and `create` is False.
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
                check("study_name", study_name, study_name in names, f"must be the name of a search in {storage}")
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
        records: dict[tuple[str, str, int], Record] = {}
        for record in map(Record.from_trial, self._trials(stage)):
            other = records.setdefault(record.run.key, record)
            if PRECEDENCE.index(record.state) < PRECEDENCE.index(other.state):
                records[record.run.key] = record
        return list(records.values())

    def work(
        self,
        runs: Sequence[Run],
        execute: Callable[[Trial, Run], float],
        on_poll: Callable[[list[Record]], None],
    ) -> None:
        """Execute runs of a stage until all are finished, those of other workers included.

        Args:
            runs: all runs of the stage.
            execute: executes a run and returns its score.
            on_poll: called with the stage's records after each poll.

        Raises:
            ValueError: the study has a run of the stage with another config.
        """
        with quiet():
            while runs:
                records = self.records(runs[0].stage)
                on_poll(records)
                states, missing = Counter(record.state for record in records), self._missing(runs, records)
                if missing and states["waiting"] < AHEAD // 4:
                    for attrs in missing[:AHEAD]:
                        self.study.enqueue_trial({}, user_attrs=attrs)
                elif states["waiting"]:
                    self._take(execute)
                elif states["running"]:
                    time.sleep(POLL)
                    self._fail_lost()
                else:
                    return

    def _missing(self, runs: Sequence[Run], records: Sequence[Record]) -> list[dict[str, Any]]:
        """User attributes of the trials to enqueue: runs that are lost or not in the study."""
        recorded, missing = {record.run.key: record for record in records}, []
        for run in runs:
            record = recorded.get(run.key)
            if record is None:
                missing.append({"run": asdict(run)})
                continue
            is_same = (record.run.config, record.run.seed) == (run.config, run.seed)
            rule = f"has other models of {run.stage!r}, {run.constraint!r} than this space samples; choose another"
            check("study_name", self.study.study_name, is_same, rule)
            if record.state == "lost":
                missing.append(record.retry_attrs())
        return missing

    def _take(self, execute: Callable[[Trial, Run], float]) -> None:
        """Execute the next waiting run."""
        taken: list[int] = []

        def objective(trial: Trial) -> float:
            taken.append(trial.number)
            return self._execute(trial, execute)

        try:
            self.study.optimize(objective, 1, catch=(Exception,), gc_after_trial=True)
        except Exception:  # a worker that slept cannot write to its trial, which another worker has failed
            if not taken or not self.study.get_trials(deepcopy=False)[taken[0]].state.is_finished():
                raise

    def _execute(self, trial: Trial, execute: Callable[[Trial, Run], float]) -> float:
        if "run" not in trial.user_attrs or self._is_duplicate(trial):
            raise optuna.TrialPruned  # no trial waited any more, or two workers enqueued the run
        self.storage.record_heartbeat(trial._trial_id)  # Optuna's thread may not have sent the first one yet
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        try:
            return execute(trial, Run(**trial.user_attrs["run"]))
        except (optuna.TrialPruned, StorageInternalError, UpdateFinishedTrialError):
            raise  # errors of the database are not errors of the run
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise

    def _is_duplicate(self, trial: Trial) -> bool:
        """Whether the run has a trial with a lower number, which counts; marks this one if so."""
        key = Run(**trial.user_attrs["run"]).key
        earlier = (record for record in map(Record.from_trial, self._trials(key[0])) if record.number < trial.number)
        is_duplicate = any(record.run.key == key and record.state != "lost" for record in earlier)
        if is_duplicate:
            trial.set_user_attr("duplicate", True)
        return is_duplicate

    def _trials(self, stage: str | None) -> Iterator[FrozenTrial]:
        for trial in self.study.get_trials(deepcopy=False):
            run = trial.user_attrs.get("run")
            if run is not None and "duplicate" not in trial.user_attrs and stage in (None, run["stage"]):
                yield trial

    def _fail_lost(self) -> None:
        """Fail the trials of killed workers.

        Optuna skips trials without any heartbeat; those have no `worker` yet and are failed here.
        """
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            started = trial.datetime_start
            if "worker" not in trial.user_attrs and started is not None and datetime.now() - started > self.lost_after:
                with suppress(UpdateFinishedTrialError):  # another worker was faster
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        fail_stale_trials(self.study)

    def close(self) -> None:
        """Disconnect from the database; the next use connects again."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    # What belongs to the search as a whole

    def check_protocol(self, protocol: Mapping[str, Any]) -> None:
        """Save the settings that all runs share; a study that has others is refused.

        Args:
            protocol: setting -> its value, which JSON can hold.

        Raises:
            ValueError: a setting has another value in the study.
        """
        earlier = self.get_attr("protocol")
        if earlier is None:
            self.set_attr("protocol", protocol)
        for name, value in (earlier or {}).items():
            rule = f"is {value!r} in the study {self.study.study_name!r}; choose another `study_name`"
            check(name, protocol.get(name), protocol.get(name) == value, rule)

    def set_attr(self, name: str, value: Any) -> None:
        """Save a JSON value beside the runs."""
        self.study.set_user_attr(name, json.loads(json.dumps(value)))

    def get_attr(self, name: str) -> Any:
        """The value saved under a name, or None."""
        return self.study.user_attrs.get(name)


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Let the garbage collection after each run skip the objects that exist now; it takes half a second otherwise."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's log of every trial, and its warning that heartbeats are experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
