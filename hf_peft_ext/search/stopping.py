"""Stops runs that have no hope, early."""

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hf_peft_ext.validation.checks import check, check_count

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class LowestShare(BasePruner):
    """Stops a run whose score, after some epoch, is in the lowest quarter of those of its stage after the same epoch.

    Optuna's PercentilePruner compares a run's best score so far, which across tasks is that of the easiest one, with
    all trials of the study, of which those of earlier stages are usually worse.

    Args:
        share: what is stopped, 0.25 for the lowest quarter.
        n_startup_runs: so many runs of a stage must have come as far before one is stopped.

    Raises:
        ValueError: a value breaks a rule.
    """

    def __init__(self, share: float = 0.25, n_startup_runs: int = 8):
        check("share", share, 0 < share < 1, "must lie between 0 and 1")
        check_count("n_startup_runs", n_startup_runs)
        self.share, self.n_startup_runs = share, n_startup_runs

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step, stage = trial.last_step, trial.user_attrs["run"]["stage"]
        if step is None:
            return False
        others = [
            other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False, states=ENDED)
            if step in other.intermediate_values and other.user_attrs["run"]["stage"] == stage
        ]
        if len(others) < self.n_startup_runs:
            return False
        return trial.intermediate_values[step] < np.quantile(others, self.share)
