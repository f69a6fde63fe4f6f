"""Makes plain tensors of those that are seen through projections, so that the adapter stands by itself."""

from peft import PeftModel
from torch import Tensor

from hf_peft_ext.transfer.map.adapter_tensors import SEEN
from hf_peft_ext.transfer.map.parametrize import Computed, remove_parametrization


def merge_projections(model: PeftModel) -> PeftModel:
    """Compute W_plug into the adapter, in place: a LoRA becomes a plain `LORA`, bottlenecks a `BOTTLENECK`, and so on.

    The logits stay what they were, nothing is left to compute at inference, and `save_pretrained` writes an adapter
    that is loaded as any other.

    Args:
        model: what `plug` returned.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        if isinstance(module, Computed):
            remove_parametrization(module)
    if hasattr(model, "plug"):
        del model.plug
    return model


def plain_state(model: PeftModel) -> dict[str, Tensor]:
    """The state of a plugged model as it would be folded, for `save_pretrained(folder, state_dict=...)`."""
    state = {name: value for name, value in model.state_dict().items() if SEEN not in name}
    for path, module in model.named_modules():
        if isinstance(module, Computed):
            computed = [name.removeprefix(SEEN) for name in vars(module)["_modules"] if name.startswith(SEEN)]
            state |= {f"{path}.{name}": getattr(module, name).detach() for name in computed}
    return state
