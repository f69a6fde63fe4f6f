"""The search through a design space, S0 to S4: sample, train, compare, narrow, stage by stage."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.pruners import BasePruner
from optuna.trial import Trial
from peft import PeftConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.search import compare
from hf_peft_ext.search.fingerprint import check_same
from hf_peft_ext.search.progress import LineAMinute
from hf_peft_ext.search.result import DECISION, FOUND, Decision, SearchResult, config_of, scores_of
from hf_peft_ext.search.run_record import Record, Run
from hf_peft_ext.search.training import RunArguments, SearchTask, adapted, evaluate, train
from hf_peft_ext.search.trial_queue import Queue, frozen_garbage
from hf_peft_ext.validation.checks import check, check_count

MODELS = "models"  # under which weights, config and metric of each task are noted
FINISHED = ("done", "stopped", "failed")


class Space(Protocol):
    """One stage of a design space; `hf_peft_ext.search.DesignSpace` is one."""

    @property
    def stage(self) -> str: ...

    @property
    def finished(self) -> bool: ...

    def constraints(self) -> Sequence[str]: ...

    def sample(self, constraint: str, n: int, seed: int = 0) -> Sequence[PeftConfig]: ...

    def narrow(self, winner: str) -> "Space": ...

    def config(self) -> PeftConfig: ...


class DesignSpaceSearch:
    """Finds an architecture: at each stage it samples models under each constraint, and the best constraint stays.

    Chen et al. 2023 (https://arxiv.org/abs/2301.01821), section 3. The base model is loaded once; adapters are put in
    and taken out. All that is done stands in a database: started again, a search goes on where it was, and several
    processes, on several machines if the database is a server's, may work on one.

    Args:
        tasks: name -> what models are trained and scored on. A model's score is the mean over them.
        space: the first stage.
        args: how each run trains.
        storage: a database's URL; by default a SQLite file. "postgresql+psycopg://user@host/name" for many machines.
        study_name: the search's name in it. Searches of other settings, data, spaces, models or metrics need another.
        n_models: models sampled under each constraint.
        seed: of the samples. Model i under every constraint trains with `seed` + i.
        pruner: one of Optuna's, to stop hopeless runs early: it sees, after each epoch of each task, the mean score
            over the tasks up to there. None stops none.
        heartbeat: seconds between signs of life; a run that misses three waits for another worker.
        progress: whether to show a bar.

    Raises:
        ValueError: a value breaks a rule, or the study holds runs of other settings, weights or metrics.
    """

    def __init__(
        self,
        tasks: Mapping[str, SearchTask],
        space: Space,
        args: RunArguments | None = None,
        *,
        storage: str = "sqlite:///search.db",
        study_name: str = "s4",
        n_models: int = 12,
        seed: int = 0,
        pruner: BasePruner | None = None,
        heartbeat: int = 20,
        progress: bool = True,
    ):
        check("tasks", tasks, len(tasks) > 0, "must hold at least one task")
        check_count("n_models", n_models)
        check_count("heartbeat", heartbeat)
        check("seed", seed, type(seed) is int and seed >= 0, "must be a whole number of 0 or more")
        self.tasks, self.space, self.args = dict(tasks), space, args or RunArguments()
        self.n_models, self.seed, self.stops_early, self.progress = n_models, seed, pruner is not None, progress
        self.queue = Queue(storage, study_name, pruner, heartbeat)
        self._check_protocol(type(pruner).__name__ if pruner else None)

    def _check_protocol(self, stopping: str | None) -> None:
        """Keeps runs of two settings out of one study; those of two spaces are told apart by the queue."""
        model: Any = next(iter(self.tasks.values())).model
        name = getattr(model, "name_or_path", "") or type(model).__name__
        protocol = {"model": Path(name).name, "layers": len(layer_paths(model)), "tasks": list(self.tasks)}
        protocol |= {"rows": {name: task.digest() for name, task in self.tasks.items()}, "early_stopping": stopping}
        protocol |= {"n_models": self.n_models, "seed": self.seed, **asdict(self.args)}
        there = self.queue.get_attr("protocol")
        if there is None:
            self.queue.set_attr("protocol", protocol)
        for name, value in (there or {}).items():
            rule = f"is {value!r} in the study {self.queue.study.study_name!r}; choose another `study_name`"
            check(name, protocol.get(name), protocol.get(name) == value, rule)
        models = {name: task.fingerprint() for name, task in self.tasks.items()}
        if (known := self.queue.get_attr(MODELS)) is None:  # of an earlier version, which did not note it
            self.queue.set_attr(MODELS, models)
        else:
            check_same(self.queue.study.study_name, known, models)

    def search(self) -> SearchResult:
        """Works until the last stage is decided. Other workers may do the same at the same time."""
        space = self.space
        with self._progress() as bars, frozen_garbage():
            while not space.finished:
                check_feasible(space)
                self._work(space, bars)
                space = space.narrow(self._decide(space).winner)
        model = next(iter(self.tasks.values())).model
        with adapted(model, space.config(), self.seed) as found:  # solves what a config leaves open
            self.queue.set_attr(FOUND, plain(found.peft_config["default"]))
        result = self.result()
        self.queue.close()
        return result

    def runs(self, space: Space) -> list[Run]:
        """The runs of a stage, model by model, so that the constraints fill up side by side."""
        sampled = {name: list(space.sample(name, self.n_models, self.seed)) for name in space.constraints()}
        return [
            Run(space.stage, name, i, self.seed + i, plain(configs[i]))
            for i in range(self.n_models)
            for name, configs in sampled.items()
            if i < len(configs)
        ]

    def result(self) -> SearchResult:
        """What is known so far."""
        return SearchResult.read(self.queue)

    def _progress(self) -> Progress:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "runs", TimeElapsedColumn(), "left:")
        kind = Progress if sys.stderr.isatty() else LineAMinute
        return kind(*columns, TimeRemainingColumn(), "[red]{task.fields[failed]}", disable=not self.progress)

    def _work(self, space: Space, bars: Progress) -> None:
        """Bars for the stage and for the search as a whole, whose length is a guess until the groups are chosen."""
        runs = self.runs(space)
        before = len([record for record in self.queue.records() if record.run.stage != space.stage])
        if not bars.tasks:
            bars.add_task("search", total=None, failed="")
        whole, stage = bars.tasks[0].id, bars.add_task(space.stage, total=None, failed="")
        ahead = sum(len(later.constraints()) for later in stages_ahead(space)) * self.n_models

        def look(records: list[Record]) -> None:
            finished = sum(record.state in FINISHED for record in records)
            failed = sum(record.state == "failed" for record in records)
            bars.update(whole, total=before + len(runs) + ahead, completed=before + finished)
            told = f"{failed} failed" if failed else ""
            bars.update(stage, total=len(runs), completed=finished, failed=told)

        self.queue.work(runs, self._do, look)

    def _do(self, trial: Trial, run: Run) -> float:
        """One run: all tasks in turn, each from the same head and with the same seed."""
        start, scores = time.perf_counter(), dict(trial.user_attrs.get("scores", {}))
        before = trial.user_attrs.get("seconds", 0.0)  # of a worker that was killed
        for step, (name, task) in enumerate(self.tasks.items()):
            if name in scores:
                continue
            try:
                scores[name] = self._train(trial, run, task, scores, step)
            finally:
                trial.set_user_attr("seconds", round(before + time.perf_counter() - start, 3))
            trial.set_user_attr("scores", scores)
        return sum(scores.values()) / len(scores)

    def _train(self, trial: Trial, run: Run, task: SearchTask, scores: dict[str, float], step: int) -> float:
        evaluation = task.batches("evaluation", self.args.per_device_eval_batch_size)
        name = list(self.tasks)[step]
        with adapted(task.model, config_of(run.config), run.seed) as model:

            def score() -> float:
                found = evaluate(model, evaluation, self.args, task.compute_metrics)
                if found != found or abs(found) == float("inf"):
                    raise ValueError(f"The score on {name!r} is {found}.")
                return found

            def stop_if_hopeless(epoch: int) -> None:
                reached = {**scores, name: score()}
                trial.report(sum(reached.values()) / len(reached), step * self.args.num_train_epochs + epoch)
                if trial.should_prune():
                    trial.set_user_attr("scores", reached)
                    raise optuna.TrialPruned

            if "parameters" not in trial.user_attrs:
                trial.set_user_attr("parameters", adapter_parameters(model))
            batches = task.batches("train", self.args.per_device_train_batch_size)
            train(model, batches, self.args, run.seed, stop_if_hopeless if self.stops_early else None)
            return score()

    def _decide(self, space: Space) -> Decision:
        """Compare the constraints; every worker comes to the same, from the same records."""
        records = self.queue.records(space.stage)
        found = scores_of(records, list(self.tasks))
        scores = {name: found[name] for name in space.constraints() if name in found}  # of equals, the first
        if not scores:
            error = next((record.error for record in records if record.error), "no model was sampled")
            raise RuntimeError(f"No run of stage {space.stage!r} was finished; the first error: {error}")
        decision = Decision.of(space.stage, compare(scores), records, getattr(space, "left_out", {}))
        self.queue.set_attr(f"{DECISION}{space.stage}", asdict(decision))
        return decision


def stages_ahead(space: Space) -> Iterator[Space]:
    """The stages after this one, if the last constraint wins at each."""
    while (names := space.constraints()) and not (space := space.narrow(names[-1])).finished:
        yield space


def check_feasible(space: Space) -> None:
    """Raise where no model can keep to any constraint of a stage, such as under a budget that is too small."""
    if not space.constraints():
        reason = next(iter(getattr(space, "left_out", {}).values()), "there is no constraint")
        raise ValueError(f"`space` has no model for stage {space.stage!r}: {reason}")


def plain(config: PeftConfig) -> dict[str, Any]:
    """A config as JSON has it."""
    values = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def adapter_parameters(model: nn.Module) -> int:
    """How many parameters the adapter trains; the head, which every method trains, left out."""
    trained = ((name, p.numel()) for name, p in model.named_parameters() if p.requires_grad)
    return sum(size for name, size in trained if "modules_to_save" not in name)
