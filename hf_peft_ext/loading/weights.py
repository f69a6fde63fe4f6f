"""Checks an adapter_model.safetensors against the tensors that its config implies, before it is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_peft_ext.attach.checked_loading import first_keys
from hf_peft_ext.validation.config_schema import parse_json, read_start

MAX_HEADER = 2**22  # bytes; some 30,000 tensors
MAX_WEIGHT = 65504  # the largest number in half precision
FLOATS = ("F64", "F32", "F16", "BF16")
OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def check_weights(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Check keys, shapes, types and values of a file that has passed `check_header`. Tensors are read one at a time.

    Args:
        path: the file.
        expected: the tensors that it must hold, by key; only their shapes and types are read.

    Raises:
        ValueError: the file is not valid safetensors, holds other keys, shapes or types, or a weight is not finite or
            too large for half precision.
    """
    try:
        with safe_open(path, framework="pt") as file:  # checks lengths, offsets and types
            check_tensor_names(file.keys(), expected)
            for key, tensor in expected.items():
                check_shape(key, file.get_slice(key), tensor)
            for key in expected:
                check_values(key, file.get_tensor(key), getattr(expected[key], "index_limits", ()))
    except SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}.") from error


def check_header(path: Path) -> None:
    """Refuse a header that is too long, or that repeats a key: safetensors would read the last one.

    Raises:
        ValueError: the header is too long or too short, is not strict JSON, or has duplicate keys.
    """
    length, size = int.from_bytes(read_start(path, 8), "little"), path.stat().st_size
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"{path} has a header of {length} bytes, but the file has {size}; at most {MAX_HEADER}.")
    parse_json(read_start(path, 8 + length)[8:], f"The header of {path}")


def check_tensor_names(in_file: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse extra and missing keys.

    Raises:
        ValueError: the keys differ.
    """
    missing, extra = sorted({*expected} - {*in_file}), sorted({*in_file} - {*expected})
    for keys, fault in ((extra, "holds tensors that its config does not imply"), (missing, "lacks tensors")):
        if keys:
            base = keys == extra and any(".base_layer." in key or "embed" in key or "lm_head" in key for key in keys)
            hint = " Save without weights of the base model: `save_embedding_layers=False`." if base else ""
            raise ValueError(f"The adapter's file {fault}: {first_keys(keys)}.{hint}{hint_of_class(missing, extra)}")


def hint_of_class(missing: Iterable[str], extra: Iterable[str]) -> str:
    """Which class the base model needs, if the adapter was trained on another classifier."""
    ours = "mean_pooling.classifier."
    if any(ours in key for key in extra):
        return " The adapter was trained on MeanPoolingForSequenceClassification: load the base model with it."
    if any(ours in key for key in missing) and any("classifier" in key or "score" in key for key in extra):
        return " The adapter was trained on transformers' own classifier: load the base model with its auto class."
    return ""


def check_shape(key: str, in_file: Any, expected: Tensor) -> None:
    """Refuse another shape or type. Floats of any precision are accepted where floats are expected.

    Args:
        in_file: the tensor's slice, as safetensors opens it.

    Raises:
        ValueError: shape or type differ.
    """
    shape, dtype = tuple(in_file.get_shape()), in_file.get_dtype()
    if shape != tuple(expected.shape):
        raise ValueError(f"{key} has shape {shape}, but its config implies {tuple(expected.shape)}.")
    types = FLOATS if expected.is_floating_point() else (OTHERS.get(expected.dtype),)
    if dtype not in types:
        raise ValueError(f"{key} is of type {dtype}, but its config implies {expected.dtype}.")


def check_values(key: str, tensor: Tensor, limits: Sequence[int] = ()) -> None:
    """Refuse weights that are NaN, infinite, or too large for half precision, and indices out of range.

    Args:
        key: the tensor's name.
        tensor: the tensor.
        limits: for indices, what those of each row, or of all, must be below.

    Raises:
        ValueError: the tensor has such a weight or index.
    """
    for limit, indices in zip(limits, tensor if len(limits) > 1 else [tensor], strict=False):
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
            raise ValueError(f"{key} holds an index that is not in [0, {limit}).")
    if tensor.is_floating_point() and tensor.numel() and not tensor.abs().max().item() <= MAX_WEIGHT:
        raise ValueError(
            f"{key} holds a weight that is not finite, or is larger than {MAX_WEIGHT}, the most in half precision."
        )
