"""The arguments of a measurement, checked before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_peft_ext.compare.settings import check_rate_factors
from hf_peft_ext.tuners.intrinsic.config import MAX_D
from hf_peft_ext.validation.checks import check, check_count, check_writable, is_number


@dataclass
class MeasureArguments:
    """What is searched, on which rows, and where the results are kept.

    Args:
        seeds: number of searches. Each has its own projection, initialisation and order of rows.
        share: the share of the mean score of full fine-tuning to reach.
        smallest, largest: the dimensions between which to search.
        precision: the factor between the last dimension that missed and the one that reached, at which a search ends.
        rates: factors on the usual learning rate; the best one of each dimension and seed counts, and likewise of full
            fine-tuning.
        dev_split: the split to score on; None to hold out training rows, other ones for each seed.
        dev_share: the share of the training rows to hold out.
        output_dir: folder of the results and the database.
        storage: URL of the database; None for a SQLite file in `output_dir`.
        study_name: the measurement's name in the database.
        heartbeat: seconds between two heartbeats of a run; another worker repeats a run that misses three.
        progress: whether to show the progress.

    Raises:
        ValueError: a value breaks a rule.
    """

    seeds: int = 3
    share: float = 0.9
    smallest: int = 10
    largest: int = 10_000
    precision: float = 1.5
    rates: Sequence[float] = (1.0,)
    dev_split: str | None = None
    dev_share: float = 0.2
    output_dir: str | Path = "intrinsic_dimension"
    storage: str | None = None
    study_name: str = "intrinsic_dimension"
    heartbeat: int = 20
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("seeds", "smallest", "largest", "heartbeat"):
            check_count(name, getattr(self, name))
        for name in ("share", "dev_share"):
            value = getattr(self, name)
            check(name, value, is_number(value) and 0 < value < 1, "must lie between 0 and 1")
        check("largest", self.largest, self.largest > self.smallest, f"must be above `smallest` (={self.smallest})")
        check("largest", self.largest, self.largest <= MAX_D, f"must be at most {MAX_D}")
        check("precision", self.precision, is_number(self.precision) and self.precision > 1, "must be above 1")
        check_rate_factors(self.rates)
        check_writable("output_dir", self.output_dir)

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output_dir)

    @property
    def database(self) -> str:
        """The URL of the database."""
        return self.storage or f"sqlite:///{self.folder / 'intrinsic_dimension.db'}"
