"""One run of a search: an adapter is put into a base model that stays, trained on one task, scored, and taken out."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, SchedulerType, default_data_collator, get_scheduler
from transformers.trainer_pt_utils import EvalLoopContainer

from ...placement import check, check_count, check_positive, is_number
from .fingerprint import of_config, of_metric, of_weights

Batch = Mapping[str, Tensor]
Metric = Callable[[EvalPrediction], float | Mapping[str, float]]


@dataclass
class RunArguments:
    """How every run trains, in the words of `transformers.TrainingArguments`.

    Args:
        num_train_epochs: passes over the training rows.
        learning_rate: of AdamW, at its highest.
        per_device_train_batch_size: rows of a step.
        per_device_eval_batch_size: rows of a batch in evaluation.
        warmup_ratio: share of the steps over which the rate rises.
        lr_scheduler_type: what it does then, a name that `transformers.get_scheduler` knows.
        weight_decay: of AdamW.
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
        known = [str(name.value) for name in SchedulerType]
        name = self.lr_scheduler_type
        check("lr_scheduler_type", name, name in known, f"must be one of {', '.join(known)}")


class SearchTask:
    """A data set to train on and to be scored on. Its batches are made once, for all runs.

    Batches hold rows of about one length, which saves padding; a run draws their order by its seed, so that runs of
    one seed see the same batches in the same order.

    Args:
        model: the base model with this task's head; it is not changed. Models of several tasks may share their trunk
            (`share_trunk`).
        train: rows to train on: mappings with what the model takes, `labels` among it.
        evaluation: rows to be scored on.
        compute_metrics: as of `transformers.Trainer`: an `EvalPrediction` to a number, or to named numbers, of which
            the first counts. Higher is better. None scores by the loss, with its sign turned.
        data_collator: makes a batch of rows; by default transformers' own, which does not pad.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Mapping[str, Any]],
        evaluation: Sequence[Mapping[str, Any]],
        compute_metrics: Metric | None = None,
        data_collator: Callable[[list[Any]], Any] = default_data_collator,
    ):
        for name, rows in (("train", train), ("evaluation", evaluation)):
            check(name, rows, len(rows) > 0, "must hold rows")
        self.model, self.compute_metrics, self.collate = model, compute_metrics, data_collator
        self.train, self.evaluation = list(train), list(evaluation)
        self._made: dict[tuple[str, int], list[Batch]] = {}

    def digest(self) -> str:
        """The same for the same rows, in another process, too."""
        rows = [{name: np.asarray(x).tolist() for name, x in row.items()} for row in (*self.train, *self.evaluation)]
        return hashlib.sha256(json.dumps([len(self.train), rows]).encode()).hexdigest()[:12]

    def fingerprint(self) -> dict[str, Any]:
        """What tells model and metric from others, in another process, too."""
        metric = of_metric(self.compute_metrics)
        return {"weights": of_weights(self.model), "config": of_config(self.model), "metric": metric}

    def batches(self, part: str, size: int) -> list[Batch]:
        """The batches of "train" or "evaluation", on the model's device."""
        if (part, size) not in self._made:
            rows = sorted(getattr(self, part), key=lambda row: len(row.get("input_ids", ())))
            device = next(self.model.parameters()).device
            made = [self.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
            self._made[part, size] = [{name: x.to(device) for name, x in batch.items()} for batch in made]
        return self._made[part, size]


def share_trunk(models: Mapping[str, Any]) -> dict[str, Any]:
    """Lets models that differ in their heads alone hold their common trunk once, that of the first.

    Args:
        models: task -> a transformers model, such as `AutoModelForSequenceClassification` with the task's labels.

    Raises:
        ValueError: a model has another architecture than the first.
    """
    first, *others = models.values()
    for model in others:
        same = model.base_model_prefix == first.base_model_prefix and type(model.base_model) is type(first.base_model)
        check("models", type(model).__name__, same, f"must have the trunk of the first, {type(first).__name__}")
        setattr(model, model.base_model_prefix, first.base_model)
    return dict(models)


@contextmanager
def adapted(model: nn.Module, config: PeftConfig, seed: int) -> Iterator[PeftModel]:
    """The base model with a fresh adapter; afterwards it is as it was, head included."""
    torch.manual_seed(seed)
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    peft_model: Any = get_peft_model(model, copy.deepcopy(config))  # type: ignore[arg-type]
    try:
        yield peft_model
    finally:
        peft_model.delete_adapter("default")  # or unloading leaves its head in the model
        peft_model.unload()
        model.train(was_training)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    args: RunArguments,
    seed: int,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """AdamW over the batches, in an order drawn by `seed`; `after_epoch` is called with 1, 2, ...

    Raises:
        ValueError: a loss is not finite; seen at the end of its epoch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    steps = args.num_train_epochs * len(batches)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, int(args.warmup_ratio * steps), steps)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, args.num_train_epochs + 1):
        model.train()
        finite = torch.ones((), dtype=torch.bool, device=parameters[0].device)  # asked for once an epoch: it waits
        for i in torch.randperm(len(batches), generator=order).tolist():
            with autocast(parameters[0], args):
                loss = model(**batches[i]).loss
            finite &= loss.detach().isfinite()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not finite:
            raise ValueError(f"A loss of epoch {epoch} is not finite.")
        if after_epoch is not None:
            after_epoch(epoch)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], args: RunArguments, metric: Metric | None) -> float:
    """The score on the batches; without a metric, the mean loss of a row with its sign turned.

    Raises:
        ValueError: an output is not a number, which a metric may well take for an answer.
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
    arrays: list[Any] = [found.get_arrays() for found in (predictions, labels)]
    score = metric(EvalPrediction(predictions=arrays[0], label_ids=arrays[1]))
    return float(next(iter(score.values())) if isinstance(score, Mapping) else score)


def autocast(parameter: Tensor, args: RunArguments) -> torch.autocast:
    return torch.autocast(parameter.device.type, torch.bfloat16, enabled=args.bf16)
