"""Whether a loss is the mean over a batch, or divided by the number of labels that Trainer passes.

Trainer assumes that every model whose forward has `**kwargs` divides the sum of its losses by `num_items_in_batch`,
and leaves the average over accumulated batches and processes to it. BERT, T5 and many others ignore that number and
return the mean over the current batch, and so do many trainers with a `compute_loss` of their own. Their loss and
gradients would be too large by the number of batches and processes.
"""

from copy import deepcopy
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor


class LossScaling:
    """Calls `compute_loss` with two numbers of labels, once, and has Trainer average where the loss is the same.

    Args:
        trainer: an adapter's trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._measured = False

    def measure(self, batches: list[dict[str, Any]], count: Any) -> None:
        """Set the trainer's `model_accepts_loss_kwargs`; every process must call it.

        Args:
            batches: the batches of a step.
            count: the number of labels in them, or None if Trainer does not count.
        """
        trainer, args = self.trainer, self.trainer.args
        several = args.gradient_accumulation_steps > 1 or args.world_size > 1
        # a `compute_loss_func` gets the number, and a class can declare its scale
        declared = trainer.compute_loss_func is not None or getattr(trainer, "loss_is_scaled_for_ga", None) is not None
        if several and count is not None and not self._measured and not declared:
            answers = gather_object([self._depends_on_count(batches[0])])
            self._measured = any(answer is not None for answer in answers)
            trainer.model_accepts_loss_kwargs = False not in answers

    @torch.no_grad()
    def _depends_on_count(self, batch: dict[str, Any]) -> bool | None:
        """Whether the loss changes with the number of labels; None if it is 0 or not finite, so that none can tell."""
        trainer, model = self.trainer, self.trainer.peft_model
        training, inputs = model.training, trainer._prepare_inputs(batch)
        metrics: Any = deepcopy(getattr(trainer, "_metrics", None))  # `compute_loss` of TRL's trainers adds to them
        model.eval()  # dropout would change the loss
        try:
            first, second = (self._loss(model, dict(inputs), count) for count in (1, 2))
        finally:
            model.train(training)
            if metrics is not None:
                trainer._metrics = metrics
        return bool(first != second) if first != 0 and first.isfinite() else None

    def _loss(self, model: Any, inputs: dict[str, Any], count: int) -> Tensor:
        trainer, device = self.trainer, self.trainer.args.device
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(forked), trainer.compute_loss_context_manager():
            number = torch.tensor(count, device=device)
            return cast(Tensor, trainer.compute_loss(model, inputs, num_items_in_batch=number))
