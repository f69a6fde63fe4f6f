"""Several workers on one database: nothing is done twice, a killed worker's runs are done by another, and what they
find is what one worker finds."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from glob import glob
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from hf_peft_ext.search import SearchResult, search_on_ray
from hf_peft_ext.search.trial_queue import Queue

from .search_spaces import N_MODELS, TwoStages, search, start_worker

RUNS = 2 * 2 * N_MODELS  # stages x constraints x models


def found(storage):
    """What a search came to, whoever did it."""
    result = SearchResult.load(storage, "s4")
    return sorted((r.run.key, r.state, r.scores) for r in result.records), result.decisions


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    file = tmp_path_factory.mktemp("alone") / "search.db"
    search(file).search()
    return found(f"sqlite:///{file}")


def finish(*workers):
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


def test_two_workers(alone, tmp_path):
    """They share the runs of one queue, each run is done by one of them, and each task of it once."""
    file, log = tmp_path / "search.db", tmp_path / "log"
    finish(*[start_worker(file, log, 0.05) for _ in range(2)])
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 2 * RUNS
    assert len({line.split()[0] for line in lines}) == 2
    assert found(f"sqlite:///{file}") == alone


def test_on_ray(alone, tmp_path):
    """Two workers of a local Ray cluster come to what one process finds."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    try:
        search_on_ray(partial(search, tmp_path / "search.db"), 2)
    finally:
        ray.shutdown()
    assert found(f"sqlite:///{tmp_path / 'search.db'}") == alone


def test_killed_worker(alone, tmp_path):
    """SIGKILL in the middle of a run: the next worker repeats the task that was running and nothing else."""
    file, log = tmp_path / "search.db", tmp_path / "log"
    worker = start_worker(file, log, 0.3)
    while not log.exists() or log.read_text(encoding="utf-8").count("\n") < 6:
        time.sleep(0.02)
    worker.kill()
    worker.join()
    begun = log.read_text(encoding="utf-8").count("\n")
    (lost,) = [r for r in Queue(f"sqlite:///{file}", "s4").records() if r.state == "running"]
    finish(start_worker(file, log))
    assert begun < 2 * RUNS
    assert log.read_text(encoding="utf-8").count("\n") == 2 * RUNS + 1
    assert found(f"sqlite:///{file}") == alone
    assert lost.run.key in {r.run.key for r in SearchResult.load(f"sqlite:///{file}", "s4").records}


def test_between_two_writes(alone, tmp_path):
    """A worker killed after a lost run was failed, before it waited again, loses none."""
    file = tmp_path / "search.db"
    queue = search(file).queue
    runs = search(file).runs(TwoStages())
    queue.study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"run": asdict(runs[0])}))
    assert [record.state for record in queue.records()] == ["lost"]
    search(file).search()
    assert found(f"sqlite:///{file}") == alone


def test_killed_before_the_first_heartbeat(alone, tmp_path):
    """Optuna overlooks a running trial that has no heartbeat; its run is carried out all the same."""
    file = tmp_path / "search.db"
    queue = search(file).queue
    queue.study.enqueue_trial({}, user_attrs={"run": asdict(search(file).runs(TwoStages())[0])})
    with pytest.warns(UserWarning, match="Heartbeat"):
        queue.study.ask()  # sends none
    assert [record.state for record in queue.records()] == ["running"]
    search(file).search()
    assert found(f"sqlite:///{file}") == alone


def test_worker_that_slept(tmp_path):
    """A worker whose run was taken for lost meanwhile goes on with the next one, and its late score is not written."""
    queue = search(tmp_path / "search.db").queue
    runs, slept = search(tmp_path / "search.db").runs(TwoStages())[:2], []

    def do(trial, run):
        if not slept:
            slept.append(run.key)
            queue.study.tell(trial.number, state=TrialState.FAIL)  # as others do
        trial.set_user_attr("scores", {"two": 0.5})
        return 0.5

    queue.work(runs, do, lambda records: None)
    records = queue.records()
    assert [record.state for record in records] == ["done", "done"]
    assert sorted(record.number for record in records) == [1, 2]


@pytest.fixture
def server():
    """The URL of a PostgreSQL server of this test's own, reached through a socket in a folder."""
    pytest.importorskip("psycopg")
    found = glob("/usr/lib/postgresql/*/bin/initdb")  # Debian keeps it off the path
    initdb = shutil.which("initdb") or next(iter(found), None)
    if initdb is None:
        pytest.skip("needs PostgreSQL's server: apt install postgresql")
    binaries = Path(initdb).resolve().parent
    as_user = {"user": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory() as folder:
        if as_user:
            shutil.chown(folder, "postgres")
        options = {**as_user, "cwd": folder, "stdout": subprocess.DEVNULL}
        subprocess.run([initdb, "-D", "data", "-U", "postgres", "-A", "trust"], check=True, **options)
        command = [binaries / "postgres", "-D", "data", "-k", folder, "-c", "listen_addresses="]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as process:
            try:
                while subprocess.run([binaries / "pg_isready", "-q", "-h", folder]).returncode:
                    time.sleep(0.1)
                yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
            finally:
                process.send_signal(signal.SIGINT)  # "fast": does not wait for those that are connected


@pytest.mark.slow
def test_postgresql(alone, server, tmp_path):
    """Three workers on a real server, one of them killed: what one worker finds on SQLite, and one task repeated."""
    log = tmp_path / "log"
    first = start_worker(server, log, 0.3)
    while not log.exists() or log.read_text(encoding="utf-8").count("\n") < 4:
        time.sleep(0.02)
    others = [start_worker(server, log, 0.1) for _ in range(2)]
    time.sleep(0.1)
    first.kill()
    finish(*others)
    first.join()
    assert first.exitcode == -9
    assert found(server) == alone
    assert 2 * RUNS <= log.read_text(encoding="utf-8").count("\n") <= 2 * RUNS + 1
