"""Merges W_plug into an adapter, so that its tensors are plain."""

from typing import Any

from peft import PeftModel
from torch import Tensor

from hf_peft_ext.transfer.map.parametrize import is_projected, remove_parametrization


def merge_projections(model: PeftModel) -> PeftModel:
    """Compute W_plug into the adapters, in place: a LoRA becomes a plain `LORA`, a bottleneck a `BOTTLENECK`.

    The logits don't change. Nothing is left to compute at inference, and `save_pretrained` writes adapters that load
    like any other.

    Args:
        model: what `plug` returned.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        if is_projected(module):
            remove_parametrization(module)
    if hasattr(model, "plug"):
        del model.plug
    return model


def plain_state(model: PeftModel) -> dict[str, Tensor]:
    """The state of a plugged model as `merge_projections` would leave it, for `save_pretrained(state_dict=...)`."""
    projected = {path: module for path, module in model.named_modules() if is_projected(module)}
    originals = tuple(f"{path}.parametrizations." for path in projected)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(originals)}
    for path, module in projected.items():
        names: Any = module.parametrizations
        state |= {f"{path}.{name}": getattr(module, name).detach() for name in names}
    return state
