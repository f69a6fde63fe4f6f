"""Soft labels of a teacher for the rows of a data set: computed once, and kept on disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_peft_ext.model.modes import evaluating
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.transfer.bridges.activations import bytes_of
from hf_peft_ext.transfer.run.fingerprint import digest_of, record_inputs, rows_fingerprint
from hf_peft_ext.transfer.run.task import Row
from hf_peft_ext.validation.checks import check, check_count

LOGITS, CLASSES = "teacher_logits", "teacher_classes"
FILE = "soft_labels.safetensors"
SAMPLES = 64  # numbers of each weight in the fingerprint of a teacher


class SoftLabels(Dataset[dict[str, Any]]):
    """Rows with the teacher's highest logits and their classes, each of shape (predictions, k).

    A classifier makes one prediction a row, a sequence-to-sequence model one for each label that counts.

    Args:
        rows: rows as the model takes them.
        folder: the folder that `soft_labels` wrote for them.
    """

    def __init__(self, rows: Sequence[Row], folder: str | Path):
        self.rows = rows
        self._file: Any = safe_open(str(Path(folder) / FILE), "pt")
        self._ends = [0, *self._file.get_tensor("predictions").cumsum(0).tolist()]
        self._generated = "labels" in self._file.keys()
        self.num_classes = int(self._file.get_tensor("num_classes"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = slice(self._ends[index], self._ends[index + 1])
        row = {**self.rows[index], **{name: self._file.get_slice(name)[part] for name in (LOGITS, CLASSES)}}
        return row | ({"labels": self._file.get_slice("labels")[part].tolist()} if self._generated else {})


def soft_labels(
    teacher: Any,
    rows: Sequence[Row],
    folder: str | Path,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    top_k: int | None = None,
    batch_size: int = 16,
    generate: Mapping[str, Any] | None = None,
) -> SoftLabels:
    """Compute the soft labels of rows, or read them where a folder has them.

    Args:
        teacher: a classifier or a sequence-to-sequence model, with an adapter or without, quantized or not. It runs in
            evaluation mode, without gradients.
        rows: rows as the teacher takes them, without padding.
        folder: where they are kept. A later call with the same teacher and rows reads them.
        collate: makes a batch of rows, such as `DataCollatorWithPadding`.
        top_k: how many of the highest logits to keep; None for all.
        batch_size: rows of a batch.
        generate: arguments of the teacher's `generate`, whose sequences replace the labels; None for the rows' labels.
            Kang et al. 2023 (https://arxiv.org/abs/2305.01645) have the teacher's greedy sequences.

    Returns:
        The rows with their soft labels.

    Raises:
        ValueError: a number is not positive, the teacher is a causal model, a row has no labels where they are needed,
            or the folder has soft labels of other rows, of another teacher or of other settings.
    """
    check_count("batch_size", batch_size)
    if top_k is not None:
        check_count("top_k", top_k)
    check("rows", len(rows), len(rows) > 0, "must have at least one row")
    path = Path(folder)
    names = sorted({name for row in rows for name in row})
    record_inputs(
        path,
        {
            **{"rows": rows_fingerprint(rows, names), "teacher": teacher_fingerprint(teacher)},
            **{"top_k": top_k, "generate": dict(generate) if generate is not None else None},
        },
    )
    if not (path / FILE).exists():
        with evaluating(teacher), torch.no_grad():
            predictions = list(predictions_of(teacher, rows, collate, top_k, batch_size, generate))
        tensors = {name: torch.cat([one[name] for one in predictions]).contiguous() for name in predictions[0]}
        save_file(tensors | {"num_classes": num_classes(teacher)}, path / f"partial-{FILE}")
        (path / f"partial-{FILE}").rename(path / FILE)  # a run that is killed leaves no half of a file
    return SoftLabels(rows, path)


def predictions_of(
    teacher: Any,
    rows: Sequence[Row],
    collate: Callable[..., Any],
    top_k: int | None,
    batch_size: int,
    generate: Mapping[str, Any] | None,
) -> Iterator[dict[str, Tensor]]:
    """Of each batch: the number of predictions of each row, and the highest logits of all, with their classes."""
    device = next(teacher.parameters()).device
    for first in range(0, len(rows), batch_size):
        indices = range(first, min(first + batch_size, len(rows)))
        collated = collate([dict(rows[i]) for i in indices]).items()
        batch = {name: value.to(device) for name, value in collated if value is not None}  # no labels
        if generate is not None:
            batch["labels"] = generated(teacher, batch, generate)
        logits = teacher(**batch).logits
        labels = batch.get("labels")
        if logits.ndim == 2:
            counts = torch.ones(len(logits), dtype=torch.int64)
        else:
            kind = type(teacher).__name__
            rule = "must be a classifier or a sequence-to-sequence model; TRL's DistillationTrainer has causal models"
            check("teacher", kind, bool(teacher.config.is_encoder_decoder), rule)
            check("rows", sorted(batch), labels is not None, "must have `labels`, or `generate` must be set")
            counts = (labels != IGNORED).sum(1).cpu()  # pyright: ignore[reportOptionalMemberAccess]
        values, classes = predictions(logits, labels).float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
        made = {"predictions": counts, LOGITS: values.cpu(), CLASSES: classes.cpu()}
        yield made if generate is None else {**made, "labels": batch["labels"][batch["labels"] != IGNORED].cpu()}


def predictions(logits: Tensor, labels: Tensor | None) -> Tensor:  # shape: (predictions, classes)
    """The logits of a classifier; of a sequence-to-sequence model those whose label counts: padding has none."""
    return logits if logits.ndim == 2 or labels is None else logits[labels != IGNORED]


def generated(teacher: Any, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """The sequences that a teacher generates, as labels, shape: (batch, length)."""
    inputs = {name: value for name, value in batch.items() if name != "labels" and "decoder" not in name}
    tokens = teacher.generate(**inputs, **options)[:, 1:]  # without the start token
    pad = teacher.generation_config.pad_token_id
    return tokens.masked_fill(tokens == pad, IGNORED)


def num_classes(model: Any) -> Tensor:
    """The number of classes, or of tokens."""
    config = model.config
    return torch.tensor(config.get_text_config().vocab_size if config.is_encoder_decoder and hasattr(model, "lm_head")
                        else config.num_labels)  # fmt: skip


def teacher_fingerprint(teacher: nn.Module) -> str:
    """The digest of numbers from all over the weights of a model, quantized ones and adapters included."""
    weights = (p.data.as_subclass(Tensor).flatten() for p in teacher.parameters())  # Params4bit moves in its own way
    return digest_of(*(bytes_of(w[:: max(1, len(w) // SAMPLES)].contiguous()) for w in weights))
