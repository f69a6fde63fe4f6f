"""What one model makes of rows that nobody has answered, for another to be trained towards."""

from collections.abc import Sequence

from torch import nn

from hf_peft_ext.transfer.run.task import Row, Task
from hf_peft_ext.validation.checks import check_positive


def decide(task: Task, teacher: nn.Module, rows: Sequence[Row], temperature: float = 1.0) -> list[Row]:
    """q_k = p_k^(1/T) / sum_j p_j^(1/T) as the `target` of each row, p_k the teacher's probability of answer k.

    Distillation as in Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), but that the model which is trained
    towards q keeps a temperature of 1, so that it also learns how sure to be.

    Args:
        task: the rows'.
        teacher: any model that answers them. It is run in evaluation mode, without gradients.
        rows: with or without answers, which are not looked at.
        temperature: T; below 1 the targets are surer than the teacher, above 1 less sure.

    Returns:
        The rows, in their order, with targets in place of what targets they had.

    Raises:
        ValueError: the temperature is not positive.
    """
    check_positive("temperature", temperature)
    scores = task.scores(teacher, rows)
    targets = [(score / temperature).softmax(0).tolist() for score in scores]
    return [{**row, "target": target} for row, target in zip(rows, targets, strict=True)]
