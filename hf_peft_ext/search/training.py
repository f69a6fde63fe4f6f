"""One run of a search: add an adapter to a base model that stays loaded, train and score it, remove it."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, SchedulerType, default_data_collator
from transformers.trainer_pt_utils import EvalLoopContainer

from hf_peft_ext.model.modes import evaluating, preserve_requires_grad
from hf_peft_ext.search.fingerprint import config_settings, metric_fingerprint, weights_fingerprint
from hf_peft_ext.training_loop import train_steps
from hf_peft_ext.validation.checks import check, check_count, check_positive, is_number

ModelInputs = Mapping[str, Tensor]
ComputeMetrics = Callable[[EvalPrediction], float | Mapping[str, float]]


@dataclass
class RunArguments:
    """How every run trains, with the names of `transformers.TrainingArguments`.

    Args:
        num_train_epochs: passes over the training rows.
        learning_rate: highest learning rate of AdamW.
        per_device_train_batch_size: rows in a training step.
        per_device_eval_batch_size: rows in an evaluation batch.
        warmup_ratio: share of the steps over which the learning rate rises.
        lr_scheduler_type: its schedule after that, a name for `transformers.get_scheduler`.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        bf16: autocast to bfloat16.

    Raises:
        ValueError: a value breaks a rule.
    """

    num_train_epochs: int = 3
    learning_rate: float = 1e-3
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    warmup_ratio: float = 0.1
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "max_grad_norm"):
            check_positive(name, getattr(self, name))
        for name in ("warmup_ratio", "weight_decay"):
            value = getattr(self, name)
            check(name, value, is_number(value) and 0 <= value < 1, "must lie in [0, 1)")
        schedules = [str(schedule.value) for schedule in SchedulerType]
        name = self.lr_scheduler_type
        check("lr_scheduler_type", name, name in schedules, f"must be one of {', '.join(schedules)}")


class SearchTask:
    """A dataset to train and score models on. Its batches are made once, for all runs.

    Batches hold rows of similar length, which saves padding. A run draws the order of the batches by its seed, so that
    runs with equal seeds see the same batches in the same order.

    Args:
        model: the base model with this task's head; it is not changed. Models of several tasks may share their trunk
            (`share_trunk`).
        train: rows to train on: mappings with the model's inputs, `labels` included.
        evaluation: rows to score models on.
        compute_metrics: as in `transformers.Trainer`: maps an `EvalPrediction` to a number, or to named numbers, of
            which the first is the score. Higher is better. None scores by the negative loss.
        data_collator: makes a batch of rows; by default transformers' own, which does not pad.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Mapping[str, Any]],
        evaluation: Sequence[Mapping[str, Any]],
        compute_metrics: ComputeMetrics | None = None,
        data_collator: Callable[[list[Any]], Any] = default_data_collator,
    ):
        for name, rows in (("train", train), ("evaluation", evaluation)):
            check(name, rows, len(rows) > 0, "must hold rows")
        self.model, self.compute_metrics, self.collate = model, compute_metrics, data_collator
        self.train, self.evaluation = list(train), list(evaluation)
        self._batches: dict[tuple[str, int], list[ModelInputs]] = {}

    def digest(self) -> str:
        """A hash of the rows, equal in every process."""
        rows = [{name: np.asarray(x).tolist() for name, x in row.items()} for row in (*self.train, *self.evaluation)]
        return hashlib.sha256(json.dumps([len(self.train), rows]).encode()).hexdigest()[:12]

    def fingerprint(self) -> dict[str, Any]:
        """What identifies model and metric, equal in every process."""
        metric = metric_fingerprint(self.compute_metrics)
        return {"weights": weights_fingerprint(self.model), "config": config_settings(self.model), "metric": metric}

    def batches(self, part: str, size: int) -> list[ModelInputs]:
        """The batches of "train" or "evaluation", with `size` rows each, on the model's device."""
        if (part, size) not in self._batches:
            rows = sorted(getattr(self, part), key=lambda row: len(row.get("input_ids", ())))
            device = next(self.model.parameters()).device
            batches = [self.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
            self._batches[part, size] = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
        return self._batches[part, size]


def share_trunk(models: Mapping[str, Any]) -> dict[str, Any]:
    """Let models that differ only in their heads share the trunk of the first.

    Args:
        models: task -> a transformers model, such as `AutoModelForSequenceClassification` with the task's labels.

    Returns:
        The models, changed in place.

    Raises:
        ValueError: a model has another architecture than the first.
    """
    first, *others = models.values()
    for model in others:
        trunks = [(one.base_model_prefix, type(one.base_model)) for one in (first, model)]
        is_same = trunks[0] == trunks[1]
        check("models", type(model).__name__, is_same, f"must have the trunk of the first, {type(first).__name__}")
        setattr(model, model.base_model_prefix, first.base_model)
    return dict(models)


@contextmanager
def adapted(model: nn.Module, config: PeftConfig, seed: int) -> Iterator[PeftModel]:
    """The base model with a new adapter, drawn by `seed`. On exit, the model and its head are restored."""
    torch.manual_seed(seed)
    with evaluating(model), preserve_requires_grad(model):
        peft_model: Any = get_peft_model(model, copy.deepcopy(config))  # type: ignore[arg-type]
        try:
            yield peft_model
        finally:
            peft_model.delete_adapter("default")  # otherwise unloading leaves the trained head in the model
            peft_model.unload()


def train_adapter(
    model: nn.Module,
    batches: Sequence[ModelInputs],
    args: RunArguments,
    seed: int,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train the trainable parameters with AdamW.

    Args:
        model: the model; its outputs have a `loss`.
        batches: the batches of an epoch.
        args: how to train.
        seed: draws the order of the batches.
        after_epoch: called with the number of the finished epoch, from 1 on.

    Raises:
        ValueError: a loss is not finite; checked at the end of each epoch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    order = torch.Generator().manual_seed(seed)
    epochs, steps = range(1, args.num_train_epochs + 1), args.num_train_epochs * len(batches)
    shuffled = (batches[i] for _ in epochs for i in torch.randperm(len(batches), generator=order).tolist())

    def loss(batch: ModelInputs) -> Tensor:
        with autocast(parameters[0], args):
            return model(**batch).loss

    losses = train_steps(
        parameters, loss, shuffled, steps, args.learning_rate, int(args.warmup_ratio * steps), args.lr_scheduler_type,
        args.weight_decay, args.max_grad_norm, fused=True,
    )  # fmt: skip
    for epoch in epochs:
        model.train()
        if not torch.stack([*islice(losses, len(batches))]).isfinite().all():  # read once an epoch: it syncs
            raise ValueError(f"A loss of epoch {epoch} is not finite.")
        if after_epoch is not None:
            after_epoch(epoch)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Sequence[ModelInputs], args: RunArguments, metric: ComputeMetrics | None
) -> float:
    """The score on the batches; without a metric, the negative mean loss of a row.

    Raises:
        ValueError: an output is NaN, which many metrics would count as an answer.
    """
    model.eval()
    predictions, labels, losses = EvalLoopContainer(), EvalLoopContainer(), 0.0
    for batch in batches:
        with autocast(next(model.parameters()), args):
            outputs = model(**batch)
        if metric is None:
            losses += outputs.loss.item() * len(batch["labels"])
        else:
            if outputs.logits.isnan().any():
                raise ValueError("The model's outputs are not numbers.")
            predictions.add(outputs.logits.float())
            labels.add(batch["labels"])
    if metric is None:
        return -losses / sum(len(batch["labels"]) for batch in batches)
    arrays: list[Any] = [container.get_arrays() for container in (predictions, labels)]
    score = metric(EvalPrediction(predictions=arrays[0], label_ids=arrays[1]))
    return float(next(iter(score.values())) if isinstance(score, Mapping) else score)


def autocast(parameter: Tensor, args: RunArguments) -> torch.autocast:
    """The autocast context of `args.bf16` on a parameter's device."""
    return torch.autocast(parameter.device.type, torch.bfloat16, enabled=args.bf16)
