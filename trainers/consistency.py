"""Trainers that add a consistency loss between two forward passes: AdaMix's, and R-Drop's with other adapters."""

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from hf_peft_ext.papers import ADAMIX
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.trainers.mixin import AdapterTrainerMixin
from hf_peft_ext.trainers.soft_labels import predictions
from hf_peft_ext.validation.checks import check, check_positive

if TYPE_CHECKING:
    Base = AdapterTrainerMixin
else:
    Base = object


def consistency_loss(
    first: Tensor,  # shape: (predictions, classes)
    second: Tensor,  # shape: (predictions, classes)
) -> Tensor:  # shape: ()
    """(KL(p || q) + KL(q || p)) / 2, the mean over predictions; p and q are the softmax of both.

    AdaMix, Wang et al. 2022 (https://arxiv.org/abs/2205.12410), the term that it adds to the cross-entropy.
    """
    log_p, log_q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2


def labels_at_predictions(model: Any, labels: Tensor | None) -> Tensor | None:
    """The labels where their logits are: decoders predict a token at the one before it."""
    if labels is None or labels.ndim == 1 or not model.can_generate() or model.config.is_encoder_decoder:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class ConsistencyMixin(Base):
    """Adds a consistency loss to an adapter's trainer: `class MyTrainer(ConsistencyMixin, AdapterSeq2SeqTrainer)`.

    loss = task + consistency_weight * consistency. The task's loss is that of a first forward pass. A second pass over
    the same batch draws other experts and other dropout, and the consistency is the symmetric KL divergence between
    both predictions. The log has both terms. Evaluation has one pass, and the task's loss alone.

    Args:
        args, kwargs: of the other class.
        consistency_weight: weight of the consistency; the paper's is 1.

    Raises:
        ValueError: `consistency_weight` is not positive.
    """

    def __init__(self, *args: Any, consistency_weight: float = 1.0, **kwargs: Any):
        check_positive("consistency_weight", consistency_weight)
        self.consistency_weight = consistency_weight
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a micro-batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, see the class."""
        # Trainer's loss pops `labels` from its inputs
        result: Any = super().compute_loss(model, dict(inputs), return_outputs=True)
        loss, outputs = result
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        again = model(**self.gate_inputs(inputs))
        labels = labels_at_predictions(self.peft_model.get_base_model(), inputs.get("labels"))
        first, second = (predictions(logits, labels) for logits in (outputs["logits"], again["logits"]))
        rule = "must have several classes or tokens: numbers have no distribution to compare"
        check("num_labels", first.shape[-1], first.shape[-1] > 1, rule)
        consistency = self.consistency_weight * consistency_loss(first, second)
        self.add_loss_terms(task_loss=loss, consistency_loss=consistency)
        total = loss + consistency
        return (total, outputs) if return_outputs else total


class AdaMixTrainer(ConsistencyMixin, AdapterTrainerMixin, Trainer):
    """transformers' `Trainer` with AdaMix's loss, for adapters of `AdaMixConfig`; see `ConsistencyMixin`."""

    _name = "AdaMix"
    _paper = ADAMIX
