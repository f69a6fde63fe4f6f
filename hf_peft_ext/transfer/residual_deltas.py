"""The change that an adapter makes in each layer's residual stream, on the layer's inputs in the adapted model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_peft_ext.model.modes import evaluating, preserve_requires_grad
from hf_peft_ext.model.structure import stacks

TokenBatch = Mapping[str, Tensor]


def base_states(model: PeftModel, batches: list[TokenBatch], by_text: bool) -> list[Tensor]:
    """The output of each block of the base model, a row for each token or text."""
    with evaluating(model), preserve_requires_grad(model), model.disable_adapter():
        rows = [[rows_of(call.output, call.mask, by_text) for call in calls(model, batch)] for batch in batches]
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


def deltas(model: PeftModel, batches: list[TokenBatch], by_text: bool) -> list[Tensor]:
    """The output of each block with the active adapter minus that on the same input without it."""
    rows = []
    for batch in batches:
        with evaluating(model), preserve_requires_grad(model):
            with_it = calls(model, batch)
            with torch.no_grad(), model.disable_adapter():
                without = [call.again() for call in with_it]
        pairs = zip(with_it, without, strict=True)
        rows.append([rows_of(call.output - base, call.mask, by_text) for call, base in pairs])
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


class Call(NamedTuple):
    """One call of a block; the mask is False at padding."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    mask: Tensor

    def again(self) -> Tensor:
        """The output of the block on the same inputs."""
        return first(self.block.forward(*self.args, **self.kwargs))


def calls(model: PeftModel, batch: TokenBatch) -> list[Call]:
    """The call of each block in one forward pass, layer by layer."""
    base: Any = model.get_base_model()
    blocks = [block for _, stack in stacks(base) for block in stack]
    encoder = len(next(stacks(base))[1]) if base.config.is_encoder_decoder else 0
    labels, by_block = batch.get("labels"), {}

    def after(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        output = first(output)
        mask = batch.get("attention_mask")
        if len(by_block) >= encoder > 0:
            mask = batch.get("decoder_attention_mask", labels != -100 if labels is not None else None)
        if mask is None or mask.shape != output.shape[:2]:
            mask = torch.ones(output.shape[:2])
        by_block[block] = Call(block, args, kwargs, output, mask.bool().cpu())

    handles = [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            device = next(base.parameters()).device
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [by_block[block] for block in blocks]


def rows_of(output: Tensor, mask: Tensor, by_text: bool) -> Tensor:
    """A row for each token that is no padding, or their mean for each text, in double precision."""
    output = output.double().cpu()
    if not by_text:
        return output[mask]
    weights = mask.unsqueeze(-1).double()
    return (output * weights).sum(dim=1) / weights.sum(dim=1)


def first(output: Any) -> Tensor:
    """The hidden states of a block's output, which may be a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def shuffled(model: PeftModel, generator: torch.Generator) -> Iterator[None]:
    """An untrained adapter for the length of the block: the entries of each of its tensors are shuffled."""
    tuner: Any = model.base_model
    prefix, name = tuner.prefix, model.active_adapter
    own = [p for key, p in model.named_parameters() if prefix in key and f".{name}" in key]
    before = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p in own:
            order = torch.randperm(p.numel(), generator=generator)
            p.copy_(p.flatten()[order.to(p.device)].view_as(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(own, before, strict=True):
                p.copy_(value)
