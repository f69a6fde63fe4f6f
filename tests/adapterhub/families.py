"""Tiny models of AdapterHub's families, alike under transformers 4.57 and 5: weights are drawn by parameter name."""

import zlib
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

VOCAB, D, HEADS = 24, 16, 2
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
PLAIN = {"hidden_size": D, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": HEADS}
STACKS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "d_model": D}
BART = {**STACKS, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "decoder_start_token_id": 2}
GROUPED = {**PLAIN, "num_attention_heads": 4, "num_key_value_heads": 2}
IMAGE = {**PLAIN, "image_size": 8, "patch_size": 4, "num_channels": 1}
DEBERTA = {**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
T5 = {"d_model": D, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}  # fmt: skip
BERT = {"model_type": "bert", **SPECIAL, **PLAIN}

FAMILIES = {
    "bert": (AutoModelForMaskedLM, PLAIN),
    "roberta": (AutoModelForMaskedLM, PLAIN),
    "distilbert": (AutoModelForMaskedLM, {"dim": D, "hidden_dim": 20, "n_layers": 2, "n_heads": HEADS}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": D, "n_layer": 2, "n_head": HEADS, "n_positions": 16}),
    "llama": (AutoModelForCausalLM, GROUPED),
    "t5": (AutoModelForSeq2SeqLM, T5),
    "bart": (AutoModelForSeq2SeqLM, BART),
}
# Families with fewer fixtures: the names of their modules differ, the methods do not.
MORE_FAMILIES = {
    "albert": (AutoModelForMaskedLM, {**PLAIN, "embedding_size": 8}),
    "beit": (AutoModelForImageClassification, IMAGE),
    "bert-generation": (AutoModelForCausalLM, {**PLAIN, "is_decoder": True, "use_cache": False}),
    "clip": (AutoModel, {"text_config": {**SPECIAL, **PLAIN}, "vision_config": IMAGE, "projection_dim": D}),
    "clip_text_model": (AutoModel, PLAIN),
    "clip_vision_model": (AutoModel, IMAGE),
    "deberta": (AutoModelForMaskedLM, DEBERTA),
    "deberta-v2": (AutoModelForMaskedLM, DEBERTA),
    "electra": (AutoModelForMaskedLM, {**PLAIN, "embedding_size": 8}),
    "encoder-decoder": (
        AutoModelForSeq2SeqLM,
        {"encoder": BERT, "decoder": {**BERT, "is_decoder": True, "add_cross_attention": True}},
    ),
    "gptj": (
        AutoModelForCausalLM,
        {"n_embd": D, "n_layer": 2, "n_head": HEADS, "n_positions": 16, "n_inner": 20, "rotary_dim": 4},
    ),
    "mbart": (AutoModelForSeq2SeqLM, BART),
    "mistral": (AutoModelForCausalLM, GROUPED),
    "mt5": (AutoModel, T5),  # its head is tied in transformers 5 only
    "plbart": (AutoModelForSeq2SeqLM, BART),
    "vit": (AutoModelForImageClassification, IMAGE),
    "whisper": (
        AutoModelForSpeechSeq2Seq,
        {**BART, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16},
    ),
    "xlm-roberta": (AutoModelForMaskedLM, PLAIN),
}
SEQ2SEQ = {"t5", "bart", "mt5", "mbart", "plbart", "encoder-decoder", "whisper"}


def build(family: str, attention: str = "eager", auto: Any = None, **changes: Any) -> nn.Module:
    """The tiny model of a family, by default with the head of `FAMILIES`.

    Args:
        family: its name.
        attention: its implementation.
        auto: an auto class for another head.
        changes: fields of the config, such as `num_labels`.
    """
    usual, overrides = (FAMILIES | MORE_FAMILIES)[family]
    nested = family in ("clip", "encoder-decoder")
    config = AutoConfig.for_model(family, **deepcopy(overrides) if nested else {**SPECIAL, **overrides, **changes})
    model = (auto or usual).from_config(config, attn_implementation=attention)
    names = saved_names(model) if family in ("beit", "clip_text_model", "clip_vision_model", "vit") else {}
    fill({names.get(name, name): parameter for name, parameter in model.named_parameters()}, 0.35)
    return model.eval()


def saved_names(model: nn.Module) -> dict[str, str]:
    """Parameter -> its name in a saved checkpoint, where that of transformers 4.57 is kept."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # 4.57
        return {}
    names = {name: name for name, _ in model.named_parameters()}
    for renaming in reversed(get_model_conversion_mapping(model, add_legacy=False)):
        back = renaming.reverse_transform()
        names = {name: back.rename_source_key(saved)[0] for name, saved in names.items()}
    return names


def fill(parameters: dict[str, Tensor], std: float) -> None:
    """Draw every parameter from a generator seeded with its name. The scales of norms lie around 1."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            # of the tied names, transformers 5 lists another one first
            name = name.replace("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = any(word in name.lower() for word in SCALES)
            wide = (
                3 if name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")) else 1
            )  # large logits
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std * wide + scale)


SCALES = (
    *("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"),
    *("norm1.weight", "norm2.weight", "norm_before.weight", "norm_after.weight", "layrnorm.weight", "lambda"),
)


def batch(family: str) -> dict[str, Tensor]:
    """Three rows, the second with padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    pixels = {"pixel_values": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))}
    if family in ("beit", "clip_vision_model", "vit"):
        return pixels
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "whisper":
        inputs = {"input_features": torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2))}
    if family in SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 5), generator=generator)
    return inputs | (pixels if family == "clip" else {})


@torch.no_grad()
def outputs(model: nn.Module, family: str) -> Tensor:
    """The logits of a model for its batch, or its last hidden states if it has no head."""
    result = model(**batch(family))
    if family == "clip":
        towers = (result.text_model_output, result.vision_model_output)
        return torch.cat([tower.last_hidden_state.flatten() for tower in towers])
    return (result.logits if "logits" in result else result.last_hidden_state).contiguous()
