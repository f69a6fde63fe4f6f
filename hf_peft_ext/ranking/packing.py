"""Log-probabilities of answer choices, with gradients; each prompt is read once.

Without packing, each choice is a row after its own copy of the prompt: C (P + c) tokens for C choices of c tokens and
a prompt of P. With packing:

- A decoder reads all choices of an example after one prompt, P + C c tokens. A mask separates the choices, and the
  positions of each continue those of the prompt.
- An encoder-decoder encodes the prompt once. A hook before its decoder repeats the encoder's output for every choice.
- Only positions that predict a token of a choice are projected to the vocabulary; the last token of the prompt is
  projected once for all choices.

The whole model is called, so wrappers (peft, DistributedDataParallel, autocast) and changes to its logits still apply.
Models that cannot separate the choices run without packing.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from hf_peft_ext.attach.attention import KERNELS
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.ranking.losses import IGNORED, TokenScores, token_scores
from hf_peft_ext.sublayers import Intervention
from hf_peft_ext.validation.checks import check

OWN_MASKS = {"gpt_neo", "moshi", "openai-gpt", "reformer", "xlm"}  # model types whose layers build their own masks
FROM_ENCODER = ("encoder_hidden_states", "encoder_attention_mask")  # a decoder's inputs, repeated for each choice

logger: Any = logging.get_logger(__name__)


def choice_token_scores(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    packed: bool | None = None,
) -> TokenScores:
    """Log-probabilities for T-Few's losses and for ranking, a row for each choice of a batch.

    Args:
        model: a causal or sequence-to-sequence language model; with or without adapters and wrappers for training.
        batch: `prompt_ids`, `prompt_mask`, `choice_ids` and `example`, from `encode.collate`.
        packed: whether prompts are read once; None if the model can do so. The results are equal.

    Raises:
        ValueError: `packed` is True and the model cannot pack, or a prompt or a choice has no tokens.
    """
    for name, mask in (("prompt_mask", batch["prompt_mask"]), ("choice_ids", batch["choice_ids"] != IGNORED)):
        empty = (~mask.bool().any(dim=1)).nonzero()[:, 0].tolist()
        check(name, empty, not empty, "has rows without a token")
    packed = packs(model, packed)
    if bare(model).config.is_encoder_decoder:
        return encoder_decoder(model, batch, shared=packed)
    return behind_one_prompt(model, batch) if packed else one_row_each(model, batch)


def packs(model: nn.Module, packed: bool | None) -> bool:
    """Whether prompts are read once: `packed`, or if it is None whether the model can do so.

    Raises:
        ValueError: `packed` is True and the model cannot pack.
    """
    reason = None if packed is False else why_not_packed(model)
    if reason is None:
        return packed is not False
    if packed:
        raise ValueError(f"`packed` (=True) is not possible: {reason}.")
    logger.warning_once(f"Each choice is run with its own copy of the prompt, which is slower: {reason}.")
    return False


def bare(model: nn.Module) -> Any:
    """The transformers model inside its wrappers."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def why_not_packed(model: nn.Module) -> str | None:
    """The reason why a model cannot read a prompt once for all its choices; None if it can."""
    tuner, base = extract_model_from_parallel(model), bare(model)
    config, name = base.config.get_text_config(decoder=True), type(base).__name__
    adapter: Any = tuner.active_peft_config if isinstance(tuner, PeftModel) else None
    if adapter is not None and adapter.is_prompt_learning:
        return f"{adapter.peft_type.value} inserts tokens before the prompt"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "activated LoRA begins at a different position in each text"
    if base.config.is_encoder_decoder:
        parameters = inspect.signature(base.get_decoder().forward).parameters
        takes_both = all(argument in parameters for argument in FROM_ENCODER)
        return None if takes_both else f"{name}'s decoder has no {FROM_ENCODER[1]}"
    if "position_ids" not in inspect.signature(type(base).forward).parameters or getattr(config, "alibi", False):
        return f"{name} derives positions from the order of the tokens"
    if config.model_type in OWN_MASKS:
        return f"the layers of {name} build their own masks"
    if config._attn_implementation not in KERNELS:
        return f"attention '{config._attn_implementation}' accepts no block mask; 'sdpa' and 'eager' do"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    causal = {module.is_causal for module in base.get_decoder().modules() if hasattr(module, "is_causal")}
    if False in causal or not (causal or getattr(config, "is_decoder", True)):
        return f"{name} lets tokens attend to later ones"
    if base._is_stateful or kinds or getattr(config, "attention_chunk_size", None):
        return f"{name} has layers other than full or sliding attention"
    active = [sublayer for layer in tuner_layers(base) for sublayer in layer.active_here.values()]
    if any(isinstance(sublayer, Intervention) for sublayer in active):
        return "interventions count the tokens of a row, in which the choices follow one another"
    if any(getattr(getattr(sublayer, "gate", None), "pooling", "token") != "token" for sublayer in active):
        return "gates that average over tokens would include other choices; `gate_pooling='token'` would not"
    return None


def behind_one_prompt(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenScores:
    """Run a decoder with a row for each example: its prompt, then all its choices."""
    prompt, mask = aligned(batch, "right")  # (examples, P), twice
    choice_ids, example = batch["choice_ids"], batch["example"]
    labelled = choice_ids != IGNORED  # (rows, c)
    n_inputs = labelled.sum(1) - 1  # (rows,): the last token of a choice is predicted, but is no input
    earlier = (example == example.unsqueeze(1)).tril(-1)  # (rows, rows)
    start = (earlier * n_inputs).sum(1)  # (rows,): where a choice begins after the prompt
    more = int((start + n_inputs).max())

    columns = torch.arange(choice_ids.shape[1], device=choice_ids.device)
    row, t = (columns < n_inputs.unsqueeze(1)).nonzero(as_tuple=True)  # (tokens,), twice
    index = example[row], prompt.shape[1] + start[row] + t
    ids, owner = F.pad(prompt, (0, more)), F.pad(mask - 1, (0, more), value=-1)  # (examples, length)
    position = F.pad(mask.cumsum(1).sub(1).clamp_min(0), (0, more))  # (examples, length)
    ids[index], owner[index] = choice_ids[row, t], row + 1
    position[index] = mask.sum(1)[example][row] + t

    masks = block_masks(bare(model), owner, position)
    logits = last_logits(model, more + 1, input_ids=ids, attention_mask=masks, position_ids=position)
    row, t = labelled.nonzero(as_tuple=True)
    return scores_at(logits, example[row], torch.where(t == 0, 0, start[row] + t), choice_ids)


def one_row_each(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenScores:
    """Run a decoder with a row for each choice: a copy of its prompt, then the choice, then padding."""
    prompt, prompt_mask = aligned(batch, "left")  # (examples, P), twice
    choice_ids, example = batch["choice_ids"], batch["example"]
    labelled, start = choice_ids != IGNORED, prompt_mask.sum(1)[example]  # (rows, c), (rows,)
    n_inputs = labelled.sum(1) - 1  # (rows,): the last token of a choice is predicted, but is no input
    length = int((start + n_inputs).max())

    columns = torch.arange(choice_ids.shape[1], device=choice_ids.device)
    row, t = (columns < n_inputs.unsqueeze(1)).nonzero(as_tuple=True)  # (tokens,), twice
    ids = F.pad(prompt, (0, length - prompt.shape[1]))[example]  # (rows, length)
    ids[row, start[row] + t] = choice_ids[row, t]
    mask = torch.arange(length, device=ids.device) < (start + n_inputs).unsqueeze(1)  # (rows, length)
    first = int(start.min()) - 1
    logits = last_logits(model, length - first, input_ids=ids, attention_mask=mask.long())
    row, t = labelled.nonzero(as_tuple=True)
    return scores_at(logits, row, start[row] - 1 + t - first, choice_ids)


def encoder_decoder(model: nn.Module, batch: Mapping[str, Tensor], shared: bool) -> TokenScores:
    """Run an encoder-decoder; its decoder reads each choice after the start token.

    Args:
        shared: whether each prompt is encoded once for all its choices.
    """
    prompt, mask = aligned(batch, "left")  # (examples, P), twice
    choice_ids, example, base = batch["choice_ids"], batch["example"], bare(model)
    labelled = choice_ids != IGNORED  # (rows, c)
    ids = F.pad(choice_ids[:, :-1].clamp_min(0), (1, 0), value=base.config.decoder_start_token_id)
    inputs = {"decoder_input_ids": ids, "decoder_attention_mask": labelled.long(), "use_cache": False}
    row, t = labelled.nonzero(as_tuple=True)  # (tokens,), twice
    if not shared:
        logits = model(input_ids=prompt[example], attention_mask=mask[example], **inputs).logits
        return scores_at(logits, row, t, choice_ids)

    def repeat(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, **{name: kwargs[name][example] for name in FROM_ENCODER}}

    handle = base.get_decoder().register_forward_pre_hook(repeat, with_kwargs=True, prepend=True)
    try:
        logits = model(input_ids=prompt, attention_mask=mask, **inputs).logits
    finally:
        handle.remove()
    return scores_at(logits, row, t, choice_ids)


def aligned(batch: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor]:  # shapes: (examples, length), twice
    """Prompts and their mask, with the tokens at the left or at the right, without columns of padding only."""
    mask = batch["prompt_mask"].long()
    order = mask.sort(dim=1, descending=side == "left", stable=True).indices
    length = int(mask.sum(1).max())
    columns = slice(0, length) if side == "left" else slice(mask.shape[1] - length, None)
    return batch["prompt_ids"].gather(1, order)[:, columns], mask.gather(1, order)[:, columns]


def block_masks(
    base: Any,
    owner: Tensor,  # shape: (examples, length): 0 in the prompt, another number for each choice, -1 at padding
    position: Tensor,  # shape: (examples, length)
) -> Tensor | dict[str, Tensor]:  # shape: (examples, 1, length, length)
    """Masks in which a token attends to itself and to earlier tokens of the prompt and of its own choice.

    Layers with sliding attention attend only to tokens inside their window. If the config has `layer_types`, the
    result has a mask for each type.
    """
    config = base.config.get_text_config(decoder=True)
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    key, query = owner.unsqueeze(1), owner.unsqueeze(2)  # (examples, 1, length), (examples, length, 1)
    full = (((key == 0) | (key == query)) & (key >= 0)).tril()  # (examples, length, length)
    near = full if window is None else full & (position.unsqueeze(2) - position.unsqueeze(1) < window)
    if types is None:
        return as_mask(near, base)
    if "sliding_attention" not in types:
        return as_mask(full, base)
    return {name: as_mask(near if name == "sliding_attention" else full, base) for name in set(types)}


def as_mask(
    visible: Tensor,  # shape: (examples, length, length)
    base: Any,
) -> Tensor:  # shape: (examples, 1, length, length)
    """The mask as the model's attention reads it: boolean, or additive for "eager"."""
    diagonal = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)  # padding attends to itself
    visible = (visible | diagonal).unsqueeze(1)
    if base.config.get_text_config(decoder=True)._attn_implementation != "eager":
        return visible
    return torch.zeros_like(visible, dtype=base.dtype).masked_fill(~visible, torch.finfo(base.dtype).min)


def last_logits(model: nn.Module, columns: int, **inputs: Any) -> Tensor:  # shape: (rows, columns, vocab)
    """The logits of the last columns. If the model supports it, no others are projected to the vocabulary."""
    if "logits_to_keep" in inspect.signature(type(bare(model)).forward).parameters:
        inputs["logits_to_keep"] = columns
    return model(**inputs, use_cache=False).logits[:, -columns:]


def scores_at(
    logits: Tensor,  # shape: (batch, columns, vocab)
    batch_index: Tensor,  # shape: (tokens,)
    column: Tensor,  # shape: (tokens,)
    choice_ids: Tensor,  # shape: (rows, length)
) -> TokenScores:
    """The scores of the tokens of all choices.

    Args:
        batch_index, column: the position in `logits` that predicts each token; tokens may share one.
    """
    labelled = choice_ids != IGNORED
    tokens = token_scores(logits[batch_index, column].unsqueeze(1), choice_ids[labelled].unsqueeze(1))
    return tokens._replace(row=labelled.nonzero()[:, 0], rows=len(choice_ids))
