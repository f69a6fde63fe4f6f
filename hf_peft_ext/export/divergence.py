"""How far apart two models' predictions are, by the kind of the task."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

PredictionKind = Literal["classes", "labels", "numbers"]


def kind_of(config: Any) -> PredictionKind:
    """What the logits of a model are: of one class among several, of labels each for itself, or numbers."""
    if config.problem_type == "multi_label_classification":
        return "labels"
    is_number = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    return "numbers" if is_number and not config.is_encoder_decoder else "classes"


def divergence(
    teacher: Tensor,  # shape: (predictions, classes)
    student: Tensor,  # shape: (predictions, classes)
    kind: PredictionKind,
) -> Tensor:  # shape: (predictions,)
    """KL(p || q) of each prediction, p the teacher's; summed over labels; of numbers half the squared difference.

    The last is KL between normal distributions of variance 1.
    """
    if kind == "numbers":
        return 0.5 * (teacher - student).square().sum(-1)
    if kind == "labels":
        p = teacher.sigmoid()
        gain = F.logsigmoid(teacher) - F.logsigmoid(student)
        loss = F.logsigmoid(-teacher) - F.logsigmoid(-student)
        return (p * gain + (1 - p) * loss).sum(-1)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def agreement(teacher: Tensor, student: Tensor, kind: PredictionKind) -> Tensor | None:  # shape: (predictions,)
    """Whether both predict the same; None for numbers."""
    if kind == "numbers":
        return None
    if kind == "labels":
        return ((teacher > 0) == (student > 0)).all(-1)
    return teacher.argmax(-1) == student.argmax(-1)
