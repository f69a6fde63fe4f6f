"""What the blocks of the frozen large model read, at the channels of a thin copy; computed once, kept on disk."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_peft_ext.attach.layer import hidden_states
from hf_peft_ext.model.modes import evaluating, preserve_requires_grad
from hf_peft_ext.model.structure import CACHES, stacks
from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.transfer.map.projections import RESIDUAL
from hf_peft_ext.validation.checks import check

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
DECODER = "decoder_"  # begins the names of what the second stack of an encoder-decoder is given
# What a config says beside how the model computes.
BESIDE = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


class Activations:
    """Inputs -> what each block of the large model without its module reads, row by row.

    A row that was met before is not computed again, in whatever batch and behind whatever padding it comes: it is
    known by its tokens, positions and what of its mask is no padding. A file takes layers x tokens x d numbers. An
    encoder-decoder has two files for each row, and what its encoder reads is kept once for all answers to a text.

    Args:
        plugged: the large model with its module, which is off while it runs. It may have no weights (be on the meta
            device) where all rows are kept.
        thin: its thin copy, as it was cut; its channels are kept, and rows are known by its weights.
        folder: where rows are kept, for this large model or others; None to compute them each time.
    """

    def __init__(self, plugged: PeftModel, thin: PrunedModel, folder: str | Path | None = None):
        self.plugged, self.kept = plugged, thin.kept[RESIDUAL]
        self.base: Any = plugged.get_base_model()
        self.stacks = [list(blocks) for _, blocks in stacks(self.base)]
        self.folder = None if folder is None else Path(folder)
        self.large = fingerprint(self.base.config, thin)

    def __call__(self, given: Mapping[str, Any]) -> list[Tensor]:  # of each stack: (layers, batch, length, d)
        """Encoder before decoder.

        Raises:
            ValueError: it is a step of generation, or has to be computed by a model without weights.
        """
        inputs = self.inputs(given)
        if self.folder is None:
            return self.run(inputs)
        parts = by_stack(inputs, given.get("labels"))[: len(self.stacks)]
        seen = [real_tokens(part) for part in parts]
        files = [list(self.files([of_rows(p, [i]) for p in parts], [s[i] for s in seen])) for i in range(len(seen[0]))]
        missing = [i for i, of_row in enumerate(files) if not all(file.exists() for file in of_row)]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stack, states in enumerate(self.run(of_rows(inputs, missing))):
                for i, row in zip(missing, states.unbind(1), strict=True):
                    keep(row[:, seen[stack][i]], files[i][stack])
        return [joined(of_stack, s) for of_stack, s in zip(zip(*files, strict=True), seen, strict=True)]

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the large model is given: no labels, but what a decoder reads of them."""
        for name in (*CACHES, "encoder_outputs"):
            rule = "must be None: a bridge with a ladder takes whole rows, and does not generate"
            check(name, type(given.get(name)).__name__, given.get(name) is None, rule)
        names = (*INPUTS, *(DECODER + name for name in INPUTS))
        found = {name: given[name] for name in names if given.get(name) is not None}
        shifted, labels = getattr(self.base, "prepare_decoder_input_ids_from_labels", None), given.get("labels")
        if shifted and labels is not None and not found.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            found["decoder_input_ids"] = shifted(labels)
        if {"input_ids", "decoder_input_ids"} <= found.keys():
            rows, answers = len(found["input_ids"]), len(found["decoder_input_ids"])
            rule = f"must be the number of rows of `input_ids` ({rows}); choices are scored with `packed=False`"
            check("len(decoder_input_ids)", answers, answers == rows, rule)
        return found

    def run(self, inputs: Mapping[str, Any]) -> list[Tensor]:  # of each stack: (layers, batch, length, d)
        """The large model's own forward, without its module and without gradients."""
        check_weights("plugged", self.base, "the ladder's cache lacks rows that are asked for, or there is none")
        read: list[list[Tensor]] = [[] for _ in self.stacks]

        def noting(found: list[Tensor]) -> Any:
            def note(_: nn.Module, args: Any, kwargs: Any) -> None:
                states = hidden_states(args, kwargs)
                found.append(states[..., self.kept.to(states.device)])

            return note

        handles = [block.register_forward_pre_hook(noting(found), with_kwargs=True)
                   for blocks, found in zip(self.stacks, read, strict=True) for block in blocks]  # fmt: skip
        try:
            with (
                torch.no_grad(),
                evaluating(self.plugged),
                preserve_requires_grad(self.plugged),
                self.plugged.disable_adapter(),
            ):
                self.base(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [torch.stack(states) for states in read]

    def files(self, parts: Sequence[Mapping[str, Any]], seen: Sequence[Tensor]) -> Iterator[Path]:
        """Of one row, a file for each stack; that of a decoder is known by the encoder's inputs too."""
        assert self.folder is not None
        found = hashlib.blake2b(self.large, digest_size=16)
        for part, real in zip(parts, seen, strict=True):
            if "position_ids" not in part:  # it is counted from the left, padding included
                found.update(real.nonzero().cpu().numpy().tobytes())
            for name, value in part.items():
                for x in tensors(value):
                    x = x[0][..., real, :][..., real] if x.ndim == 4 else x[0][real]
                    found.update(name.encode() + bytes_of(x))
            yield self.folder / f"{found.hexdigest()}.safetensors"


def keep(states: Tensor, file: Path) -> None:
    """Write the states of a row; the file gets its name when all of it is there."""
    partial = file.with_name(f"partial-{file.name}")
    save_file({"states": states.cpu().contiguous()}, partial)
    partial.rename(file)


def joined(files: Sequence[Path], seen: Tensor) -> Tensor:  # shape: (layers, batch, length, d)
    """The states of rows as a batch, 0 where there is padding."""
    rows = [load_file(file)["states"].to(seen.device) for file in files]
    found = rows[0].new_zeros(len(rows[0]), *seen.shape, rows[0].shape[-1])
    for i, states in enumerate(rows):
        found[:, i, seen[i]] = states
    return found


def by_stack(inputs: Mapping[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
    """What the encoder, or the only stack, is given, and what the decoder, by the same names."""
    first, second = (
        {name: inputs[start + name] for name in INPUTS if start + name in inputs} for start in ("", DECODER)
    )
    if second and labels is not None:  # behind the last label nothing matters
        second.setdefault("attention_mask", (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0)
    return [first, second or first]  # T5 with a classifier gives its decoder the encoder's tokens


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


def fingerprint(config: Any, thin: PrunedModel) -> bytes:
    """What tells one large model, and what is kept of it, from another: its config, and slices of its weights, which
    are at hand where its own are not.
    """
    facts = {name: value for name, value in config.to_dict().items() if name not in BESIDE}
    found = hashlib.blake2b(repr(sorted(facts.items())).encode())
    found.update(bytes_of(thin.kept[RESIDUAL]))
    for parameter in thin.model.parameters():
        found.update(bytes_of(parameter))
    return found.digest()


def bytes_of(x: Tensor) -> bytes:
    """The same on every device, as a sum is not."""
    return x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def check_weights(name: str, model: nn.Module, why: str) -> None:
    """Refuse a model without weights, one on the meta device."""
    there = not any(parameter.is_meta for parameter in model.parameters())
    check(name, type(model).__name__, there, f"must have weights, and is on the meta device: {why}")
