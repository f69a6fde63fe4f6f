"""Checks an adapter_model.safetensors against the tensors that its config implies, before any of it is loaded."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..schema import parse_json, read_start
from ..tuners.loaded import shown

MAX_HEADER = 2**22  # bytes; some 30,000 tensors
MAX_WEIGHT = 65504  # what half precision can hold; NaN and infinities are beyond it too
FLOATS = ("F64", "F32", "F16", "BF16")
OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def check_weights(path: Path, implied: Mapping[str, Tensor]) -> None:
    """Check keys, shapes, types and values of a file that `check_header` has passed. One tensor at a time is read.

    Args:
        path: the file.
        implied: the tensors it must hold, by key; only their shapes and types are looked at.

    Raises:
        ValueError: the file is no sound safetensors file, holds other keys, shapes or types, or a weight that is not
            finite or beyond half precision.
    """
    try:
        with safe_open(path, framework="pt") as file:  # checks lengths, offsets and types
            check_keys(file.keys(), implied)
            for key, tensor in implied.items():
                check_shape(key, file.get_slice(key), tensor)
            for key in implied:
                check_values(key, file.get_tensor(key))
    except SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}.") from error


def check_header(path: Path) -> None:
    """Refuse headers that are too long, or have a key twice; of these safetensors would take the last."""
    length, size = int.from_bytes(read_start(path, 8), "little"), path.stat().st_size
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{path} has a header of {length} bytes, but the file has {size}; at most {MAX_HEADER}.")
    parse_json(read_start(path, 8 + length)[8:], f"The header of {path}")


def check_keys(found: Iterable[str], implied: Iterable[str]) -> None:
    missing, extra = sorted({*implied} - {*found}), sorted({*found} - {*implied})
    for keys, what in ((extra, "holds tensors that its config does not imply"), (missing, "lacks tensors")):
        if keys:
            base = keys == extra and any(".base_layer." in key or "embed" in key or "lm_head" in key for key in keys)
            hint = " Weights of the base model stay out with `save_embedding_layers=False`." if base else ""
            raise ValueError(f"The adapter's file {what}: {shown(keys)}.{hint}")


def check_shape(key: str, found: Any, implied: Tensor) -> None:
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if shape != tuple(implied.shape):
        raise ValueError(f"{key} has shape {shape}, but its config implies {tuple(implied.shape)}.")
    types = FLOATS if implied.is_floating_point() else (OTHERS.get(implied.dtype),)
    if dtype not in types:
        raise ValueError(f"{key} is of type {dtype}, but its config implies {implied.dtype}.")


def check_values(key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel() and not tensor.abs().max() <= MAX_WEIGHT:
        raise ValueError(
            f"{key} holds a weight that is not finite, or beyond {MAX_WEIGHT}, which half precision ends at."
        )
