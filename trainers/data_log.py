"""Which data a run trains and evaluates on."""

from dataclasses import replace
from typing import Any

from hf_peft_ext.hub_cards import DatasetRecord
from hf_peft_ext.trainers.run_info import dataset_record


class DataLog:
    """Maps the data that a trainer uses to the data that its user passed, and to their names.

    TRL's trainers keep prepared copies of the data; the record describes the originals.
    """

    def __init__(self) -> None:
        self.evaluated: Any = None  # the data of the current evaluation
        self.evaluated_name: str | None = None  # their key in a dictionary of evaluation data
        self._originals: list[tuple[Any, Any]] = []  # (prepared, original), passed to the trainer
        self._prepared: list[tuple[Any, Any]] = []  # the same, passed to `evaluate`

    def set_originals(self, trainer: Any, train: Any, evaluation: Any) -> None:
        """Note the arguments `train_dataset` and `eval_dataset` of a trainer that has prepared them."""
        self._originals.append((trainer.train_dataset, train))
        if isinstance(evaluation, dict) and isinstance(trainer.eval_dataset, dict):
            self._originals += [(data, evaluation[name]) for name, data in trainer.eval_dataset.items()]
        else:
            self._originals.append((trainer.eval_dataset, evaluation))

    def add_prepared(self, prepared: Any, data: Any) -> None:
        """Note a prepared copy of data, in place of an earlier copy of the same."""
        original = self.original(data)
        self._prepared = [pair for pair in self._prepared if pair[1] is not original] + [(prepared, original)]

    def original(self, data: Any) -> Any:
        """The data that a prepared copy was made from; other data unchanged."""
        pairs = [*self._originals, *self._prepared]
        return next((original for prepared, original in pairs if prepared is data and original is not None), data)

    def set_evaluated(self, data: Any, eval_dataset: Any) -> None:
        """Note the data of an evaluation.

        Args:
            data: the argument of `get_eval_dataloader`: data, the key of some, or None for the trainer's own.
            eval_dataset: the trainer's own.
        """
        data = eval_dataset if data is None else data
        named: dict[str, Any] = eval_dataset if isinstance(eval_dataset, dict) else {}
        if isinstance(data, str):
            self.evaluated, self.evaluated_name = named[data], data
        else:
            same = (name for name, one in named.items() if data is one or data is self.original(one))
            self.evaluated, self.evaluated_name = data, next(same, None)

    def add_to(self, datasets: list[DatasetRecord], data: Any, name: str, used_for: str) -> DatasetRecord | None:
        """Describe data in a record's `datasets`; a name that other data have for the same use gets a number.

        Args:
            datasets: changed in place.
            data: as the trainer holds them.
            name: for data without a name of their own.
            used_for: "train" or "eval".

        Returns:
            The entry, new or not; None for data that nothing is known of.
        """
        entry = dataset_record(self.original(data), name)
        if entry is None:
            return None
        entry, own_name, number = replace(entry, used_for=used_for), entry.name, 1
        while any(ambiguous(entry, other) for other in datasets):
            number += 1
            entry.name = f"{own_name} {number}"
        if entry not in datasets:
            datasets.append(entry)
        return entry


def ambiguous(one: DatasetRecord, other: DatasetRecord) -> bool:
    """Whether two entries describe different data under one name; an id on the Hub is exact."""
    alike = (one.name, one.split, one.used_for) == (other.name, other.split, other.used_for)
    return alike and not one.on_hub and one != other
