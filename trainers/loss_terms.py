"""The terms that a loss is made of, logged beside it and averaged as it is."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from hf_peft_ext.trainers.checkpoint import SUMS, AdapterCheckpoints
from hf_peft_ext.validation.checks import check


class LossTerms(AdapterCheckpoints):
    """Averages what `add_loss_terms` is given over micro-batches, steps and processes."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._batch_terms: dict[str, Tensor] = {}  # of the batch at hand
        self._train_terms: dict[str, Tensor] = {}  # summed over the steps since the last log
        self._eval_terms: dict[str, Tensor] = {}  # summed over the examples of an evaluation
        self._eval_rows = 0
        self._terms_since = 0
        super().__init__(*args, **kwargs)

    def add_loss_terms(self, **terms: Tensor) -> None:
        """Name parts of the loss, to be called in `compute_loss`. They are logged under these names.

        Args:
            terms: scalars, each with the scale that it has in the loss: what adds up in a batch adds up in the log.

        Raises:
            TypeError: a term is no tensor.
            ValueError: a name is one that Trainer logs, or a term is of several numbers.
        """
        for name, term in terms.items():
            taken = name in ("loss", "grad_norm", "learning_rate", "epoch", "step") or name.startswith("eval_")
            check("terms", name, not taken, "must have names that Trainer does not log itself")
            if not isinstance(term, Tensor):
                raise TypeError(
                    f"`{name}` (={type(term).__name__}) must be a tensor, as the loss that it is a part of."
                )
            check(
                name, tuple(term.shape), term.numel() == 1, "must be of one number, as the loss that it is a part of"
            )
        self._batch_terms |= {name: term.detach().float() for name, term in terms.items()}

    # Training

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._batch_terms = {}
        loss = super().training_step(model, inputs, num_items_in_batch)
        share = 1 if self._is_scaled(num_items_in_batch) else 1 / self.current_gradient_accumulation_steps
        add(self._train_terms, self._batch_terms, share)
        return loss

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss of a micro-batch is its share of the whole batch already, as Trainer decides it."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # older versions of transformers have none
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return scaled if scaled is not None else counted or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            steps = max(self.state.global_step - self._terms_since, 1)
            sums = self._over_processes(self._train_terms)
            logs.update({name: sum(values) / len(values) / steps for name, values in sums.items()})
            self._train_terms, self._terms_since = {}, self.state.global_step
        super().log(logs, start_time)

    def _over_processes(self, terms: dict[str, Tensor]) -> dict[str, list[float]]:
        """Each term of each process; 0 where a process has not met it."""
        values = [{name: value.item() for name, value in terms.items()}]
        every = cast(list[dict[str, float]], gather_object(values))
        names = dict.fromkeys(name for one in every for name in one)
        return {name: [one.get(name, 0.0) for one in every] for name in names}

    # Evaluation

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._batch_terms = {}
        result = super().prediction_step(model, inputs, *args, **kwargs)
        rows = find_batch_size(inputs) or 1
        add(self._eval_terms, self._batch_terms, rows)
        self._eval_rows += rows
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_terms, self._eval_rows = {}, 0
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        rows = sum(gather_object([self._eval_rows]))
        sums = self._over_processes(self._eval_terms)
        cast(dict[str, float], output.metrics).update({f"{prefix}_{n}": sum(v) / rows for n, v in sums.items()})
        return output

    # Checkpoints

    def _running_sums(self) -> dict[str, Any]:
        loss = self._over_processes({"loss": self._tr_loss})["loss"]
        return {"since": self._globalstep_last_logged, "loss": loss, "terms": self._over_processes(self._train_terms)}

    def _begin(self, resumed: Path | None) -> None:
        super()._begin(resumed)
        self._train_terms, self._terms_since = {}, self.state.global_step
        if resumed is not None and (resumed / SUMS).exists():
            self._restore_sums(resumed)

    def _restore_sums(self, folder: Path) -> None:
        sums = json.loads((folder / SUMS).read_text("utf-8"))
        if len(sums["loss"]) != self.accelerator.num_processes:  # then it is another run, and need not be equal
            return
        rank = self.accelerator.process_index
        self._globalstep_last_logged = self._terms_since = sums["since"]
        self._tr_loss = torch.tensor(sums["loss"][rank], device=self.args.device)
        self._total_loss_scalar -= sum(sums["loss"]) / len(sums["loss"])  # the mean loss is of this call's steps
        self._train_terms = {
            name: torch.tensor(values[rank], device=self.args.device) for name, values in sums["terms"].items()
        }


def add(sums: dict[str, Tensor], terms: dict[str, Tensor], weight: float) -> None:
    for name, term in terms.items():
        sums[name] = sums.get(name, 0) + weight * term
