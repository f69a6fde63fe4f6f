"""Whether a model's loss is a mean over a batch, or divided by the count of labels that Trainer gives it.

Trainer takes every model whose forward has `**kwargs` to divide the sum of its losses by `num_items_in_batch`, and so
leaves it to the model to average over accumulated batches and processes. BERT, T5 and many others ignore that count
and return the mean over the batch at hand, as does many a `compute_loss` of a trainer's own; their loss and gradients
come out too large by the number of both.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from hf_peft_ext.trainers.checkpoint import AdapterCheckpoints


class LossScale(AdapterCheckpoints):
    """Asks `compute_loss`, once, and has Trainer average where that does not."""

    _asked = False

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        several = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1
        if several and count is not None and not self._asked and self._scale_is_unknown:
            every = gather_object([self._takes_count(batches[0])])  # a process may have seen nothing
            self._asked = any(takes is not None for takes in every)
            self.model_accepts_loss_kwargs = False not in every
        return batches, count if self.model_accepts_loss_kwargs or self.compute_loss_func is not None else None

    @property
    def _scale_is_unknown(self) -> bool:
        """Whether nobody says if the loss is averaged: a `compute_loss_func` is told to, a class can declare it."""
        return self.compute_loss_func is None and getattr(self, "loss_is_scaled_for_ga", None) is None

    @torch.no_grad()
    def _takes_count(self, batch: dict[str, Any]) -> bool | None:
        """Whether the loss is smaller where more labels are counted; None if that cannot be seen: it is 0 or NaN."""
        model, training = self.peft_model, self.peft_model.training
        inputs = self._prepare_inputs(batch)
        noted: Any = deepcopy(getattr(self, "_metrics", None))  # TRL's trainers log what they note there
        model.eval()  # dropout would make them differ
        try:
            first, second = (self._loss_for_count(model, dict(inputs), count) for count in (1, 2))
        finally:
            model.train(training)
            if noted is not None:
                self._metrics = noted
        return bool(first != second) if first != 0 and first.isfinite() else None

    def _loss_for_count(self, model: Any, inputs: dict[str, Any], count: int) -> Tensor:
        device = self.args.device
        drawn = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(drawn), self.compute_loss_context_manager():
            return cast(
                Tensor, self.compute_loss(model, inputs, num_items_in_batch=torch.tensor(count, device=device))
            )
