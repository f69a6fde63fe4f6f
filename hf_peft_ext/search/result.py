"""The result of a search: its runs, the decision of each stage, the resulting config; as objects and as a CSV file."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType

from hf_peft_ext.search.constraints import ConstraintComparison
from hf_peft_ext.search.run_record import Record
from hf_peft_ext.search.trial_queue import Queue
from hf_peft_ext.validation.checks import check

DECISION, RESULT = "decision ", "result"  # the study's attributes for a stage's decision and the resulting config
ATTRIBUTES = ("parameters", "seconds", "error", "worker")  # columns of the CSV file


@dataclass(frozen=True)
class Decision:
    """The decision of a stage.

    Args:
        stage: "S1", "S2", ...
        winner: the constraint with the highest mean.
        means: constraint -> mean score of its models.
        spreads: constraint -> standard deviation of the scores; None for a single model.
        runs: constraint -> number of models that count.
        failed: constraint -> number of failed models, which do not count.
        left_out: constraint -> why no model can meet it.
        p_value: of the difference between winner and runner-up; None if nothing was compared, or too few models ran.
        tie: whether the difference is not significant.
    """

    stage: str
    winner: str
    means: dict[str, float]
    spreads: dict[str, float | None]
    runs: dict[str, int]
    failed: dict[str, int]
    left_out: dict[str, str]
    p_value: float | None
    tie: bool

    @classmethod
    def of(
        cls, stage: str, compared: ConstraintComparison, records: Sequence[Record], left_out: Mapping[str, str]
    ) -> "Decision":
        """The decision from the comparison of a stage's scores and from the stage's records."""
        failed = [record.run.constraint for record in records if record.state == "failed"]
        return cls(
            stage,
            compared.winner,
            means=compared.means,
            spreads={name: None if math.isnan(spread) else spread for name, spread in compared.spreads.items()},
            runs=compared.runs,
            failed={name: failed.count(name) for name in dict.fromkeys(failed)},
            left_out=dict(left_out),
            p_value=compared.p_value,
            tie=compared.tie,
        )


@dataclass(frozen=True)
class SearchResult:
    """State and results of a search, finished or not.

    Args:
        study_name: its name.
        records: the runs.
        decisions: the decisions so far, in order.
        protocol: the settings that all runs share.
        config_values: the resulting config, from `PeftConfig.to_dict`; None while the search is unfinished.
    """

    study_name: str
    records: list[Record]
    decisions: list[Decision]
    protocol: dict[str, Any]
    config_values: dict[str, Any] | None = None

    @classmethod
    def load(cls, storage: str, study_name: str) -> "SearchResult":
        """Read a search.

        Args:
            storage: its database, as in `DesignSpaceSearch`.
            study_name: its name.

        Raises:
            ValueError: there is no such search, or it has no run yet.
        """
        queue = Queue(storage, study_name, create=False)
        try:
            result = cls.read(queue)
            check("study_name", study_name, bool(result.records), "names a search that has no run yet")
            return result
        finally:
            queue.close()

    @classmethod
    def read(cls, queue: Queue) -> "SearchResult":
        """Read the search of a queue."""
        records = queue.records()
        attrs = [queue.get_attr(f"{DECISION}{stage}") for stage in dict.fromkeys(r.run.stage for r in records)]
        decisions = [Decision(**values) for values in attrs if values]
        protocol = queue.get_attr("protocol") or {}
        return cls(queue.study.study_name, records, decisions, protocol, queue.get_attr(RESULT))

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return self.protocol["tasks"]

    @property
    def stages(self) -> list[str]:
        """The stages that have runs, in order."""
        return list(dict.fromkeys(record.run.stage for record in self.records))

    @property
    def config(self) -> PeftConfig:
        """The resulting config, for `get_peft_model`.

        Raises:
            RuntimeError: the search is not finished.
        """
        if self.config_values is None:
            raise RuntimeError(f"The search {self.study_name!r} is not finished; start it again to continue.")
        return config_from_values(self.config_values)

    def of(self, stage: str) -> list[Record]:
        """The runs of a stage."""
        return [record for record in self.records if record.run.stage == stage]

    def scores(self, stage: str) -> dict[str, list[float]]:
        """Constraint -> the scores that are compared."""
        return scores_of(self.of(stage), self.tasks)

    def to_csv(self, path: str | Path) -> Path:
        """Write a CSV file with a row for each run.

        Returns:
            The path.
        """
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            head = ["stage", "constraint", "model", "seed", "state", "score", *self.tasks, *ATTRIBUTES]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            for record in self.records:
                run, scores = record.run, [record.scores.get(task) for task in self.tasks]
                score = mean(record.scores.values()) if record.state == "done" else None
                attrs = [getattr(record, name) for name in ATTRIBUTES]
                writer.writerow([run.stage, run.constraint, run.model, run.seed, record.state, score, *scores, *attrs])
        return path


def config_from_values(values: Mapping[str, Any]) -> PeftConfig:
    """A config from the values of `PeftConfig.to_dict`."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(values["peft_type"])](
        **{name: value for name, value in values.items() if name not in ("peft_type", "auto_mapping", "peft_version")}
    )


def scores_of(records: Sequence[Record], tasks: Sequence[str]) -> dict[str, list[float]]:
    """Constraint -> one score for each of its models: the mean over the tasks. Failed models do not count.

    A stopped model counts with its last scores. A task that it did not reach counts with the mean of the finished
    models, plus the stopped model's mean difference from them on its own tasks.
    """
    done = [record for record in records if record.state == "done"]
    means = {task: mean(record.scores[task] for record in done) for task in tasks} if done else {}
    scores: dict[str, list[float]] = {}
    for record in records:
        if record.state == "done" or (record.state == "stopped" and record.scores and done):
            difference = mean(record.scores[task] - means[task] for task in record.scores)
            completed = [record.scores.get(task, means[task] + difference) for task in tasks]
            scores.setdefault(record.run.constraint, []).append(mean(completed))
    return scores
