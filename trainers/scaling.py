"""Whether a model's loss is a mean over a batch, or divided by the count of labels that Trainer gives it.

Trainer takes every model whose forward has `**kwargs` to divide the sum of its losses by `num_items_in_batch`, and so
leaves it to the model to average over accumulated batches and processes. BERT, T5 and many others ignore that count
and return the mean over the batch at hand; their loss and gradients come out too large by the number of both.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from .checkpoint import AdapterCheckpoints


class LossScale(AdapterCheckpoints):
    """Asks the model, once, and has Trainer average where the model does not."""

    _asked = False

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        several = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1
        if several and count is not None and not self._asked and self._trainers_own_loss:
            takes = self._takes_count(batches[0])
            self._asked = takes is not None
            self.model_accepts_loss_kwargs = takes is not False
        return batches, count if self.model_accepts_loss_kwargs or self.compute_loss_func is not None else None

    @property
    def _trainers_own_loss(self) -> bool:
        """Whether the loss is the model's; a `compute_loss` of somebody else knows its own scale."""
        others = self.compute_loss_func is not None or self.label_smoother is not None
        return type(self).compute_loss is Trainer.compute_loss and not others

    @torch.no_grad()
    def _takes_count(self, batch: dict[str, Any]) -> bool | None:
        """Whether the loss is smaller where more labels are counted; None if that cannot be seen, as it is 0."""
        model, training = self.peft_model, self.peft_model.training
        inputs = self._prepare_inputs(batch)
        model.eval()  # dropout would make them differ, and draw random numbers
        try:
            with self.compute_loss_context_manager():
                one, two = (
                    model(**inputs, num_items_in_batch=torch.tensor(n, device=self.args.device)) for n in (1, 2)
                )
        finally:
            model.train(training)
        first, second = (output["loss"] if isinstance(output, dict) else output[0] for output in (one, two))
        return None if first == 0 else bool(first != second)
