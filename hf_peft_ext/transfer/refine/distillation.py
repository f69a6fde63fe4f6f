"""Soft labels of a teacher for unlabelled rows (knowledge distillation)."""

from collections.abc import Sequence

from torch import nn

from hf_peft_ext.transfer.run.task import Row, Task
from hf_peft_ext.validation.checks import check_positive


def decide(task: Task, teacher: nn.Module, rows: Sequence[Row], temperature: float = 1.0) -> list[Row]:
    """Set the `target` of each row to q_k = p_k^(1/T) / sum_j p_j^(1/T), p_k the teacher's probability of answer k.

    Distillation, Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), Eq. 1. There the student has the temperature
    too; here it keeps 1, so that it also learns the teacher's confidence.

    Args:
        task: the rows'.
        teacher: a model for this task. It runs in evaluation mode, without gradients.
        rows: with or without answers, which are not read.
        temperature: T; targets are sharper than the teacher's probabilities below 1, and flatter above.

    Returns:
        The rows, in their order, with these targets in place of their own.

    Raises:
        ValueError: the temperature is not positive.
    """
    check_positive("temperature", temperature)
    scores = task.scores(teacher, rows)
    targets = [(score / temperature).softmax(0).tolist() for score in scores]
    return [{**row, "target": target} for row, target in zip(rows, targets, strict=True)]
