"""Trainers that distil a teacher's soft labels into a classifier or a sequence-to-sequence model.

TRL's `DistillationTrainer` does this for causal models, and takes the adapters of this package.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_peft_ext.trainers.mixin import AdapterTrainerMixin
from hf_peft_ext.trainers.soft_labels import CLASSES, LOGITS, SoftLabels, num_classes, predictions
from hf_peft_ext.validation.checks import check, check_positive, is_number

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


def soft_label_loss(
    student: Tensor,  # shape: (predictions, classes)
    teacher: Tensor,  # shape: (predictions, k)
    classes: Tensor,  # shape: (predictions, k)
    temperature: float,
) -> Tensor:  # shape: ()
    """T^2 KL(p || q), the mean over predictions; p = softmax(teacher / T) over k classes, q = softmax(student / T).

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), section 2. With k below the number of classes p is the
    teacher's distribution over its k most probable ones.
    """
    log_p = (teacher.float() / temperature).log_softmax(-1)
    log_q = (student.float() / temperature).log_softmax(-1).gather(-1, classes)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@dataclass
class DataCollatorForSoftLabels:
    """Batches of rows with soft labels: those of all rows one after the other, without padding.

    Args:
        collate: makes a batch of the rows' other fields.
    """

    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        taught = {name: torch.cat([row[name] for row in rows]) for name in (LOGITS, CLASSES) if name in rows[0]}
        plain = [{name: value for name, value in row.items() if name not in taught} for row in rows]
        return {**self.collate(plain), **taught}


class SoftLabelMixin(Base):
    """Turns a Trainer into one that distils: `class MyTrainer(SoftLabelMixin, TheirTrainer)`.

    loss = (1 - gold_weight) T^2 KL(teacher || student) + gold_weight (the model's own loss on the labels).
    Rows without soft labels, such as those of an evaluation, have the model's own loss.

    Args:
        args, kwargs: of the other class; `train_dataset` is the result of `soft_labels`.
        temperature: T.
        gold_weight: weight of the labels' loss, between 0 and 1.

    Raises:
        TypeError: the training data have no soft labels.
        ValueError: the teacher has another number of classes or tokens, or an argument breaks its rule.
    """

    def __init__(self, *args: Any, temperature: float = 2.0, gold_weight: float = 0.0, **kwargs: Any):
        check_positive("temperature", temperature)
        weight = is_number(gold_weight) and 0 <= gold_weight <= 1
        check("gold_weight", gold_weight, weight, "must lie in [0, 1]")
        self.temperature, self.gold_weight = temperature, gold_weight
        super().__init__(*args, **kwargs)
        self.data_collator = DataCollatorForSoftLabels(self.data_collator)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a micro-batch
        data = self.train_dataset
        if not isinstance(data, SoftLabels | None):
            raise TypeError(f"`train_dataset` (={type(data).__name__}) must be the result of `soft_labels`.")
        if data is not None:
            classes = int(num_classes(self.accelerator.unwrap_model(self.model)))
            rule = f"must be the student's, {classes}: a teacher with the same classes, or the same vocabulary"
            check("num_classes", data.num_classes, data.num_classes == classes, rule)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, see the class."""
        if LOGITS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**self.gate_inputs(inputs))
        student = predictions(outputs.logits, inputs.get("labels"))
        loss = soft_label_loss(student, inputs[LOGITS], inputs[CLASSES], self.temperature)
        if self.gold_weight:
            check("train_dataset", sorted(inputs), outputs.loss is not None, "must have labels for `gold_weight`")
            loss = (1 - self.gold_weight) * loss + self.gold_weight * outputs.loss
        return (loss, outputs) if return_outputs else loss

    def gate_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward for a batch."""
        return {name: value for name, value in inputs.items() if name not in (LOGITS, CLASSES)}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            self._signature_columns = [*columns, LOGITS, CLASSES]


class SoftLabelTrainer(SoftLabelMixin, Trainer):
    """transformers' `Trainer` for a student of which all weights are trained; see `SoftLabelMixin`."""


class AdapterSoftLabelTrainer(SoftLabelMixin, AdapterTrainerMixin, Trainer):
    """The same for a student with an adapter, with all that `AdapterTrainerMixin` adds."""
