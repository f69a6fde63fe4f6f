"""peft's `convert_to_lora` for the adapters of this package, and for (IA)^3."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.export.files import PREFIX, saved_whole_config, saved_whole_tensors
from hf_peft_ext.export.low_rank_factors import Factors, NotLowRankError, base_of, low_rank_factors
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.registry import REGISTERED, extend_function


@extend_function
def convert_to_lora(
    stock: Callable[..., Any], model: Any, rank: float, adapter_name: str = "default", **kwargs: Any
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """As `peft.convert_to_lora`, which looks for an update of the weight in each tuner layer itself.

    The tuner layers of this package are children of the leaves that they change. So peft's function is given a model
    of leaves with the update of each.

    Raises:
        TypeError: the adapter is no low-rank update of weights.
        ValueError: `rank` is invalid.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or (config.peft_type not in REGISTERED and config.peft_type != "IA3"):
        return stock(model, rank, adapter_name, **kwargs)
    try:
        factors = low_rank_factors(model, adapter_name)
    except NotLowRankError as error:
        raise TypeError(f"{error}. `hf_peft_ext.to_lora` trains a LoRA that imitates such an adapter.") from error
    lora, state = stock(LeavesView(model, adapter_name, factors), rank, adapter_name, **kwargs)
    for name, value in saved_whole_config(config).items():
        setattr(lora, name, value)
    return lora, {**state, **saved_whole_tensors(model, adapter_name)}


class UpdatedLeaf(BaseTunerLayer):
    """A leaf with the update of its weight, as peft's function reads it."""

    def __init__(self, leaf: nn.Module, factors: Factors):
        self.leaf, self.factors = leaf, factors

    def get_base_layer(self) -> nn.Module:
        """The leaf."""
        return self.leaf

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True."""
        return True

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """B A, in the shape of the leaf's weight."""
        delta = self.factors.B @ self.factors.A
        return delta.T if isinstance(self.leaf, Conv1D) else delta


class LeavesView:
    """The part of a model that peft's function reads: its leaves by name, and the config.

    Args:
        model: the model.
        adapter_name: the adapter.
        factors: path of a leaf -> its update.
    """

    def __init__(self, model: Any, adapter_name: str, factors: dict[str, Factors]):
        base, config = base_of(model), model.peft_config[adapter_name]
        prefix = PREFIX if base is not model else ""
        self.leaves = {
            prefix + path: UpdatedLeaf(innermost(base.get_submodule(path)), update) for path, update in factors.items()
        }
        self.peft_config = {
            adapter_name: SimpleNamespace(
                peft_type=config.peft_type,
                base_model_name_or_path=config.base_model_name_or_path,
                target_modules={*factors},
            )
        }

    def modules(self) -> list[UpdatedLeaf]:
        """The leaves."""
        return list(self.leaves.values())

    def named_modules(self) -> list[tuple[str, UpdatedLeaf]]:
        """The leaves by their names in a `PeftModel`."""
        return list(self.leaves.items())
