"""AdaLoRA's `rank_pattern`: the directions of each matrix that pruning has left, which the file holds alone."""

from collections.abc import Mapping, Sequence

import torch
from peft import AdaLoraConfig
from torch import Tensor

from hf_peft_ext.validation.config_schema import refuse

SINGULAR_VALUES = ".lora_E"  # of the module's path in a pattern's key
DIMENSION = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # the one of rank r


def check_kept_ranks(config: AdaLoraConfig, paths: Sequence[str]) -> None:
    """Refuse a `rank_pattern` that does not say of each direction of a module whether it is left.

    Args:
        config: an untrusted config.
        paths: the paths of the model's modules.

    Raises:
        ValueError: a key names no module, or a value is no list of `init_r` times true or false.
    """
    modules = set(paths)
    for key, kept in (config.rank_pattern or {}).items():
        if not key.endswith(SINGULAR_VALUES) or key.removesuffix(SINGULAR_VALUES) not in modules:
            refuse("rank_pattern", key, f"must name modules of this model, each with {SINGULAR_VALUES} after it")
        if not isinstance(kept, list) or len(kept) != config.init_r or not all(type(one) is bool for one in kept):
            refuse("rank_pattern", kept, f"must have true or false for each of the {config.init_r} directions")


def left_by_pruning(expected: Mapping[str, Tensor], pattern: Mapping[str, list[bool]]) -> dict[str, Tensor]:
    """The tensors of an adapter with only the directions that are left, on the meta device.

    Args:
        expected: the tensors of the unpruned adapter, by their keys in the file.
        pattern: `rank_pattern`.
    """
    left = dict(expected)
    for key, kept in pattern.items():
        for part, dimension in DIMENSION.items():
            name = f"base_model.model.{key.removesuffix(SINGULAR_VALUES)}.{part}"
            if name in left:
                shape = list(left[name].shape)
                shape[dimension] = sum(kept)
                left[name] = torch.empty(shape, dtype=left[name].dtype, device="meta")
    return left
