"""What the blocks of the frozen large model read, at the channels of a thin copy; computed once, kept on disk."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..placement import check
from ..rank_classification import evaluating
from ..structure import stacks
from ..tuners.attach import hidden_states

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class Activations:
    """Inputs -> what each block of the large model without its module reads, row by row.

    A row that was met before is not computed again, in whatever batch and behind whatever padding it comes: it is
    known by its tokens, positions and what of its mask is no padding. A file takes layers x tokens x d numbers.

    Args:
        plugged: the large model with its module, which is off while it runs.
        kept: the d channels that are kept.
        folder: where rows are kept, for this large model or others; None to compute them each time.

    Raises:
        ValueError: the model has two stacks of blocks: an encoder-decoder.
    """

    def __init__(self, plugged: PeftModel, kept: Tensor, folder: str | Path | None = None):
        self.plugged, self.kept = plugged, kept
        base = plugged.get_base_model()
        found = [list(blocks) for _, blocks in stacks(base)]
        rule = "is an encoder-decoder, which a bridge has no ladder for yet; leave `ladder` out"
        check("model", type(base).__name__, len(found) == 1, rule)
        (self.blocks,) = found
        self.folder = None if folder is None else Path(folder)
        self.large = fingerprint(plugged, kept)

    def __call__(self, given: Mapping[str, Any]) -> Tensor:  # shape: (layers, batch, length, d)
        given = {name: given[name] for name in INPUTS if given.get(name) is not None}
        if self.folder is None:
            return self.run(given)
        seen = real_tokens(given)
        keys = [self.key(of_rows(given, [i]), row) for i, row in enumerate(seen)]
        missing = [i for i, key in enumerate(keys) if not self.file(key).exists()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            for i, states in zip(missing, self.run(of_rows(given, missing)).unbind(1), strict=True):
                partial = self.file(f"partial-{keys[i]}")
                save_file({"states": states[:, seen[i]].cpu().contiguous()}, partial)
                partial.rename(self.file(keys[i]))
        rows = [load_file(self.file(key))["states"].to(seen.device) for key in keys]
        found = rows[0].new_zeros(len(self.blocks), *seen.shape, len(self.kept))
        for i, states in enumerate(rows):
            found[:, i, seen[i]] = states
        return found

    def run(self, given: Mapping[str, Any]) -> Tensor:  # shape: (layers, batch, length, d)
        """The large model's own forward, without its module and without gradients."""
        read: list[Tensor] = []

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            states = hidden_states(args, kwargs)
            read.append(states[..., self.kept.to(states.device)])

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        try:
            with torch.no_grad(), evaluating(self.plugged), as_it_was(self.plugged), self.plugged.disable_adapter():
                self.plugged.get_base_model()(**given)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(read)

    def key(self, row: Mapping[str, Any], seen: Tensor) -> str:
        found = hashlib.blake2b(self.large, digest_size=16)
        if "position_ids" not in row:  # it is counted from the left, padding included
            found.update(seen.nonzero().cpu().numpy().tobytes())
        for name, value in row.items():
            for part in tensors(value):
                part = part[0][..., seen, :][..., seen] if part.ndim == 4 else part[0][seen]
                found.update(name.encode() + part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def tensors(value: Any) -> list[Tensor]:
    """An input, or those of each kind of layer."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def of_rows(given: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch."""
    return {name: of_rows(value, rows) if isinstance(value, Mapping) else value[rows] for name, value in given.items()}


def real_tokens(given: Mapping[str, Any]) -> Tensor:  # shape: (batch, length), booleans
    """Which tokens are no padding; under a mask of queries by keys, those that another sees or with a position."""
    ids = given["input_ids"] if "input_ids" in given else given["inputs_embeds"][..., 0]
    if "attention_mask" not in given:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = tensors(given["attention_mask"])[0]
    if mask.ndim == 2:
        return mask.bool()
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    others = visible & ~torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
    # padding may see a prompt, but stands at position 0
    real = others.any(1) | (given["position_ids"] > 0 if "position_ids" in given else others.any(2))
    return real | ~real.any(1, keepdim=True)


def fingerprint(plugged: PeftModel, kept: Tensor) -> bytes:
    """What tells one frozen model, and what is kept of it, from another: its config and the sums of its weights."""
    found = hashlib.blake2b(repr(plugged.get_base_model().config).encode())
    found.update(kept.cpu().numpy().tobytes())
    for parameter in plugged.parameters():
        if not parameter.requires_grad:
            found.update(repr(float(parameter.detach().double().sum())).encode())
    return found.digest()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back which parameters are trained, which peft changes when it disables an adapter."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
