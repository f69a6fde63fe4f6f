"""Quantised weights: reading them, and keeping them trainable."""

from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def plain_weight(module: nn.Module) -> Tensor:
    """The weight of a module as numbers, in the shape that the module's class says, dequantised where it is packed."""
    keep_4bit_trainable(module)  # a repacked weight cannot be read
    return dequantize_module_weight(module).detach()


def keep_4bit_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on processors with AVX512-BF16.

    There the first forward in evaluation repacks them, after which training silently has no gradients.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # taking the state unpacks a weight that was repacked already
