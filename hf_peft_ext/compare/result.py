"""The result of a comparison: a row for each method, and the recommendation; as objects and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_peft_ext.compare.method_scores import MethodScores
from hf_peft_ext.compare.table import cells

RESULT_FILE = "compare.json"


@dataclass(frozen=True)
class MethodComparison:
    """The result of `compare`.

    Args:
        methods: in the order of the arguments.
        reference: the method that the others are tested against.
        score: name of the score.
        higher_is_better: False if the score is a loss.
        recommendation: one sentence.
        winner: the recommended method; None if there is none.
        rows: number of training rows, dev rows and test rows; None without test rows.
        settings: model, data, budget, seeds, rates.
        notes: what was left out, and why.
        folder: the folder of the trained winner, None if it was not trained.
        test_score: the winner's score on the test rows, None without test rows.
    """

    methods: Sequence[MethodScores]
    reference: str
    score: str
    higher_is_better: bool
    recommendation: str
    winner: str | None
    rows: dict[str, int | None]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    folder: str | None = None
    test_score: float | None = None

    def of(self, name: str) -> MethodScores:
        """The results of a method."""
        return next(method for method in self.methods if method.name == name)

    def table(self) -> list[dict[str, str]]:
        """A row for each method, as text: column -> cell. Cells of what was not measured are empty."""
        return [cells(method, self.settings.get("budget") is not None) for method in self.methods]

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def save(self, folder: Path) -> Path:
        """Write `compare.json` into a folder, and return its path."""
        path = folder / RESULT_FILE
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path
