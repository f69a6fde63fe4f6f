"""The arguments of a comparison, checked before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_peft_ext.compare.methods import check_methods
from hf_peft_ext.compare.sizes import Budget, check_budget
from hf_peft_ext.validation.checks import check, check_count, check_positive, check_writable, is_number

USUAL_METHODS = ("lora", "unipelt", "mam", "s4", "ia3", "bitfit", "full")
USUAL_RATES = (1 / 3, 1.0, 3.0)


@dataclass
class CompareArguments:
    """What is compared, on which rows, and where the results are kept.

    Args:
        methods: names of `COMPARED_METHODS`. LoRA, if it is among them, is the reference of all tests; else the first.
        budget: trained parameters of each method, without the head: a share of the base model ("0.5%") or a number.
            Methods of fixed size keep theirs. None for the methods' own sizes.
        seeds: number of runs of each method at its chosen learning rate, at least 2.
        rates: factors on each method's usual learning rate, to choose from.
        dev_split: the split of dev rows, by which rates and methods are chosen. None to hold out training rows, other
            ones for each seed.
        dev_share: the share of the training rows to hold out.
        general_text: text for measuring retention: a file with a text on each line, or the texts; None for the
            sentences of this package.
        output_dir: folder of the report, the database and the trained winner.
        storage: URL of the database; None for a SQLite file in `output_dir`.
        study_name: the comparison's name in the database.
        heartbeat: seconds between two heartbeats of a run; another worker repeats a run that misses three.
        train_winner: whether to train the recommended method on all training rows and save it.
        progress: whether to show the progress.

    Raises:
        ValueError: a value breaks a rule.
    """

    methods: Sequence[str] = USUAL_METHODS
    budget: Budget = None
    seeds: int = 3
    rates: Sequence[float] = USUAL_RATES
    dev_split: str | None = None
    dev_share: float = 0.2
    general_text: str | Path | Sequence[str] | None = None
    output_dir: str | Path = "compare"
    storage: str | None = None
    study_name: str = "compare"
    heartbeat: int = 20
    train_winner: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        self.methods = check_methods(self.methods)
        check_budget(self.budget)
        check_count("seeds", self.seeds)
        check("seeds", self.seeds, self.seeds > 1, "must be at least 2: one run has no interval and no test")
        check_rate_factors(self.rates)
        share = is_number(self.dev_share) and 0 < self.dev_share < 1
        check("dev_share", self.dev_share, share, "must lie between 0 and 1")
        check_count("heartbeat", self.heartbeat)
        check_writable("output_dir", self.output_dir)

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output_dir)

    @property
    def database(self) -> str:
        """The URL of the database."""
        return self.storage or f"sqlite:///{self.folder / 'compare.db'}"


def check_rate_factors(rates: Sequence[float]) -> None:
    """Refuse factors on learning rates that are not positive, or not each once.

    Raises:
        ValueError: there is no factor, or one breaks a rule.
    """
    check("rates", rates, len(rates) > 0, "must hold at least one factor")
    for rate in rates:
        check_positive("rates", rate)
    check("rates", list(rates), len(set(rates)) == len(rates), "must hold a factor once")
