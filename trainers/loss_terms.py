"""The terms of a loss, averaged and logged like the loss itself."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_pt_utils import find_batch_size

from hf_peft_ext.validation.checks import check

SUMS = "running_sums.json"  # sums since the last log, so that a resumed run logs the same averages
RESERVED = ("loss", "grad_norm", "learning_rate", "epoch", "step")


class LossTerms(TrainerCallback):
    """Averages terms of a loss over micro-batches, steps and processes.

    Args:
        trainer: an adapter's trainer, whose `compute_loss` adds the terms.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._batch: dict[str, Tensor] = {}  # of the current batch
        self._training: dict[str, Tensor] = {}  # summed over the steps since the last log
        self._last_logged = 0  # the step of the last log
        self._evaluation: dict[str, Tensor] = {}  # summed over the examples of an evaluation
        self._examples = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of the current batch, see `AdapterTrainerMixin.add_loss_terms`."""
        for name, term in terms.items():
            reserved = name in RESERVED or name.startswith("eval_")
            check("terms", name, not reserved, "must have names that Trainer does not log itself")
            if not isinstance(term, Tensor):
                raise TypeError(f"`{name}` (={type(term).__name__}) must be a tensor, as part of the loss.")
            check(name, tuple(term.shape), term.numel() == 1, "must be a single number, as part of the loss")
        self._batch |= {name: term.detach().float() for name, term in terms.items()}

    # Training

    def on_batch_begin(self) -> None:
        """Forget the terms of the batch before."""
        self._batch = {}

    def on_training_batch_end(self, num_items_in_batch: Any) -> None:
        """Add a micro-batch's terms to the sums, with the weight that its loss has in the step."""
        scaled = self.is_scaled(num_items_in_batch)
        add(self._training, self._batch, 1 if scaled else 1 / self.trainer.current_gradient_accumulation_steps)

    def is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether a micro-batch's loss is its share of the step's, by the conditions of `Trainer.training_step`."""
        trainer = self.trainer
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)  # None in older versions of transformers
        if declared is not None:
            return declared
        counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or trainer.compute_loss_func is not None

    def training_averages(self) -> dict[str, float]:
        """The averages since the last call; every process must call it."""
        step = self.trainer.state.global_step
        sums, steps = over_processes(self._training), max(step - self._last_logged, 1)
        self._training, self._last_logged = {}, step
        return {name: sum(values) / len(values) / steps for name, values in sums.items()}

    # Evaluation

    def on_evaluation_begin(self) -> None:
        """Start the sums of an evaluation."""
        self._evaluation, self._examples = {}, 0

    def on_evaluation_batch_end(self, inputs: dict[str, Any]) -> None:
        """Add a batch's terms to the sums, weighted by its number of examples."""
        examples = find_batch_size(inputs) or 1
        add(self._evaluation, self._batch, examples)
        self._examples += examples

    def evaluation_averages(self, prefix: str) -> dict[str, float]:
        """The averages of an evaluation; every process must call it."""
        examples = sum(gather_object([self._examples]))
        return {f"{prefix}_{name}": sum(v) / examples for name, v in over_processes(self._evaluation).items()}

    # Checkpoints

    def running_sums(self) -> dict[str, Any]:
        """The sums since the last log as JSON-like data; every process must call it."""
        trainer = self.trainer
        loss = over_processes({"loss": trainer._tr_loss})["loss"]
        return {"since": trainer._globalstep_last_logged, "loss": loss, "terms": over_processes(self._training)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the sums, or restore those of the checkpoint that training resumes from."""
        self._training, self._last_logged = {}, state.global_step
        resumed: Path | None = self.trainer.resumed
        if resumed is not None and (resumed / SUMS).exists():
            self._restore(json.loads((resumed / SUMS).read_text("utf-8")))

    def _restore(self, sums: dict[str, Any]) -> None:
        trainer = self.trainer
        if len(sums["loss"]) != trainer.accelerator.num_processes:  # another kind of run, which need not be equal
            return
        rank, device = trainer.accelerator.process_index, trainer.args.device
        trainer._globalstep_last_logged = self._last_logged = sums["since"]
        trainer._tr_loss = torch.tensor(sums["loss"][rank], device=device)
        # Trainer's final mean loss is over the steps of this call
        trainer._total_loss_scalar -= sum(sums["loss"]) / len(sums["loss"])
        self._training = {name: torch.tensor(values[rank], device=device) for name, values in sums["terms"].items()}


def add(sums: dict[str, Tensor], terms: dict[str, Tensor], weight: float) -> None:
    """Add weighted terms to sums, in place."""
    for name, term in terms.items():
        sums[name] = sums.get(name, 0) + weight * term


def over_processes(terms: dict[str, Tensor]) -> dict[str, list[float]]:
    """The value of each term in each process; 0 where a process does not have it."""
    values = [{name: value.item() for name, value in terms.items()}]
    processes = cast(list[dict[str, float]], gather_object(values))
    names = dict.fromkeys(name for one in processes for name in one)
    return {name: [one.get(name, 0.0) for one in processes] for name in names}
