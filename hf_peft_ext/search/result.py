"""What came out of a search: its runs, what each stage decided, the winner; as tables and as a config."""

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

from hf_peft_ext.search.compare import Comparison
from hf_peft_ext.search.run_record import Record
from hf_peft_ext.search.trial_queue import Queue
from hf_peft_ext.validation.checks import check

DECISION, FOUND = "decision ", "found"  # under which a stage's decision, and the last space's config, are noted


@dataclass(frozen=True)
class Decision:
    """What a stage came to.

    Args:
        stage: "S1", "S2", ...
        winner: the constraint with the highest mean.
        means: constraint -> mean score of its models.
        spreads: constraint -> their standard deviation; None of a single model.
        runs: constraint -> how many models counted.
        failed: constraint -> how many failed, which do not count.
        left_out: constraint -> why no model can keep to it.
        p_value: of the gap between the winner and the runner-up; None where too few ran, or nothing was compared.
        tie: the gap is not significant.
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
        cls, stage: str, compared: Comparison, records: Sequence[Record], left_out: Mapping[str, str]
    ) -> "Decision":
        lost = [record.run.constraint for record in records if record.state == "failed"]
        return cls(
            stage,
            compared.winner,
            means=compared.means,
            spreads={name: None if math.isnan(spread) else spread for name, spread in compared.spreads.items()},
            runs=compared.runs,
            failed={name: lost.count(name) for name in dict.fromkeys(lost)},
            left_out=dict(left_out),
            p_value=compared.p_value,
            tie=compared.tie,
        )


@dataclass(frozen=True)
class SearchResult:
    """A search as its database has it, finished or not.

    Args:
        study_name: its name.
        records: the runs.
        decisions: the stages that are decided, in order.
        protocol: the settings that all runs share.
        found: the config of the last space, as `PeftConfig.to_dict` gives it; None while the search goes on.
    """

    study_name: str
    records: list[Record]
    decisions: list[Decision]
    protocol: dict[str, Any]
    found: dict[str, Any] | None = None

    @classmethod
    def load(cls, storage: str, study_name: str) -> "SearchResult":
        """The search of that name in a database.

        Raises:
            ValueError: there is no such search, or it has no run yet.
        """
        queue = Queue(storage, study_name, create=False)
        try:
            found = cls.read(queue)
            check("study_name", study_name, bool(found.records), "names a search that has no run yet")
            return found
        finally:
            queue.close()

    @classmethod
    def read(cls, queue: Queue) -> "SearchResult":
        records = queue.records()
        noted = [queue.get_attr(f"{DECISION}{stage}") for stage in dict.fromkeys(r.run.stage for r in records)]
        decisions = [Decision(**values) for values in noted if values]
        return cls(queue.study.study_name, records, decisions, queue.get_attr("protocol") or {}, queue.get_attr(FOUND))

    @property
    def tasks(self) -> list[str]:
        return self.protocol["tasks"]

    @property
    def stages(self) -> list[str]:
        """The stages that were begun, in order."""
        return list(dict.fromkeys(record.run.stage for record in self.records))

    @property
    def config(self) -> PeftConfig:
        """What was found, for `get_peft_model`.

        Raises:
            RuntimeError: the search is not finished.
        """
        if self.found is None:
            raise RuntimeError(f"The search {self.study_name!r} is not finished; go on with it.")
        return config_of(self.found)

    def of(self, stage: str) -> list[Record]:
        return [record for record in self.records if record.run.stage == stage]

    def scores(self, stage: str) -> dict[str, list[float]]:
        """Constraint -> the scores that were compared."""
        return scores_of(self.of(stage), self.tasks)

    def to_csv(self, path: str | Path) -> Path:
        """A row for each run."""
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            known = ("parameters", "seconds", "error", "worker")
            head = ["stage", "constraint", "model", "seed", "state", "score", *self.tasks, *known]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            for record in self.records:
                run, scores = record.run, [record.scores.get(task) for task in self.tasks]
                score = mean(record.scores.values()) if record.state == "done" else None
                own = [getattr(record, name) for name in known]
                writer.writerow([run.stage, run.constraint, run.model, run.seed, record.state, score, *scores, *own])
        return path


def config_of(values: Mapping[str, Any]) -> PeftConfig:
    """A config from what `PeftConfig.to_dict` gave."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(values["peft_type"])](
        **{name: value for name, value in values.items() if name not in ("peft_type", "auto_mapping", "peft_version")}
    )


def scores_of(records: Sequence[Record], tasks: Sequence[str]) -> dict[str, list[float]]:
    """Constraint -> one score for each of its models, the mean over the tasks. Failed ones do not count.

    A model that was stopped early counts with what it reached, and for a task that it did not reach with the mean of
    the models that did, less as much as it lay behind them on the tasks that it has.
    """
    done = [record for record in records if record.state == "done"]
    usual = {task: mean(record.scores[task] for record in done) for task in tasks} if done else {}
    found: dict[str, list[float]] = {}
    for record in records:
        if record.state == "done" or (record.state == "stopped" and record.scores and done):
            behind = mean(record.scores[task] - usual[task] for task in record.scores)
            filled = [record.scores.get(task, usual[task] + behind) for task in tasks]
            found.setdefault(record.run.constraint, []).append(mean(filled))
    return found
