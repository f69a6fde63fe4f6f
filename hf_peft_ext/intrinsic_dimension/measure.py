"""Measures the intrinsic dimension of a task, on the queue of the search."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError
from optuna.trial import Trial
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from sqlalchemy.exc import SQLAlchemyError

from hf_peft_ext.compare.runs import silent_libraries
from hf_peft_ext.intrinsic_dimension.bisection import Bisection
from hf_peft_ext.intrinsic_dimension.figure import write_figure
from hf_peft_ext.intrinsic_dimension.measured_recipe import MeasuredRecipe
from hf_peft_ext.intrinsic_dimension.result import IntrinsicDimension
from hf_peft_ext.intrinsic_dimension.settings import MeasureArguments
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.search.progress import SearchLines
from hf_peft_ext.search.run_record import Record, Run
from hf_peft_ext.search.search import FINISHED
from hf_peft_ext.search.trial_queue import Queue, frozen_garbage

FULL = "full"  # the stage of full fine-tuning; those of the searches are "round 0", "round 1", ...
TrainAndScore = Callable[[int | None, int, float], float]


def measure_intrinsic_dimension(
    task: str | Path | Recipe | TrainAndScore, *, overrides: Sequence[str] = (), **options: Any
) -> IntrinsicDimension:
    """Measure d90: the smallest d at which training d numbers reaches 90 % of full fine-tuning's score.

    Li et al. 2018 (https://arxiv.org/abs/1804.08838). Full fine-tuning runs with each seed. Then each seed searches by
    bisection on log d, with its own projection, so that few dimensions are trained. The result, as JSON, and a figure
    are written into `output_dir`. All runs are kept in a database: a measurement that is started again continues, and
    several processes may work on one.

    Args:
        task: a recipe, whose score must be better when higher; or a function of d (None for all parameters), the seed
            (0, 1, ...) and a factor on its learning rate, which trains and returns the score.
        overrides: changes to the recipe, each `section.key=value`.
        options: arguments of `MeasureArguments`: `seeds`, `share`, `smallest`, `largest`, `precision`, `rates`,
            `dev_split`, `dev_share`, `output_dir`, `storage`, `study_name`, `heartbeat`, `progress`.

    Raises:
        ValueError: a value breaks a rule, the score is a loss, or the study in the database has other settings.
        RuntimeError: no run of full fine-tuning was finished, its score is not positive, or the database fails.
    """
    args = MeasureArguments(**options)
    try:
        with silent_libraries():
            if not callable(task):
                recipe = task if isinstance(task, Recipe) else Recipe.read(task, overrides)
                task = MeasuredRecipe.load(recipe, args)
            return Measuring.of(task, args).run()
    except (OptunaError, SQLAlchemyError) as error:
        raise RuntimeError(f"`storage` (={args.database!r}) cannot be used: {error}") from error


@dataclass
class Measuring:
    """One worker of a measurement.

    Args:
        task: trains and scores.
        args: the arguments.
        queue: holds the runs of all workers.
        settings: the settings that all workers share.
    """

    task: TrainAndScore
    args: MeasureArguments
    queue: Queue
    settings: dict[str, Any]

    @classmethod
    def of(cls, task: TrainAndScore, args: MeasureArguments) -> "Measuring":
        """Open the queue.

        Raises:
            ValueError: the study has other settings.
        """
        args.folder.mkdir(parents=True, exist_ok=True)
        queue = Queue(args.database, args.study_name, heartbeat=args.heartbeat)
        names = ("seeds", "share", "smallest", "largest", "precision", "rates", "dev_split", "dev_share")
        settings = {name: value for name, value in asdict(args).items() if name in names}
        settings["rates"] = list(args.rates)
        if isinstance(task, MeasuredRecipe):
            settings |= task.settings()
        queue.check_protocol(settings)
        return cls(task, args, queue, settings)

    def run(self) -> IntrinsicDimension:
        """Work until all searches have ended, and write result and figure.

        Raises:
            RuntimeError: no run of full fine-tuning was finished, or its score is not positive.
        """
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "runs", TimeElapsedColumn())
        progress = Progress if sys.stderr.isatty() else SearchLines
        with progress(*columns, disable=not self.args.progress) as bars, frozen_garbage():
            self._work([run for seed in range(self.args.seeds) for run in self.runs_of(FULL, None, seed)], bars)
            self.check_full()
            number = 0
            while runs := self.round(number):
                self._work(runs, bars)
                number += 1
        result = self.result()
        result.save(self.args.folder)
        write_figure(result, self.args.folder)
        self.queue.close()
        return result

    def runs_of(self, stage: str, d: int | None, seed: int) -> list[Run]:
        """The runs of a dimension with a seed, one for each learning rate."""
        name = FULL if d is None else f"d={d}"
        return [
            Run(stage, f"{name} rate={rate:g}", seed, seed, {"d": d, "rate": float(rate)}) for rate in self.args.rates
        ]

    def round(self, number: int) -> list[Run]:
        """The next dimensions of all seeds, by the scores of the rounds before."""
        stages = {f"round {i}" for i in range(number)}
        records = [record for record in self.queue.records() if record.run.stage in stages]
        runs = []
        for seed in range(self.args.seeds):
            *_, following = self.bisection().bracket(scores_by_dimension(records, seed, failed=-math.inf))
            runs += [run for d in following for run in self.runs_of(f"round {number}", d, seed)]
        return runs

    def full(self) -> dict[int, float]:
        """Seed -> score of full fine-tuning."""
        scores: dict[int, float] = {}
        for record in self.queue.records(FULL):
            if record.state == "done":
                seed, score = record.run.seed, record.scores["dev"]
                scores[seed] = max(score, scores.get(seed, score))
        return scores

    def check_full(self) -> None:
        """Refuse to search without a score to compare with.

        Raises:
            RuntimeError: no run of full fine-tuning was finished, or its score is not positive.
        """
        full = self.full()
        if not full:
            error = next((r.error for r in self.queue.records(FULL) if r.error), "none was started")
            raise RuntimeError(f"No run of full fine-tuning was finished; the first error: {error}")
        if sum(full.values()) <= 0:
            raise RuntimeError(f"The scores of full fine-tuning, {list(full.values())}, are not positive.")

    def bisection(self) -> Bisection:
        """The search, the same for each seed."""
        full = self.full()
        threshold = self.args.share * sum(full.values()) / len(full)
        return Bisection(threshold, self.args.smallest, self.args.largest, self.args.precision)

    def result(self) -> IntrinsicDimension:
        """The result of the runs so far."""
        records = [record for record in self.queue.records() if record.run.stage != FULL]
        seeds = range(self.args.seeds)
        paths = {
            seed: self.bisection().bracket(scores_by_dimension(records, seed, failed=-math.inf)) for seed in seeds
        }
        return IntrinsicDimension(
            score=getattr(self.task, "score", "score"),
            share=self.args.share,
            full=self.full(),
            scores={seed: dict(sorted(scores_by_dimension(records, seed).items())) for seed in seeds},
            brackets={seed: (low, high) for seed, (low, high, _) in paths.items()},
            settings=self.settings,
            errors=list(dict.fromkeys(record.error for record in self.queue.records() if record.error)),
        )

    def _work(self, runs: list[Run], bars: Progress) -> None:
        """Work on a stage with all workers."""
        bar = bars.add_task(runs[0].stage, total=len(runs), failed="")

        def show(records: list[Record]) -> None:
            failed = sum(record.state == "failed" for record in records)
            finished = sum(record.state in FINISHED for record in records)
            bars.update(bar, completed=finished, failed=f"{failed} failed" if failed else "")

        self.queue.work(runs, self.execute, show)

    def execute(self, trial: Trial, run: Run) -> float:
        """Execute a run, and keep its score in its trial.

        Raises:
            ValueError: the score is not a finite number.
        """
        start = time.perf_counter()
        score = float(self.task(run.config["d"], run.seed, run.config["rate"]))
        if not math.isfinite(score):
            raise ValueError(f"The score, {score}, is not a finite number.")
        trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
        trial.set_user_attr("scores", {"dev": score})
        return score


def scores_by_dimension(records: Sequence[Record], seed: int, failed: float | None = None) -> dict[int, float]:
    """Dimension -> the best score over the learning rates of a seed.

    Args:
        records: runs of the searches.
        seed: the seed.
        failed: the score of a failed run; None to leave it out.
    """
    scores: dict[int, float] = {}
    for record in records:
        score = record.scores["dev"] if record.state == "done" else failed if record.state == "failed" else None
        if record.run.seed == seed and score is not None:
            d = record.run.config["d"]
            scores[d] = max(score, scores.get(d, score))
    return scores
