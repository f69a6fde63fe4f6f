"""Tiny models of AdapterHub's families, alike under transformers 4.57 and 5: weights are drawn by parameter name."""

import zlib

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

VOCAB, D, HEADS = 24, 16, 2
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
PLAIN = {"hidden_size": D, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": HEADS}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "d_model": D}

FAMILIES = {
    "bert": (AutoModelForMaskedLM, PLAIN),
    "roberta": (AutoModelForMaskedLM, PLAIN),
    "distilbert": (AutoModelForMaskedLM, {"dim": D, "hidden_dim": 20, "n_layers": 2, "n_heads": HEADS}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": D, "n_layer": 2, "n_head": HEADS, "n_positions": 16}),
    "llama": (AutoModelForCausalLM, {**PLAIN, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": D, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
    ),
    "bart": (
        AutoModelForSeq2SeqLM,
        {**BART, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "decoder_start_token_id": 2},
    ),
}  # fmt: skip


def build(family: str, attention: str = "eager") -> nn.Module:
    """The tiny model of a family."""
    auto, overrides = FAMILIES[family]
    config = AutoConfig.for_model(family, **{**SPECIAL, **overrides})
    model = auto.from_config(config, attn_implementation=attention)
    fill(dict(model.named_parameters()), 0.35)
    return model.eval()


def fill(parameters: dict[str, Tensor], std: float) -> None:
    """Draw every parameter from a generator seeded with its name. The scales of norms lie around 1."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = any(word in name.lower() for word in ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
            wide = (
                3 if name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")) else 1
            )  # large logits
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std * wide + scale)


def batch(family: str) -> dict[str, Tensor]:
    """Three rows, the second with padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 5), generator=generator)
    return inputs
