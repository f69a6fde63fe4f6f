"""Log-probabilities of answer choices with each prompt read once, gradients included.

The plain way runs prompt and choice as one row for each choice, C (P + c) tokens for C choices. Here:

- a decoder reads all choices of an example behind one prompt, P + C c tokens. A mask keeps the choices from seeing
  each other, and each goes on at the position where the prompt ends;
- an encoder-decoder encodes the prompt once, and a hook in front of its decoder hands every choice a copy;
- the vocabulary is projected to from those columns alone that predict a token of a choice, the last token of the
  prompt among them, once for all choices.

The model is called as a whole, so whatever wraps it (peft, DistributedDataParallel, autocast) and whatever it does to
its logits stays in force. A model that cannot pack, or that the choices would see each other in, is run the plain way.
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
from hf_peft_ext.validation.checks import check

OWN_MASKS = {"gpt_neo", "moshi", "openai-gpt", "reformer", "xlm"}  # model types whose layers make their own masks
FROM_ENCODER = ("encoder_hidden_states", "encoder_attention_mask")  # what a decoder is handed

logger: Any = logging.get_logger(__name__)


def choice_token_scores(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    packed: bool | None = None,
) -> TokenScores:
    """What T-Few's losses and the ranking of choices read, a row for each choice of a batch.

    Args:
        model: a causal or sequence-to-sequence language model; with adapters and wrapped for training or not.
        batch: `prompt_ids`, `prompt_mask`, `choice_ids` and `example`, as `choices.collate` makes them.
        packed: whether prompts are read once; None for wherever the model can. Both ways give the same numbers.

    Raises:
        ValueError: `packed` is True and the model cannot, or a prompt or a choice has no tokens.
    """
    for name, seen in (("prompt_mask", batch["prompt_mask"]), ("choice_ids", batch["choice_ids"] != IGNORED)):
        empty = (~seen.bool().any(dim=1)).nonzero()[:, 0].tolist()
        check(name, empty, not empty, "has rows without a token")
    packed = packs(model, packed)
    if bare(model).config.is_encoder_decoder:
        return encoder_decoder(model, batch, shared=packed)
    return behind_one_prompt(model, batch) if packed else one_row_each(model, batch)


def packs(model: nn.Module, packed: bool | None) -> bool:
    """Whether prompts are read once: what `packed` says or, if it is None, wherever the model can.

    Raises:
        ValueError: `packed` is True and the model cannot.
    """
    reason = None if packed is False else why_not_packed(model)
    if reason is None:
        return packed is not False
    if packed:
        raise ValueError(f"`packed` (=True) is not possible: {reason}.")
    logger.warning_once(f"Each choice is run behind a copy of its prompt, which is slower: {reason}.")
    return False


def bare(model: nn.Module) -> Any:
    """The transformers model inside what has wrapped it."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def why_not_packed(model: nn.Module) -> str | None:
    """What keeps a model from reading a prompt once for all its choices; None if nothing does."""
    tuner, base = extract_model_from_parallel(model), bare(model)
    config, name = base.config.get_text_config(decoder=True), type(base).__name__
    adapter: Any = tuner.active_peft_config if isinstance(tuner, PeftModel) else None
    if adapter is not None and adapter.is_prompt_learning:
        return f"{adapter.peft_type.value} puts tokens of its own in front of the prompt"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "activated LoRA begins at a place of its own in each text"
    if base.config.is_encoder_decoder:
        known = inspect.signature(base.get_decoder().forward).parameters
        return None if all(name in known for name in FROM_ENCODER) else f"{name}'s decoder has no {FROM_ENCODER[1]}"
    if "position_ids" not in inspect.signature(type(base).forward).parameters or getattr(config, "alibi", False):
        return f"{name} takes positions from the order of the tokens"
    if config.model_type in OWN_MASKS:
        return f"the layers of {name} make their own masks"
    if config._attn_implementation not in KERNELS:
        return f"attention '{config._attn_implementation}' takes no mask of blocks, 'sdpa' and 'eager' do"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    said = {module.is_causal for module in base.get_decoder().modules() if hasattr(module, "is_causal")}
    if False in said or not (said or getattr(config, "is_decoder", True)):
        return f"{name} lets tokens see those behind them"
    if base._is_stateful or kinds or getattr(config, "attention_chunk_size", None):
        return f"{name} has layers that are no plain attention"
    acting = (sublayer for layer in tuner_layers(base) for sublayer in layer.active_here.values())
    if any(getattr(getattr(sublayer, "gate", None), "pooling", "token") != "token" for sublayer in acting):
        return "gates that are means over tokens would see the other choices; `gate_pooling='token'` would not"
    return None


def behind_one_prompt(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenScores:
    """A decoder, with a row for each example: its prompt, then its choices one behind the other."""
    prompt, seen = aligned(batch, "right")
    choice_ids, example = batch["choice_ids"], batch["example"]
    counts = choice_ids != IGNORED
    read = counts.sum(1) - 1  # the last token of a choice is predicted and never read
    earlier = (example == example.unsqueeze(1)).tril(-1)
    start = (earlier * read).sum(1)  # shape: (rows,): where a choice begins behind the prompt
    more = int((start + read).max())

    columns = torch.arange(choice_ids.shape[1], device=choice_ids.device)
    row, t = (columns < read.unsqueeze(1)).nonzero(as_tuple=True)
    place = example[row], prompt.shape[1] + start[row] + t
    ids, owner = F.pad(prompt, (0, more)), F.pad(seen - 1, (0, more), value=-1)
    position = F.pad(seen.cumsum(1).sub(1).clamp_min(0), (0, more))
    ids[place], owner[place] = choice_ids[row, t], row + 1
    position[place] = seen.sum(1)[example][row] + t

    masks = block_masks(bare(model), owner, position)
    logits = last_logits(model, more + 1, input_ids=ids, attention_mask=masks, position_ids=position)
    row, t = counts.nonzero(as_tuple=True)
    return scores_at(logits, example[row], torch.where(t == 0, 0, start[row] + t), choice_ids)


def one_row_each(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenScores:
    """A decoder, the plain way: a row for each choice, behind a copy of its prompt. Padding is behind both, where no
    token sees it.
    """
    prompt, seen = aligned(batch, "left")
    choice_ids, example = batch["choice_ids"], batch["example"]
    counts, start = choice_ids != IGNORED, seen.sum(1)[batch["example"]]
    read = counts.sum(1) - 1
    length = int((start + read).max())

    columns = torch.arange(choice_ids.shape[1], device=choice_ids.device)
    row, t = (columns < read.unsqueeze(1)).nonzero(as_tuple=True)
    ids = F.pad(prompt, (0, length - prompt.shape[1]))[example]
    ids[row, start[row] + t] = choice_ids[row, t]
    mask = torch.arange(length, device=ids.device) < (start + read).unsqueeze(1)
    first = int(start.min()) - 1
    logits = last_logits(model, length - first, input_ids=ids, attention_mask=mask.long())
    row, t = counts.nonzero(as_tuple=True)
    return scores_at(logits, row, start[row] - 1 + t - first, choice_ids)


def encoder_decoder(model: nn.Module, batch: Mapping[str, Tensor], shared: bool) -> TokenScores:
    """An encoder-decoder: the choices in the decoder, each behind the token that it starts with."""
    prompt, seen = aligned(batch, "left")
    choice_ids, example, base = batch["choice_ids"], batch["example"], bare(model)
    counts = choice_ids != IGNORED
    ids = F.pad(choice_ids[:, :-1].clamp_min(0), (1, 0), value=base.config.decoder_start_token_id)
    inputs = {"decoder_input_ids": ids, "decoder_attention_mask": counts.long(), "use_cache": False}
    row, t = counts.nonzero(as_tuple=True)
    if not shared:
        logits = model(input_ids=prompt[example], attention_mask=seen[example], **inputs).logits
        return scores_at(logits, row, t, choice_ids)

    def copied(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, **{name: kwargs[name][example] for name in FROM_ENCODER}}

    handle = base.get_decoder().register_forward_pre_hook(copied, with_kwargs=True, prepend=True)
    try:
        logits = model(input_ids=prompt, attention_mask=seen, **inputs).logits
    finally:
        handle.remove()
    return scores_at(logits, row, t, choice_ids)


def aligned(batch: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, the tokens of each at the left or at the right, without columns of padding alone."""
    seen = batch["prompt_mask"].long()
    order = seen.sort(dim=1, descending=side == "left", stable=True).indices
    length = int(seen.sum(1).max())
    columns = slice(0, length) if side == "left" else slice(seen.shape[1] - length, None)
    return batch["prompt_ids"].gather(1, order)[:, columns], seen.gather(1, order)[:, columns]


def block_masks(
    base: Any,
    owner: Tensor,  # shape: (examples, length): 0 in the prompt, another number for each choice, -1 at padding
    position: Tensor,  # shape: (examples, length)
) -> Tensor | dict[str, Tensor]:  # shape: (examples, 1, length, length); by kind of layer if the model has kinds
    """A token sees itself and, of the prompt and of its own choice, what is before it; no further back than the window
    in layers that have one.
    """
    config = base.config.get_text_config(decoder=True)
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    key, query = owner.unsqueeze(1), owner.unsqueeze(2)
    full = (((key == 0) | (key == query)) & (key >= 0)).tril()
    near = full if window is None else full & (position.unsqueeze(2) - position.unsqueeze(1) < window)
    if kinds is None:
        return as_mask(near, base)
    if "sliding_attention" not in kinds:
        return as_mask(full, base)
    return {kind: as_mask(near if kind == "sliding_attention" else full, base) for kind in set(kinds)}


def as_mask(
    seen: Tensor,  # shape: (examples, length, length)
    base: Any,
) -> Tensor:  # shape: (examples, 1, length, length)
    """What the model's attention takes: booleans, or numbers where it adds masks to scores."""
    seen = (seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)).unsqueeze(1)  # padding sees itself
    if base.config.get_text_config(decoder=True)._attn_implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=base.dtype).masked_fill(~seen, torch.finfo(base.dtype).min)


def last_logits(model: nn.Module, columns: int, **inputs: Any) -> Tensor:  # shape: (rows, columns, vocab)
    """The logits of the last columns; the model projects no others to the vocabulary, if it has a way not to."""
    if "logits_to_keep" in inspect.signature(type(bare(model)).forward).parameters:
        inputs["logits_to_keep"] = columns
    return model(**inputs, use_cache=False).logits[:, -columns:]


def scores_at(
    logits: Tensor,  # shape: (batch, columns, vocab)
    batch_index: Tensor,  # shape: (tokens,)
    column: Tensor,  # shape: (tokens,)
    choice_ids: Tensor,  # shape: (rows, length)
) -> TokenScores:
    """The scores of the tokens of all choices, in order, each predicted at a place of its own or at a shared one."""
    counts = choice_ids != IGNORED
    tokens = token_scores(logits[batch_index, column].unsqueeze(1), choice_ids[counts].unsqueeze(1))
    return tokens._replace(row=counts.nonzero()[:, 0], rows=len(choice_ids))
