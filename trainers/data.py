"""Which data a run trains and evaluates on, as its user has given them and calls them."""

from dataclasses import replace
from typing import Any

from hf_peft_ext.hub_cards import DatasetRecord, TrainingRecord
from hf_peft_ext.trainers.gates import GateLog
from hf_peft_ext.trainers.run_info import dataset_record


class DataLog(GateLog):
    """Notes in `record.datasets` what is trained and evaluated on.

    TRL's trainers prepare the data and keep what comes out; noted is what went in.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.record = TrainingRecord()
        self._given: list[tuple[Any, Any]] = []  # data as they were prepared, and as they were given
        self._prepared: list[tuple[Any, Any]] = []  # the same of data given to `evaluate`
        self._evaluated: tuple[Any, str | None] = (None, None)  # of the evaluation at hand, and what they are called
        super().__init__(*args, **kwargs)
        given = kwargs.get("eval_dataset")
        self._given.append((self.train_dataset, kwargs.get("train_dataset")))
        if isinstance(given, dict) and isinstance(self.eval_dataset, dict):
            self._given += [(prepared, given[name]) for name, prepared in self.eval_dataset.items()]
        else:
            self._given.append((self.eval_dataset, given))

    def get_train_dataloader(self) -> Any:
        self._note_data(self.train_dataset, "train", "train")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        sets: dict[str, Any] = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(data, str):
            self._evaluated = sets[data], data
        else:
            same = (name for name, one in sets.items() if data is one or data is self._as_given(one))
            self._evaluated = data, next(same, None)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self._evaluated = test_dataset, None
        return super().get_test_dataloader(test_dataset)

    def _as_given(self, data: Any) -> Any:
        known = [*self._given, *self._prepared]
        return next((given for prepared, given in known if prepared is data and given is not None), data)

    def _note_data(self, data: Any, name: str, used_for: str) -> DatasetRecord | None:
        """The record of a set of data, numbered where others that are called the same were used for the same."""
        found = dataset_record(self._as_given(data), name)
        if found is None:
            return None
        found, own, number = replace(found, used_for=used_for), found.name, 1
        while any(clash(found, other) for other in self.record.datasets):
            number += 1
            found.name = f"{own} {number}"
        if found not in self.record.datasets:
            self.record.datasets.append(found)
        return found


def clash(one: DatasetRecord, other: DatasetRecord) -> bool:
    """Whether two records are of different data that could not be told apart by name; an id on the Hub is exact."""
    alike = (one.name, one.split, one.used_for) == (other.name, other.split, other.used_for)
    return alike and not one.on_hub and one != other
