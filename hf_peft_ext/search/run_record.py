"""A run of a search, and its record: what the search's database knows of it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

State = Literal["waiting", "running", "done", "stopped", "failed", "lost"]
TRIAL_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
# If a run has several trials, the one with the first of these states counts.
PRECEDENCE: tuple[State, ...] = ("done", "stopped", "failed", "running", "waiting", "lost")


@dataclass(frozen=True)
class Run:
    """A sampled model, to be trained on every task.

    Args:
        stage: "S1", "S2", ...
        constraint: the constraint under which the model was sampled.
        model: its index among the samples of the constraint.
        seed: seed of its training.
        config: the adapter's config, from `PeftConfig.to_dict`.
    """

    stage: str
    constraint: str
    model: int
    seed: int
    config: dict[str, Any] = field(compare=False)

    @property
    def key(self) -> tuple[str, str, int]:
        """Stage, constraint and model, which identify the run in its study."""
        return self.stage, self.constraint, self.model


@dataclass(frozen=True)
class Record:
    """State and results of a run.

    Args:
        run: the run.
        number: its trial in the study.
        state: its state; a run is "lost" from the death of its worker until it is enqueued again.
        scores: task -> score; a stopped run has only the tasks that it reached.
        parameters: number of trained parameters of the adapter, without the head.
        seconds: time spent on it.
        error: why it failed.
        worker: host and process that carried it out.
        measures: other numbers of the run, by name.
    """

    run: Run
    number: int
    state: State
    scores: dict[str, float]
    parameters: int | None = None
    seconds: float | None = None
    error: str | None = None
    worker: str | None = None
    measures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_trial(cls, trial: FrozenTrial) -> "Record":
        """The record of a trial. A failed trial without an error was left by a killed worker."""
        attrs = trial.user_attrs
        results = {name: attrs.get(name) for name in ("parameters", "seconds", "error", "worker")}
        state = "lost" if trial.state is TrialState.FAIL and "error" not in attrs else TRIAL_STATES[trial.state]
        measures = attrs.get("measures", {})
        return cls(Run(**attrs["run"]), trial.number, state, attrs.get("scores", {}), **results, measures=measures)

    def retry_attrs(self) -> dict[str, Any]:
        """User attributes of the trial that continues this run: the run and its results so far."""
        results = {"parameters": self.parameters, "seconds": self.seconds, "scores": self.scores}
        return {"run": asdict(self.run), **{name: value for name, value in results.items() if value}}
