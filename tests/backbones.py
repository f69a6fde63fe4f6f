"""Tiny models of many families, built from configs; a row each. Every row runs the whole contract."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

VOCAB, D, HEADS, LAYERS = 60, 32, 4, 2
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
ENCODER_DECODER = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64}


@dataclass(frozen=True)
class Backbone:
    """A family of models.

    Args:
        kind: "encoder", "decoder" or "seq2seq".
        model_type: transformers' name of it.
        config: what makes it tiny.
    """

    kind: str
    model_type: str
    config: dict[str, Any]

    def build(self, attention: str | None = None, **overrides: Any) -> nn.Module:
        """A model with weights large enough that every part matters; the same at every call."""
        auto = {"encoder": AutoModel, "decoder": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[self.kind]
        config = AutoConfig.for_model(self.model_type, **{"vocab_size": VOCAB, **SPECIAL, **self.config, **overrides})
        torch.manual_seed(0)
        if self.model_type in ("gemma2", "bloom"):
            attention = "eager"  # sdpa cannot cap scores, and BLOOM knows nothing else
        model = auto.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
        return model.eval()

    def inputs(self, batch: int = 3, length: int = 9, padding: str = "right") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if padding == "right":
            mask[1, length - 3 :] = 0
        elif padding == "left":
            mask[1, :3] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length - 2), generator=generator)
        return inputs


def output(model: Callable[..., Any], inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits, or the last hidden states where there is no head."""
    result = model(**inputs, **kwargs)
    return result.logits if "logits" in result else result.last_hidden_state


BACKBONES = {
    "bert": Backbone("encoder", "bert", PLAIN),
    "roberta": Backbone("encoder", "roberta", PLAIN),
    "electra": Backbone("encoder", "electra", {**PLAIN, "embedding_size": D}),
    "distilbert": Backbone(
        "encoder", "distilbert", {"dim": D, "hidden_dim": 64, "n_layers": LAYERS, "n_heads": HEADS}
    ),
    "modernbert": Backbone(
        "encoder", "modernbert", {**PLAIN, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}
    ),
    "t5": Backbone(
        "seq2seq",
        "t5",
        {"d_model": D, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": HEADS, "decoder_start_token_id": 0},
    ),
    "bart": Backbone(
        "seq2seq",
        "bart",
        {
            **ENCODER_DECODER,
            **{"d_model": D, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "decoder_ffn_dim": 64},
            **{"decoder_start_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 64},
        },
    ),
    "gpt2": Backbone("decoder", "gpt2", {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}),
    "gpt_neox": Backbone("decoder", "gpt_neox", PLAIN),
    "opt": Backbone(
        "decoder",
        "opt",
        {
            **{"hidden_size": D, "ffn_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
            **{"word_embed_proj_dim": D, "max_position_embeddings": 64},
        },
    ),
    "llama": Backbone("decoder", "llama", {**PLAIN, "num_key_value_heads": 2}),
    "qwen2": Backbone("decoder", "qwen2", {**PLAIN, "num_key_value_heads": 2}),
    "gemma2": Backbone(
        "decoder",
        "gemma2",
        {**PLAIN, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    "mistral": Backbone("decoder", "mistral", {**PLAIN, "num_key_value_heads": 2, "sliding_window": 4}),
    "albert": Backbone(
        "encoder", "albert", {**PLAIN, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": LAYERS}
    ),
    "falcon": Backbone(
        "decoder",
        "falcon",
        {
            **{"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_kv_heads": 2},
            **{"new_decoder_architecture": True, "ffn_hidden_size": 64},
        },
    ),
    "bloom": Backbone("decoder", "bloom", {"hidden_size": D, "n_layer": LAYERS, "n_head": HEADS}),
    "deepseek_v3": Backbone(
        "decoder",
        "deepseek_v3",
        {
            **{**PLAIN, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4},
            **{"qk_nope_head_dim": 6, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4},
            **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
            **{"first_k_dense_replace": 1, "head_dim": 4},
        },
    ),
}

GROUPED = {**PLAIN, "num_key_value_heads": 2, "num_hidden_layers": 4}
LINEAR = {
    **{**GROUPED, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HALF = ["linear_attention", "full_attention"] * 2
# Models of which some layers, or all, mix tokens by other means than softmax attention. Those of them that this
# version of transformers has.
HYBRIDS = {
    "qwen3_next": Backbone(
        "decoder", "qwen3_next", {**LINEAR, **SPARSE, "shared_expert_intermediate_size": 32, "layer_types": HALF}
    ),
    "qwen3_5": Backbone("decoder", "qwen3_5_text", LINEAR),
    "bamba": Backbone("decoder", "bamba", {**GROUPED, **MAMBA, "attn_layer_indices": [1, 3]}),
    "jamba": Backbone(
        "decoder",
        "jamba",
        {
            **{**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
            **{"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        },
    ),
    "kimi_linear": Backbone(
        "decoder",
        "kimi_linear",
        {
            **{**GROUPED, **SPARSE, "num_key_value_heads": HEADS, "layer_types": HALF, "num_experts_per_token": 2},
            **{"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "head_dim": 8},
            **{"linear_head_dim": 8, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"] * 2},
        },
    ),
    "granite_hybrid": Backbone(
        "decoder",
        "granitemoehybrid",
        {
            **{**GROUPED, **MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
            "layer_types": HALF,
        },
    ),
    "lfm2": Backbone("decoder", "lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"] * 2}),
    "falcon_h1": Backbone("decoder", "falcon_h1", {**GROUPED, **MAMBA, "mamba_d_ssm": 64}),
    "nemotron_h": Backbone(
        "decoder",
        "nemotron_h",
        {
            **{"hidden_size": D, "intermediate_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": 2},
            **{"head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2},
            **{"chunk_size": 16, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        },
    ),
    "recurrent_gemma": Backbone(
        "decoder",
        "recurrent_gemma",
        {**GROUPED, "lru_width": D, "head_dim": 8, "block_types": ["recurrent", "attention"]},
    ),
    "zamba2": Backbone(
        "decoder",
        "zamba2",
        {
            **{**GROUPED, "num_key_value_heads": HEADS, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8},
            **{"chunk_size": 16, "attention_head_dim": 16, "kv_channels": 8, "num_query_groups": HEADS},
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
        },
    ),
    "mamba": Backbone("decoder", "mamba", {"hidden_size": D, "num_hidden_layers": 3, "state_size": 8}),
    "mamba2": Backbone(
        "decoder",
        "mamba2",
        {
            **{"hidden_size": D, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8, "head_dim": 8},
            **{"n_groups": 2, "chunk_size": 16},
        },
    ),
    "rwkv": Backbone(
        "decoder",
        "rwkv",
        {"hidden_size": D, "num_hidden_layers": 3, "attention_hidden_size": D, "intermediate_size": 64},
    ),
}
HYBRIDS = {name: family for name, family in HYBRIDS.items() if family.model_type in CONFIG_MAPPING}
