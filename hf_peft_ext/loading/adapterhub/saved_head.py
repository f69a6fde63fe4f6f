"""Reads a prediction head that AdapterHub's library has saved: its config and its tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_peft_ext.loading.adapterhub.head_forms import HEAD_AUTO_CLASSES, OF_LABELS
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import read_json

HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS, SAFE_HEAD_WEIGHTS = "pytorch_model_head.bin", "model_head.safetensors"


@dataclass
class SavedHead:
    """The config of a saved head.

    Args:
        kind: the library's type of head; None for the head of a class of transformers.
        model_class: the class that it was saved from.
        settings: of a flexible head; empty for the head of a class of transformers.
        labels: label -> number; empty if the head has none or only the default ones.
        num_labels: number of outputs; None where it is not saved.
    """

    kind: str | None
    model_class: str
    settings: dict[str, Any]
    labels: dict[str, int]
    num_labels: int | None

    def base_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` takes, so that the base model has a head of this size."""
        if self.num_labels is None:
            return {}
        names = {"id2label": {i: label for label, i in self.labels.items()}, "label2id": self.labels}
        return {"num_labels": self.num_labels, **(names if self.labels else {})}

    def call(self) -> str:
        """The arguments of `from_pretrained` for such a base, in brackets; empty without any."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.base_kwargs().items() if key != "label2id")
        return f"(..., {arguments})" if arguments else ""


def read_head(path: Path) -> SavedHead | None:
    """The config of the head in a folder; None if there is none.

    Raises:
        ValueError: the file is not the library's.
    """
    if not (path / HEAD_CONFIG).is_file():
        return None
    saved = read_json(path / HEAD_CONFIG)
    settings = saved.get("config") or {}
    complete = isinstance(settings, dict) and isinstance(saved.get("model_class"), str)
    check("path", str(path), complete, f"must hold the `model_class` and the `config` of a head in {HEAD_CONFIG}")
    labels = {str(label): int(i) for label, i in (settings.get("label2id") or saved.get("label2id") or {}).items()}
    if all(label == f"LABEL_{i}" for label, i in labels.items()):
        labels = {}
    kind = settings.get("head_type")
    has_labels = kind in OF_LABELS if settings else saved["model_class"].endswith("Classification")
    num_labels = settings.get("num_labels", saved.get("num_labels")) if has_labels else None
    return SavedHead(kind, saved["model_class"], settings, labels if has_labels else {}, num_labels)


def head_auto_class(head: SavedHead) -> Any:
    """The auto class whose models have such a head; None if its type or class does not say."""
    by_name = {auto.__name__: auto for auto in HEAD_AUTO_CLASSES.values()}
    named = by_name.get(f"AutoModelFor{head.model_class.partition('For')[2]}")
    return HEAD_AUTO_CLASSES.get(head.kind) if head.kind else named


def read_head_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a head. A pickle is read with `weights_only`, so that it runs no code.

    Raises:
        ValueError: the folder has no file with them.
    """
    if (path / SAFE_HEAD_WEIGHTS).is_file():
        return load_file(path / SAFE_HEAD_WEIGHTS)
    check("path", str(path), (path / HEAD_WEIGHTS).is_file(), f"must hold {SAFE_HEAD_WEIGHTS} or {HEAD_WEIGHTS}")
    return torch.load(path / HEAD_WEIGHTS, map_location="cpu", weights_only=True)
