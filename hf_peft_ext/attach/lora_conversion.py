"""What a tuner layer answers to peft's `convert_to_lora`."""

from typing import Any, NoReturn

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.attach.merge import can_merge
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.sublayers import LowRank, PHMRule


class LoraConversion:
    """Part of `TunerLayer`."""

    sublayer_of: Any  # adapter name -> sub-layer
    host: Any  # the module that the layer changes

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA equals the sub-layer of an adapter; without one of that name, all sub-layers."""
        named = adapter_name in self.sublayer_of
        chosen = [self.sublayer_of[adapter_name]] if named else self.sublayer_of.values()
        return all(is_weight_update(self.host, sublayer) for sublayer in chosen)

    def get_delta_weight(self, adapter_name: str) -> NoReturn:
        """Not of this layer but of its host: see `export.low_rank_factors`.

        Raises:
            TypeError: always. peft's own `convert_to_lora` calls this if it was imported before this package.
        """
        raise TypeError("Import hf_peft_ext before `convert_to_lora`, or call `peft.convert_to_lora(...)`.")


def is_weight_update(host: nn.Module, sublayer: nn.Module) -> bool:
    """Whether a sub-layer is a low-rank update of the host's weight, which a LoRA can express exactly.

    A rule of Compacter by itself adds nothing; the bottlenecks that use it are no updates.
    """
    linear = isinstance(innermost(host), nn.Linear | Conv1D)
    return isinstance(sublayer, PHMRule) or (linear and isinstance(sublayer, LowRank) and can_merge(sublayer))
