"""Successive halving: each learning rate trains for a share of the steps, and the better ones go on."""

import math
from typing import Any

from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from transformers import TrainerCallback

from hf_peft_ext.compare.run_recipe import read_score

REDUCTION = 3  # one in so many goes on


class HalvingByMethod(BasePruner):
    """Optuna's `SuccessiveHalvingPruner` among the runs of one method; by itself it compares all trials of a study."""

    def __init__(self) -> None:
        self.halving = SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to stop a run after its last report."""
        return self.halving.prune(RunsOfMethod(study, trial), trial)  # type: ignore[arg-type]


class RunsOfMethod:
    """A study with the trials of one method and stage alone.

    Args:
        study: the study.
        trial: one of them.
    """

    def __init__(self, study: Study, trial: FrozenTrial):
        self.study, self.run = study, trial.user_attrs["run"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        """The trials that compete; those of killed workers do not."""
        names = ("stage", "constraint")
        return [
            trial
            for trial in self.study.get_trials(*args, **kwargs)
            if trial.state is not TrialState.FAIL
            and all(trial.user_attrs.get("run", {}).get(name) == self.run[name] for name in names)
        ]


class RungReports(TrainerCallback):
    """Evaluates a run at each rung, reports the score, and stops the run if the pruner says so.

    With 3 rates there is one rung, at a third of the steps; with 9 there are two, at a ninth and at a third.

    Args:
        trial: the run's trial.
        rates: number of learning rates.
        score: name of the score.
    """

    def __init__(self, trial: Trial, rates: int, score: str):
        self.trial, self.score, self.is_stopped = trial, score, False
        self.value: float | None = None  # the last score that was reported
        self.rungs = max(1, round(math.log(rates, REDUCTION)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation at a rung."""
        control.should_evaluate = self._rung(state) is not None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Report the score of a rung."""
        rung = self._rung(state)
        if rung is None or self.is_stopped:
            return
        self.value = read_score(metrics, self.score)
        self.trial.report(self.value, REDUCTION**rung)
        if self.trial.should_prune():
            self.is_stopped = control.should_training_stop = True

    def _rung(self, state: Any) -> int | None:
        """The number of the rung at this step, or None."""
        steps = {math.ceil(state.max_steps / REDUCTION ** (self.rungs - rung)): rung for rung in range(self.rungs)}
        return steps.get(state.global_step) if state.global_step < state.max_steps else None
