"""Finds the transformers model inside a SentenceTransformer, a CrossEncoder or a SparseEncoder."""

from typing import Any

from torch import nn


def transformer_module(model: nn.Module) -> Any:
    """The module of a SentenceTransformer that holds the transformers model as its `model`; None for other models."""
    inner = getattr(model, "transformers_model", None) if isinstance(model, nn.Sequential) else None
    if inner is None:
        return None
    return next((module for module in model.children() if getattr(module, "model", None) is inner), None)
