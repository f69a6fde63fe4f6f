"""Quantized weights: reading them, and keeping them trainable."""

from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def plain_weight(module: nn.Module) -> Tensor:
    """The weight of a module, dequantized where it is packed, in the shape of the module's class.

    Args:
        module: a module with a `weight`.
    """
    keep_4bit_trainable(module)  # a repacked weight cannot be read
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        # peft's function moves the weight, which drops its scales; after the first forward they are in `state`
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else cast(Any, module).state.SCB
        return weight.detach().to(scales.dtype) * scales.to(weight.device).view(-1, 1) / 127
    return dequantize_module_weight(module).detach()


def keep_4bit_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on processors with AVX512-BF16.

    There the first forward in evaluation repacks them, and later training silently has no gradients.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # this unpacks a weight that was repacked already
