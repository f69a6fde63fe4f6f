"""Sums up the runs of a comparison: a row for each method, tests, and the recommendation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hf_peft_ext.compare.inference import PairedTest, adjusted, mean_interval, paired_test, verdict
from hf_peft_ext.compare.method_scores import MethodScores
from hf_peft_ext.compare.recommend import listing, recommend
from hf_peft_ext.compare.result import MethodComparison
from hf_peft_ext.compare.runs import RATES, SEEDS, WINNER
from hf_peft_ext.compare.sizes import SizedMethod
from hf_peft_ext.search.run_record import Record


@dataclass
class Summary:
    """The records of a comparison, and what they are summed up with.

    Args:
        methods: name -> method and sizes.
        reference: the name of the reference.
        score: name of the score.
        rates: method -> its chosen learning rate.
        records: the runs.
        rows: number of training and dev rows.
        settings, notes: as in `MethodComparison`.
        folder: the folder of the results.
    """

    methods: dict[str, SizedMethod]
    reference: str
    score: str
    rates: dict[str, float]
    records: Sequence[Record]
    rows: dict[str, int]
    settings: dict[str, Any]
    notes: list[str]
    folder: Path

    @property
    def higher_is_better(self) -> bool:
        """False if the score is a loss."""
        return self.score != "loss"

    def result(self) -> MethodComparison:
        """The result of the comparison."""
        base = self.scores(self.reference)
        tests = {name: paired_test(self.scores(name), base) for name in self.methods if name != self.reference}
        p_adjusted = adjusted({name: test.p_value if test else None for name, test in tests.items()})
        methods = [self.method_scores(name, tests.get(name), p_adjusted.get(name)) for name in self.methods]
        winner, sentence = recommend(methods, self.reference, self.score, self.higher_is_better, self.rows["train"])
        trained = max(self.of(WINNER, winner), key=lambda r: r.run.model, default=None) if winner else None
        is_trained = trained is not None and trained.state == "done"
        notes = [*self.notes, *self.rate_notes()]
        if trained is not None and trained.error:
            notes.append(f"The winner was not trained: {trained.error}")
        return MethodComparison(
            methods,
            self.reference,
            self.score,
            self.higher_is_better,
            sentence,
            winner,
            dict(self.rows),
            self.settings,
            notes,
            folder=str(self.folder / WINNER) if is_trained else None,
            test_score=trained.measures.get(self.score) if trained and is_trained else None,
        )

    def rate_notes(self) -> list[str]:
        """Names the methods whose best learning rate has no worse one on both sides."""
        titles = []
        for name, chosen in self.rates.items():
            tried = {r.run.config["learning_rate"] for r in self.of(RATES, name)}
            if len(tried) > 2 and chosen in (min(tried), max(tried)):
                titles.append(self.methods[name].method.title)
        end = "at the end of those tried; others (`--rates`) may be better"
        return [f"The best learning rate is {end}: {listing(titles)}."] if titles else []

    def of(self, stage: str, name: str) -> list[Record]:
        """The runs of a method in a stage."""
        return [r for r in self.records if (r.run.stage, r.run.constraint) == (stage, name)]

    def scores(self, name: str) -> dict[int, float]:
        """Seed -> the score of a method at its chosen rate, as measured: a loss is positive."""
        return {r.run.seed: self.measured(r) for r in self.of(SEEDS, name) if r.state == "done"}

    def measured(self, record: Record) -> float:
        """The score of a run, as measured."""
        return record.scores["dev"] * (1 if self.higher_is_better else -1)

    def method_scores(self, name: str, test: PairedTest | None, p_adjusted: float | None) -> MethodScores:
        """The row of a method."""
        sized, scores, runs = self.methods[name], self.scores(name), self.of(SEEDS, name)
        tried, every = self.of(RATES, name), [r for r in self.records if r.run.constraint == name]
        measures = [r.measures for r in runs if r.state == "done"]
        step, usual = self.step_seconds(name), self.step_seconds(self.reference)
        result = verdict(test, p_adjusted, self.higher_is_better)
        return MethodScores(
            name=name,
            title=sized.method.title,
            config=sized.config,
            learning_rate=self.rates.get(name),
            rates={f"{r.run.config['learning_rate']:g}": self.measured(r) for r in tried if "dev" in r.scores},
            scores=scores,
            mean=fmean(scores.values()) if scores else None,
            interval=mean_interval(list(scores.values())),
            difference=test.difference if test else None,
            difference_interval=None if test is None or test.low is None else (test.low, test.high or 0.0),
            p_value=test.p_value if test else None,
            p_adjusted=p_adjusted,
            verdict=("reference" if scores else "failed") if name == self.reference else result,
            parameters=next((r.parameters for r in every if r.parameters is not None), sized.parameters),
            is_fixed_size=not sized.method.takes_budget,
            bytes=next((int(m["bytes"]) for m in measures if "bytes" in m), None),
            step_seconds=step,
            step_ratio=step / usual if step and usual else None,
            memory=next((int(m["memory"]) for m in measures if "memory" in m), None),
            base_loss=mean_of(measures, "base_loss"),
            adapter_loss=mean_of(measures, "adapter_loss"),
            seconds=sum(r.seconds or 0.0 for r in every),
            failed=sum(r.state == "failed" for r in runs),
            error=next((r.error for r in every if r.error), None),
        )

    def step_seconds(self, name: str) -> float | None:
        """The median over a method's runs of the median time of a step."""
        times = [r.measures["step_seconds"] for r in self.of(SEEDS, name) if r.measures.get("step_seconds")]
        return median(times) if times else None


def mean_of(measures: Sequence[dict[str, float]], name: str) -> float | None:
    """The mean of a measure over the runs that have it."""
    values = [m[name] for m in measures if name in m]
    return fmean(values) if values else None


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """Method -> the learning rate with the best score among its finished runs.

    Args:
        records: the runs that tried learning rates.
    """
    best: dict[str, Record] = {}
    for record in (record for record in records if record.state == "done"):
        current = best.setdefault(record.run.constraint, record)
        if record.scores["dev"] > current.scores["dev"]:
            best[record.run.constraint] = record
    return {name: record.run.config["learning_rate"] for name, record in best.items()}
