"""Searches a design space stage by stage, S0 to S4: sample models, train and compare them, narrow the space."""

import math
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
from hf_peft_ext.search.constraints import compare_constraints
from hf_peft_ext.search.fingerprint import check_same
from hf_peft_ext.search.progress import SearchLines
from hf_peft_ext.search.result import DECISION, RESULT, Decision, SearchResult, config_from_values, scores_of
from hf_peft_ext.search.run_record import Record, Run
from hf_peft_ext.search.training import RunArguments, SearchTask, adapted, evaluate, train_adapter
from hf_peft_ext.search.trial_queue import Queue, frozen_garbage
from hf_peft_ext.sublayers import Bottleneck
from hf_peft_ext.validation.checks import check, check_count

MODELS = "models"  # the study's attribute for weights, config and metric of each task
FINISHED = ("done", "stopped", "failed")


class Space(Protocol):
    """One stage of a design space; `hf_peft_ext.search.DesignSpace` is one."""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no stage is left."""
        ...

    def constraints(self) -> Sequence[str]:
        """The constraints that the stage compares."""
        ...

    def sample(self, constraint: str, n: int, seed: int = 0) -> Sequence[PeftConfig]:
        """Sample n models under a constraint."""
        ...

    def narrow(self, winner: str) -> "Space":
        """The next stage, in which every model meets the winner."""
        ...

    def config(self) -> PeftConfig:
        """The config of the decisions so far."""
        ...


class DesignSpaceSearch:
    """Searches for an architecture: each stage samples models under several constraints and keeps the best constraint.

    Chen et al. 2023 (https://arxiv.org/abs/2301.01821), section 3. The base model is loaded once; adapters are added
    and removed. All results are kept in a database: a search that is started again continues, and several processes
    may work on one search, on several machines if the database is on a server.

    Args:
        tasks: name -> data to train and score models on. A model's score is the mean over the tasks.
        space: the first stage.
        args: how each run trains.
        storage: a database's URL; by default a SQLite file. "postgresql+psycopg://user@host/name" for many machines.
        study_name: the search's name in it. Other settings, data, spaces, models or metrics need another name.
        n_models: models sampled under each constraint.
        seed: seed of the samples. Model i under every constraint trains with `seed` + i.
        pruner: an Optuna pruner that stops runs early. It sees, after each epoch of each task, the mean score over
            the tasks so far. None stops no run.
        heartbeat: seconds between two heartbeats; another worker repeats a run that misses three.
        progress: whether to show the progress.

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
        """Refuse a study of other settings, weights or metrics. The queue refuses other spaces."""
        model: Any = next(iter(self.tasks.values())).model
        name = getattr(model, "name_or_path", "") or type(model).__name__
        protocol = {"model": Path(name).name, "layers": len(layer_paths(model)), "tasks": list(self.tasks)}
        protocol |= {"rows": {name: task.digest() for name, task in self.tasks.items()}, "early_stopping": stopping}
        protocol |= {"n_models": self.n_models, "seed": self.seed, **asdict(self.args)}
        self.queue.check_protocol(protocol)
        models = {name: task.fingerprint() for name, task in self.tasks.items()}
        if (earlier_models := self.queue.get_attr(MODELS)) is None:
            self.queue.set_attr(MODELS, models)
        else:
            check_same(self.queue.study.study_name, earlier_models, models)

    def search(self) -> SearchResult:
        """Work until the last stage is decided. Other workers may call it at the same time.

        Returns:
            The finished search.

        Raises:
            ValueError: the study has other models of a stage, or no model meets the budget.
            RuntimeError: all runs of a stage failed.
        """
        space = self.space
        with self._progress() as bars, frozen_garbage():
            while not space.finished:
                check_feasible(space)
                self._work(space, bars)
                space = space.narrow(self._decide(space).winner)
        model = next(iter(self.tasks.values())).model
        with adapted(model, space.config(), self.seed) as peft_model:  # its config has the solved sizes
            self.queue.set_attr(RESULT, to_json(peft_model.peft_config["default"]))
        result = self.result()
        self.queue.close()
        return result

    def runs(self, space: Space) -> list[Run]:
        """The runs of a stage, model by model, so that all constraints progress alike."""
        sampled = {name: list(space.sample(name, self.n_models, self.seed)) for name in space.constraints()}
        return [
            Run(space.stage, name, i, self.seed + i, to_json(configs[i]))
            for i in range(self.n_models)
            for name, configs in sampled.items()
            if i < len(configs)
        ]

    def result(self) -> SearchResult:
        """State and results so far."""
        return SearchResult.read(self.queue)

    def _progress(self) -> Progress:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "runs", TimeElapsedColumn(), "left:")
        progress = Progress if sys.stderr.isatty() else SearchLines
        return progress(*columns, TimeRemainingColumn(), "[red]{task.fields[failed]}", disable=not self.progress)

    def _work(self, space: Space, bars: Progress) -> None:
        """Work on a stage. One bar shows it, another the search, whose length is an estimate before S4."""
        runs = self.runs(space)
        before = len([record for record in self.queue.records() if record.run.stage != space.stage])
        if not bars.tasks:
            bars.add_task("search", total=None, failed="")
        whole, stage = bars.tasks[0].id, bars.add_task(space.stage, total=None, failed="")
        ahead = sum(len(later.constraints()) for later in stages_ahead(space)) * self.n_models

        def show(records: list[Record]) -> None:
            finished = sum(record.state in FINISHED for record in records)
            failed = sum(record.state == "failed" for record in records)
            bars.update(whole, total=before + len(runs) + ahead, completed=before + finished)
            bars.update(stage, total=len(runs), completed=finished, failed=f"{failed} failed" if failed else "")

        self.queue.work(runs, self._execute, show)

    def _execute(self, trial: Trial, run: Run) -> float:
        """Execute a run: all tasks in turn, each from the same head and with the same seed."""
        start, scores = time.perf_counter(), dict(trial.user_attrs.get("scores", {}))
        before = trial.user_attrs.get("seconds", 0.0)  # spent by a worker that was killed
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
        with adapted(task.model, config_from_values(run.config), run.seed) as model:

            def score() -> float:
                value = evaluate(model, evaluation, self.args, task.compute_metrics)
                if not math.isfinite(value):
                    raise ValueError(f"The score on {name!r} is {value}.")
                return value

            def report(epoch: int) -> None:
                reached = {**scores, name: score()}
                trial.report(sum(reached.values()) / len(reached), step * self.args.num_train_epochs + epoch)
                if trial.should_prune():
                    trial.set_user_attr("scores", reached)
                    raise optuna.TrialPruned

            if "parameters" not in trial.user_attrs:
                trial.set_user_attr("parameters", adapter_parameters(model))
            batches = task.batches("train", self.args.per_device_train_batch_size)
            train_adapter(model, batches, self.args, run.seed, report if self.stops_early else None)
            return score()

    def _decide(self, space: Space) -> Decision:
        """Compare the constraints. All workers decide alike, since they read the same records."""
        records = self.queue.records(space.stage)
        unordered = scores_of(records, list(self.tasks))
        scores = {name: unordered[name] for name in space.constraints() if name in unordered}  # decides between equals
        if not scores:
            error = next((record.error for record in records if record.error), "no model was sampled")
            raise RuntimeError(f"No run of stage {space.stage!r} was finished; the first error: {error}")
        decision = Decision.of(space.stage, compare_constraints(scores), records, getattr(space, "left_out", {}))
        self.queue.set_attr(f"{DECISION}{space.stage}", asdict(decision))
        return decision


def stages_ahead(space: Space) -> Iterator[Space]:
    """The stages after this one, if the last constraint wins each."""
    while (names := space.constraints()) and not (space := space.narrow(names[-1])).finished:
        yield space


def check_feasible(space: Space) -> None:
    """Raise a ValueError if no model meets any constraint of a stage, for example because the budget is too small."""
    if not space.constraints():
        reason = next(iter(getattr(space, "left_out", {}).values()), "there is no constraint")
        raise ValueError(f"`space` has no model for stage {space.stage!r}: {reason}")


def to_json(config: PeftConfig) -> dict[str, Any]:
    """A config as values for JSON: its sets as sorted lists."""
    values = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def adapter_parameters(model: nn.Module) -> int:
    """Number of trained parameters of the adapter, without the head, which every method trains, and pruned entries."""
    trained = ((name, p.numel()) for name, p in model.named_parameters() if p.requires_grad)
    sparse = [module for module in model.modules() if isinstance(module, Bottleneck) and module.sparsity]
    pruned = sum(round(m.sparsity * (m.down.weight.numel() + m.up.weight.numel())) for m in sparse)
    return sum(size for name, size in trained if "modules_to_save" not in name) - pruned
