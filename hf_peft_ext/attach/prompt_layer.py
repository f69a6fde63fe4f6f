"""The tuner layer of soft prompts: it lengthens the embedded sequence, and the attention mask with it."""

import inspect
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import FORWARD
from hf_peft_ext.attach.layer import AddToOutput
from hf_peft_ext.attach.masks import mask_position
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import CACHES
from hf_peft_ext.validation.checks import check


class LengthenSequence(AddToOutput):
    """y = embeddings(x) becomes [P, y], in encoders. The model around the embeddings gets a longer mask."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """As of every layer, and one on the module that calls the embeddings.

        Raises:
            ValueError: the model has a decoder, or its embeddings read the mask.
        """
        parent, _, child = self.site.host.rpartition(".")
        around: Any = model.get_submodule(parent)
        config: Any = getattr(model, "config", None)
        cached = any(name in inspect.signature(around.forward).parameters for name in CACHES)
        decodes = getattr(config, "is_encoder_decoder", False) or (cached and any(s.causal for s in find_sites(model)))
        check("sublayer", "prompt", not decodes, "must be another one with a decoder, whose cache has no prompt")
        reads_mask = "mask" in inspect.signature(self.host.forward).parameters  # as DeBERTa's
        check("sublayer", "prompt", not reads_mask, f"must be another one: {self.site.host} reads the mask")
        lengthen = partial(lengthen_mask, child, self.name, *mask_position(around))
        return [*super().hooks(model), around.register_forward_pre_hook(lengthen, with_kwargs=True)]

    @property
    def n_tokens(self) -> int:
        """Number of virtual tokens of the active adapters."""
        return sum(len(prompt.P) for prompt in self.active_here.values())

    def add(self, y: Tensor, x: Tensor, read: Any = None) -> Tensor:
        """As of every layer.

        Raises:
            ValueError: the batch mixes adapters, so that its rows would differ in length.
        """
        mixed = FORWARD.row_adapters
        check("adapter_names", mixed, mixed is None, "must be None with a prompt, which makes its rows longer")
        return super().add(y, x, read)


def lengthen_mask(
    child: str,
    name: str,
    keyword: str,
    position: int,
    around: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put ones for the active prompts in front of a mask of shape (batch, length)."""
    n_tokens = getattr(getattr(around, child), name).n_tokens
    mask = kwargs.get(keyword, args[position] if len(args) > position else None)
    if not n_tokens or mask is None:
        return None
    check("attention_mask", tuple(mask.shape), mask.ndim == 2, "must have the shape (batch, length) with a prompt")
    longer = F.pad(mask, (n_tokens, 0), value=1)  # (batch, n_tokens + length)
    if keyword in kwargs:
        return args, kwargs | {keyword: longer}
    return (*args[:position], longer, *args[position + 1 :]), kwargs
