"""Compares methods on a recipe's own model and rows: the stages of a comparison, on the queue of the search."""

import copy
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy.exc import SQLAlchemyError

from hf_peft_ext.compare.halving import HalvingByMethod
from hf_peft_ext.compare.methods import REFERENCE, method_named
from hf_peft_ext.compare.page import write_page
from hf_peft_ext.compare.result import MethodComparison
from hf_peft_ext.compare.retention import read_texts
from hf_peft_ext.compare.rows import ComparedRows
from hf_peft_ext.compare.run_recipe import run_recipe, score_name
from hf_peft_ext.compare.runs import RATES, SEEDS, WINNER, MethodRuns, silent_libraries
from hf_peft_ext.compare.settings import USUAL_METHODS, CompareArguments
from hf_peft_ext.compare.sizes import Budget, SizedMethod, empty_model, size_methods
from hf_peft_ext.compare.summary import Summary, best_rates
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.search.progress import SearchLines
from hf_peft_ext.search.run_record import Record, Run
from hf_peft_ext.search.search import FINISHED
from hf_peft_ext.search.trial_queue import Queue, frozen_garbage
from hf_peft_ext.validation.checks import check


def compare(
    recipe: str | Path | Recipe,
    methods: Sequence[str] = USUAL_METHODS,
    budget: Budget = None,
    seeds: int = 3,
    *,
    overrides: Sequence[str] = (),
    **options: Any,
) -> MethodComparison:
    """Compare methods on the model and rows of a recipe, and train the recommended one.

    Each method gets a few learning rates, chosen by successive halving on dev rows, then runs with other seeds at the
    best rate. The table, as JSON, and one HTML page are written into `output_dir`. All runs are kept in a database: a
    comparison that is started again continues, and several processes may work on one. The recipe's `eval_split` is
    read once, at the end, to score the winner (unless it is `dev_split`).

    Args:
        recipe: the path of a recipe, or a `Recipe`. Its `peft` section counts for the method of that type.
        methods: names of methods; LoRA, if it is among them, is the reference.
        budget: trained parameters of each method, as a share of the base model ("0.5%") or a number; None for the
            methods' own sizes.
        seeds: number of runs of each method at its chosen learning rate.
        overrides: changes to the recipe, each `section.key=value`.
        options: the other arguments of `CompareArguments`: `rates`, `dev_split`, `dev_share`, `general_text`,
            `output_dir`, `storage`, `study_name`, `heartbeat`, `train_winner`, `progress`.

    Returns:
        A row for each method, and the recommendation.

    Raises:
        ValueError: a value breaks a rule, a method cannot be attached or cannot meet the budget, there are no dev
            rows, or the study in the database has other settings. Nothing has been trained then.
        RuntimeError: no run was finished, or the database fails.
    """
    args = CompareArguments(methods, budget, seeds, **options)
    read = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe, overrides)
    try:
        with silent_libraries():
            return Comparing.of(read, args).run()
    except (OptunaError, SQLAlchemyError) as error:
        raise RuntimeError(f"`storage` (={args.database!r}) cannot be used: {error}") from error


@dataclass
class Comparing:
    """One worker of a comparison.

    Args:
        recipe: the user's recipe.
        args: the arguments.
        rows: training and dev rows.
        methods: name -> method and sizes.
        runs: executes runs.
        queue: holds the runs of all workers.
        notes: what was left out, and why.
    """

    recipe: Recipe
    args: CompareArguments
    rows: ComparedRows
    methods: dict[str, SizedMethod]
    runs: MethodRuns
    queue: Queue
    notes: list[str]

    @classmethod
    def of(cls, recipe: Recipe, args: CompareArguments) -> "Comparing":
        """Check everything, and load the rows.

        Raises:
            ValueError: as `compare`.
        """
        named = {name: method_named(name, recipe.written["peft"]) for name in args.methods}
        for name, method in named.items():
            if method.trains_base and recipe.quantization is not None:
                raise RecipeError(f"`methods` (={name!r}) cannot train a quantized model; leave it out.")
        causal = str(recipe.written["peft"]["task_type"]) == "CAUSAL_LM"
        texts = read_texts(args.general_text) if causal else None
        rows = ComparedRows.load(recipe, args.dev_split, args.dev_share)
        task_type = recipe.written["peft"]["task_type"]
        methods = size_methods(named, args.budget, task_type, lambda: empty_model(recipe, rows.labels))
        for sized in methods.values():  # their errors now, not in each run
            run_recipe(recipe, sized.config, sized.learning_rate, 0, args.folder, args.dev_split)
        args.folder.mkdir(parents=True, exist_ok=True)
        queue = Queue(args.database, args.study_name, HalvingByMethod(), args.heartbeat)
        comparing = cls(
            recipe, args, rows, methods, MethodRuns(recipe, args, rows, methods, texts), queue,
            [] if causal else ["Retention was not measured: this model has no causal language-modelling head."],
        )  # fmt: skip
        queue.check_protocol(comparing.protocol())
        comparing.extend()
        return comparing

    def extend(self) -> None:
        """Note the methods and the number of seeds, to which a later command can add.

        Raises:
            ValueError: a method has another config in the study, or there are fewer seeds.
        """
        earlier: dict[str, Any] = self.queue.get_attr("methods") or {}
        configs = {name: sized.config for name, sized in self.methods.items()}
        for name in earlier.keys() & configs.keys():
            rule = f"is {earlier[name]} in the study {self.args.study_name!r}; choose another `study_name`"
            check(f"methods.{name}", configs[name], earlier[name] == json.loads(json.dumps(configs[name])), rule)
        least = self.queue.get_attr("seeds") or 0
        rule = f"must be at least {least}, as in the study {self.args.study_name!r}; or choose another `study_name`"
        check("seeds", self.args.seeds, self.args.seeds >= least, rule)
        self.queue.set_attr("methods", earlier | configs)
        self.queue.set_attr("seeds", self.args.seeds)

    def protocol(self) -> dict[str, Any]:
        """The settings that all workers share."""
        written = copy.deepcopy(self.recipe.written)
        written["training"].pop("output_dir")
        columns = [self.rows.train, *([self.rows.dev] if self.rows.dev is not None else [])]
        content = repr([[list(part[column]) for column in self.recipe.data.columns()] for part in columns])
        return {
            "recipe": written,
            "rates": list(self.args.rates),
            "dev_split": self.args.dev_split,
            "dev_share": self.args.dev_share,
            "general_text": list(self.runs.texts or ()),
            "rows": hashlib.sha256(content.encode()).hexdigest()[:12],
        }

    @property
    def reference(self) -> str:
        """The method that the others are tested against."""
        return REFERENCE if REFERENCE in self.methods else next(iter(self.methods))

    def run(self) -> MethodComparison:
        """Work until the winner is trained, and write table and page.

        Raises:
            RuntimeError: no run was finished.
        """
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "runs", TimeElapsedColumn(), "left:")
        progress = Progress if sys.stderr.isatty() else SearchLines
        shown = (*columns, TimeRemainingColumn(), "[red]{task.fields[failed]}")
        with progress(*shown, disable=not self.args.progress) as bars, frozen_garbage():
            self._work(self.rate_runs(), bars)
            self._work(self.seed_runs(), bars)
            result = self.summary().result()
            if result.winner is not None and self.args.train_winner:
                self._work([self.winner_run(result)], bars)
                result = self.summary().result()
        result.save(self.args.folder)
        write_page(result, self.args.folder)
        self.queue.close()
        return result

    def rate_runs(self) -> list[Run]:
        """A run for each learning rate and method; the usual rates first, since the first run is never stopped."""
        if len(self.args.rates) == 1:
            return []
        rates = sorted(self.args.rates, key=lambda rate: max(rate, 1 / rate))
        return [
            self._make_run(RATES, name, i, self.recipe.training.seed, rate * sized.learning_rate)
            for i, rate in enumerate(rates)
            for name, sized in self.methods.items()
        ]

    def seed_runs(self) -> list[Run]:
        """The runs of each method at its best learning rate, with seeds that no rate was chosen by.

        Raises:
            RuntimeError: every run failed.
        """
        rates = self.best_rates()
        if not rates:
            error = next((r.error for r in self.queue.records(RATES) if r.error), "none was started")
            raise RuntimeError(f"No run of any method was finished; the first error: {error}")
        return [
            self._make_run(SEEDS, name, i, self.recipe.training.seed + 1 + i, rates[name])
            for i in range(self.args.seeds)
            for name in self.methods
            if name in rates
        ]

    def winner_run(self, result: MethodComparison) -> Run:
        """The run that trains the winner, with the dev scores that its card shows."""
        winner = result.of(str(result.winner))
        seeds = self.args.seeds  # with more of them the card has other scores
        run = self._make_run(WINNER, winner.name, seeds, self.recipe.training.seed, winner.learning_rate or 0.0)
        shown = {name: list(result.of(name).scores.values()) for name in (winner.name, result.reference)}
        run.config["dev_scores"] = {name: scores for name, scores in shown.items() if scores}
        return run

    def best_rates(self) -> dict[str, float]:
        """Method -> its best learning rate; methods without a finished run are left out."""
        if len(self.args.rates) == 1:
            return {name: self.args.rates[0] * sized.learning_rate for name, sized in self.methods.items()}
        return best_rates(self.queue.records(RATES))

    def summary(self) -> Summary:
        """The results so far."""
        rows = {"train": len(self.rows.train), "dev": len(self.rows.of(self.recipe.training.seed)[1])}
        return Summary(
            self.methods, self.reference, score_name(self.recipe), self.best_rates(), self.queue.records(), rows,
            self.settings(), self.notes, self.args.folder,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The settings that the report shows."""
        args, split = self.args, self.args.dev_split
        dev = f"the split {split}" if split else f"{args.dev_share:.0%} of the training rows, others for each seed"
        return {
            "model": self.recipe.model.model_name_or_path,
            "data": self.recipe.data.title,
            "budget": args.budget,
            "seeds": args.seeds,
            "rates": ", ".join(f"{rate:.3g}" for rate in args.rates) + " times each method's usual rate",
            "dev rows": dev,
        }

    def _make_run(self, stage: str, name: str, model: int, seed: int, rate: float) -> Run:
        config: Mapping[str, Any] = {"peft": self.methods[name].config, "learning_rate": float(f"{rate:.4g}")}
        return Run(stage, name, model, seed, dict(config))

    def _work(self, runs: list[Run], bars: Progress) -> None:
        """Work on a stage with all workers."""
        if not runs:
            return
        bar = bars.add_task(runs[0].stage, total=len(runs), failed="")

        def show(records: list[Record]) -> None:
            failed = sum(record.state == "failed" for record in records)
            finished = sum(record.state in FINISHED for record in records)
            bars.update(bar, completed=finished, failed=f"{failed} failed" if failed else "")

        execute = self.runs.train_winner if runs[0].stage == WINNER else self.runs.execute
        self.queue.work(runs, execute, show)
