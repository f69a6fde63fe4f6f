"""Stops runs with low scores early."""

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hf_peft_ext.validation.checks import check, check_count

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class LowestShare(BasePruner):
    """Stops a run if its score after an epoch is in the lowest quarter of the stage's scores after the same epoch.

    Optuna's PercentilePruner is not used: it compares a run's best score, which is that of the easiest task, and
    compares it with all stages of the study, of which earlier ones are usually worse.

    Args:
        share: share of the runs that is stopped; 0.25 stops the lowest quarter.
        n_startup_runs: no run is stopped after an epoch that fewer finished runs of its stage have reached.

    Raises:
        ValueError: a value breaks a rule.
    """

    def __init__(self, share: float = 0.25, n_startup_runs: int = 8):
        check("share", share, 0 < share < 1, "must lie between 0 and 1")
        check_count("n_startup_runs", n_startup_runs)
        self.share, self.n_startup_runs = share, n_startup_runs

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to stop a trial after its last report."""
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
