"""Runs of a comparison: each trains one method at one learning rate and seed, through the recipe's trainer."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import optuna
import torch
import transformers
from optuna.trial import Trial
from transformers import PrinterCallback, ProgressCallback

from hf_peft_ext.compare.halving import RungReports
from hf_peft_ext.compare.measures import StepMemory, adapter_bytes
from hf_peft_ext.compare.retention import text_loss
from hf_peft_ext.compare.rows import ComparedRows, RowsAndLabels
from hf_peft_ext.compare.run_recipe import read_score, run_recipe, score_name, winner_recipe
from hf_peft_ext.compare.settings import CompareArguments
from hf_peft_ext.compare.sizes import SizedMethod
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.recipes.run import prepare, train
from hf_peft_ext.search.run_record import Run
from hf_peft_ext.search.search import adapter_parameters

RATES, SEEDS, WINNER = "rates", "seeds", "winner"  # the stages of a comparison


@dataclass
class MethodRuns:
    """Executes the runs of a comparison.

    Args:
        recipe: the user's recipe.
        args: the arguments of the comparison.
        rows: training and dev rows.
        methods: name -> method and sizes.
        texts: general texts, to measure retention on; None for a model without a language-modelling head.
    """

    recipe: Recipe
    args: CompareArguments
    rows: ComparedRows
    methods: Mapping[str, SizedMethod]
    texts: Sequence[str] | None

    def execute(self, trial: Trial, run: Run) -> float:
        """Execute a run, and keep its results in its trial.

        Returns:
            The score on the dev rows, higher is better.

        Raises:
            optuna.TrialPruned: the learning rate is not among the better ones of its method.
            ValueError: the score is not a finite number.
        """
        start, before = time.perf_counter(), trial.user_attrs.get("seconds", 0.0)
        try:
            with TemporaryDirectory() as folder:
                return self._execute(trial, run, Path(folder))
        finally:
            trial.set_user_attr("seconds", round(before + time.perf_counter() - start, 3))

    def _execute(self, trial: Trial, run: Run, folder: Path) -> float:
        name, method = score_name(self.recipe), self.methods[run.constraint].method
        peft, rate = run.config["peft"], run.config["learning_rate"]
        recipe = run_recipe(self.recipe, peft, rate, run.seed, folder, self.args.dev_split)
        trainer = prepare_quietly(recipe, self.rows.of(run.seed))
        if method.trains_base:
            train_base(trainer.model)
        trial.set_user_attr("parameters", adapter_parameters(trainer.model))
        measures = {}
        reports = RungReports(trial, len(self.args.rates), name)
        memory = StepMemory(trainer.model)
        if run.stage == RATES:
            trainer.add_callback(reports)
        elif run.model == 0:
            trainer.add_callback(memory)
        if run.stage == SEEDS and self.texts is not None:
            with trainer.model.disable_adapter():
                measures["base_loss"] = text_loss(trainer.model, trainer.processing_class, self.texts)
        try:
            trainer.train()
        finally:
            memory.stop()  # a profiler that is left running crashes the process at its end
        if reports.is_stopped:
            trial.set_user_attr("scores", {"dev": reports.value})
            raise optuna.TrialPruned
        score = read_score(trainer.evaluate(), name)
        if run.stage == SEEDS and self.texts is not None:
            measures["adapter_loss"] = text_loss(trainer.model, trainer.processing_class, self.texts)
        clock = trainer.recorder.clock
        measures |= {"step_seconds": clock.step_time, "bytes": adapter_bytes(trainer.model, method.trains_base)}
        peak = clock.peak_memory if trainer.args.device.type == "cuda" else memory.peak
        if peak is not None:
            measures["memory"] = peak
        trial.set_user_attr("measures", measures)
        trial.set_user_attr("scores", {"dev": score})
        return score

    def train_winner(self, trial: Trial, run: Run) -> float:
        """Train the winner on all training rows, score it once on the test rows, and save it.

        Returns:
            The score on the test rows; 0 without test rows.
        """
        start, name = time.perf_counter(), score_name(self.recipe)
        folder, method = self.args.folder / WINNER, self.methods[run.constraint].method
        has_test = self.recipe.data.eval_split not in (None, self.args.dev_split)
        recipe = winner_recipe(self.recipe, run.config["peft"], run.config["learning_rate"], folder, has_test)
        trainer = prepare_quietly(recipe)
        for other, scores in run.config["dev_scores"].items():
            who = "adapter" if other == run.constraint else other
            trainer.record_results({name: scores}, who, dataset=self.recipe.data.title, split="dev")
        if method.trains_base:
            train_base(trainer.model)
            trainer.train()
            metrics = trainer.evaluate() if has_test else {}
            save_base(trainer, folder)
        else:
            metrics = train(recipe, trainer).metrics
        tested = {key: float(value) for key, value in metrics.items() if f"eval_{name}" == key}
        trial.set_user_attr("measures", {key.removeprefix("eval_"): value for key, value in tested.items()})
        trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
        return fmean(tested.values()) if tested else 0.0


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Without the bars and reports of loading and tokenization, which would be those of every run."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    had_bars = not datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
        if had_bars:
            datasets.enable_progress_bars()


def prepare_quietly(recipe: Recipe, rows: RowsAndLabels | None = None) -> Any:
    """The trainer of a recipe, which prints nothing."""
    trainer = prepare(recipe, rows)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def train_base(model: Any) -> None:
    """Train all parameters of the base model, in float32; the adapter has no layers."""
    for name, parameter in model.named_parameters():
        if "original_module" not in name and parameter.is_floating_point():  # that is the head before training
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def save_base(trainer: Any, folder: Path) -> None:
    """Save the whole model after full fine-tuning, with its tokenizer."""
    trainer.model.merge_and_unload().save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
