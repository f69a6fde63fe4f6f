"""Inputs of the large model's blocks, at the channels of a pruned copy; computed once for each row, cached on disk."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_peft_ext.attach.forward_state import hidden_states
from hf_peft_ext.model.modes import evaluating, preserve_requires_grad
from hf_peft_ext.model.structure import CACHES, stacks
from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.pruning.channels import RESIDUAL
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.validation.checks import check

STACK_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
DECODER = "decoder_"  # begins the names of the inputs of an encoder-decoder's second stack
# Fields of a config that don't change what the model computes.
IRRELEVANT_FIELDS = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


class Activations:
    """Inputs of the model -> inputs of each block of the large model without its adapters.

    Rows are cached by content (tokens, positions, mask without padding), independent of batch and padding. A file has
    layers x tokens x d numbers. An encoder-decoder has two files for each row; that of the encoder is shared by all
    answers to a text.

    Args:
        plugged: the large model with its adapters, which are disabled while it runs. It may be on the meta device,
            without weights, if all rows are cached.
        pruned: its pruned copy, not trained since; rows are cached at its channels, and for its weights.
        folder: the cache, which several large models may share; None to compute the rows each time.
    """

    def __init__(self, plugged: PeftModel, pruned: PrunedModel, folder: str | Path | None = None):
        self.plugged, self.kept = plugged, pruned.kept[RESIDUAL]
        self.base: Any = plugged.get_base_model()
        self.stacks = [list(blocks) for _, blocks in stacks(self.base)]
        self.folder = None if folder is None else Path(folder)
        self.large = fingerprint(self.base.config, pruned)

    def __call__(self, batch: Mapping[str, Any]) -> list[Tensor]:  # of each stack: (layers, batch, length, d)
        """The states of a batch, encoder before decoder.

        Raises:
            ValueError: it is a step of generation, or a row is not cached and the large model has no weights.
        """
        inputs = self.inputs(batch)
        if self.folder is None:
            return self.run(inputs)
        parts = by_stack(inputs, batch.get("labels"))[: len(self.stacks)]
        real = [real_tokens(part) for part in parts]
        files = [
            list(self.files([select_rows(p, [i]) for p in parts], [tokens[i] for tokens in real]))
            for i in range(len(real[0]))
        ]
        missing = [i for i, of_row in enumerate(files) if not all(file.exists() for file in of_row)]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stack, states in enumerate(self.run(select_rows(inputs, missing))):
                for i, row in zip(missing, states.unbind(1), strict=True):
                    save_states(row[:, real[stack][i]], files[i][stack])
        return [load_states(of_stack, r) for of_stack, r in zip(zip(*files, strict=True), real, strict=True)]

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The large model's inputs: without labels, but with the decoder's inputs made from them."""
        for name in (*CACHES, "encoder_outputs"):
            rule = "must be None: a bridge with a ladder takes whole rows, and does not generate"
            check(name, type(batch.get(name)).__name__, batch.get(name) is None, rule)
        names = (*STACK_INPUTS, *(DECODER + name for name in STACK_INPUTS))
        inputs = {name: batch[name] for name in names if batch.get(name) is not None}
        shifted, labels = getattr(self.base, "prepare_decoder_input_ids_from_labels", None), batch.get("labels")
        if shifted and labels is not None and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            inputs["decoder_input_ids"] = shifted(labels)
        if {"input_ids", "decoder_input_ids"} <= inputs.keys():
            rows, answers = len(inputs["input_ids"]), len(inputs["decoder_input_ids"])
            rule = f"must be the number of rows of `input_ids` ({rows}); choices are scored with `packed=False`"
            check("len(decoder_input_ids)", answers, answers == rows, rule)
        return inputs

    def run(self, inputs: Mapping[str, Any]) -> list[Tensor]:  # of each stack: (layers, batch, length, d)
        """The large model's own forward, without its adapters and without gradients."""
        check_has_weights("plugged", self.base, "the ladder's cache lacks rows of the batch, or there is none")
        read: list[list[Tensor]] = [[] for _ in self.stacks]

        def recorder(inputs_of_stack: list[Tensor]) -> Any:
            def record(_: nn.Module, args: Any, kwargs: Any) -> None:
                states = hidden_states(args, kwargs)
                inputs_of_stack.append(states[..., self.kept.to(states.device)])

            return record

        handles = [block.register_forward_pre_hook(recorder(of_stack), with_kwargs=True)
                   for blocks, of_stack in zip(self.stacks, read, strict=True) for block in blocks]  # fmt: skip
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

    def files(self, parts: Sequence[Mapping[str, Any]], real_of_stack: Sequence[Tensor]) -> Iterator[Path]:
        """The files of one row, one for each stack; a decoder's name depends on the encoder's inputs too."""
        assert self.folder is not None
        hashed = hashlib.blake2b(self.large, digest_size=16)
        for part, real in zip(parts, real_of_stack, strict=True):
            if "position_ids" not in part:  # positions then count the padding on the left
                hashed.update(real.nonzero().cpu().numpy().tobytes())
            for name, value in part.items():
                for x in input_tensors(value):
                    x = x[0][..., real, :][..., real] if x.ndim == 4 else x[0][real]
                    hashed.update(name.encode() + bytes_of(x))
            yield self.folder / f"{hashed.hexdigest()}.safetensors"


def save_states(states: Tensor, file: Path) -> None:
    """Write the states of a row under a temporary name; the file gets its own when it is complete."""
    partial = file.with_name(f"partial-{file.name}")
    save_file({"states": states.cpu().contiguous()}, partial)
    partial.rename(file)


def load_states(files: Sequence[Path], real: Tensor) -> Tensor:  # shape: (layers, batch, length, d)
    """The states of rows as a batch, 0 at padding.

    Args:
        files: one for each row.
        real: False at padding, shape: (batch, length).
    """
    rows = [load_file(file)["states"].to(real.device) for file in files]
    batch = rows[0].new_zeros(len(rows[0]), *real.shape, rows[0].shape[-1])
    for i, states in enumerate(rows):
        batch[:, i, real[i]] = states
    return batch


def by_stack(inputs: Mapping[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
    """The inputs of the encoder, or of the only stack, and those of the decoder, by the same names."""
    first, second = (
        {name: inputs[start + name] for name in STACK_INPUTS if start + name in inputs} for start in ("", DECODER)
    )
    if second and labels is not None:  # tokens after the last label change nothing
        second.setdefault("attention_mask", (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0)
    return [first, second or first]  # T5 with a classifier gives its decoder the encoder's tokens


def input_tensors(value: Any) -> list[Tensor]:
    """The tensors of an input, which may have one for each kind of layer."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def select_rows(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch."""
    return {
        name: select_rows(value, rows) if isinstance(value, Mapping) else value[rows] for name, value in batch.items()
    }


def real_tokens(batch: Mapping[str, Any]) -> Tensor:  # shape: (batch, length), booleans
    """False at padding. Under a mask of queries by keys, a token is real if another sees it or it has a position."""
    ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    if "attention_mask" not in batch:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = input_tensors(batch["attention_mask"])[0]
    if mask.ndim == 2:
        return mask.bool()
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    others = visible & ~torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
    # padding may see a prompt, but has position 0
    real = others.any(1) | (batch["position_ids"] > 0 if "position_ids" in batch else others.any(2))
    return real | ~real.any(1, keepdim=True)


def fingerprint(config: Any, pruned: PrunedModel) -> bytes:
    """The digest of a large model and of the cached channels.

    It is computed from the config and the pruned copy, so a large model on the meta device has one too.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in IRRELEVANT_FIELDS}
    hashed = hashlib.blake2b(repr(sorted(fields.items())).encode())
    hashed.update(bytes_of(pruned.kept[RESIDUAL]))
    for parameter in pruned.model.parameters():
        hashed.update(bytes_of(parameter))
    return hashed.digest()


def bytes_of(x: Tensor) -> bytes:
    """The bytes of a tensor, which are the same on every device, unlike a sum."""
    return x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def check_has_weights(name: str, model: nn.Module, why: str) -> None:
    """Refuse a model on the meta device, which has no weights."""
    has_weights = not any(parameter.is_meta for parameter in model.parameters())
    check(name, type(model).__name__, has_weights, f"must have weights, and is on the meta device: {why}")
