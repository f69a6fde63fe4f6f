"""On which architectures of transformers do UniPELT and stock LoRA work with their default settings?

Builds a tiny random model for every causal-LM, sequence-to-sequence and sequence-classification head that transformers
has, adapts it, and checks that the adapter acts, that all of it is trained, and that the base model is itself again
once the adapter is disabled.

    python examples/benchmarks/architectures.py                  # all, about ten minutes on one core
    python examples/benchmarks/architectures.py --types llama t5  # some of them
"""

import argparse
import contextlib
import io
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

from hf_peft_ext import UniPELTConfig

HEADS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
METHODS = {"LoRA": LoraConfig, "UniPELT": UniPELTConfig}
VOCABULARY = 160
LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers".split()
EXTRAS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
}
LARGEST = 20_000_000  # parameters; what stays larger than that is not small

# What a tiny model has, under the names that configs have for it.
SIZES: dict[int, str] = {
    2: "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_topk "
       "num_experts_per_token moe_num_shared_experts n_shared_experts num_shared_experts linear_num_key_heads "
       "swa_num_key_value_heads topk_group n_group index_n_heads n_groups mamba_n_groups num_hash_functions",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads swa_num_attention_heads "
       "num_attention_groups time_step_rank mamba_dt_rank index_topk linear_num_heads",
    8: "head_dim d_kv d_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
       "swa_head_dim mamba_d_head mamba_d_state state_size index_head_dim rotary_dim mamba_n_heads kv_channels "
       "linear_head_dim hidden_size_per_layer_input attention_head_size ssm_state_size",
    16: "kv_lora_rank q_lora_rank qk_head_dim embedding_size mamba_chunk_size block_size chunk_size n_hash",
    32: "hidden_size d_model n_embd emb_dim dim embed_dim model_dim pooler_hidden_size lru_width attention_hidden_size "
        "width hidden_dim",
    64: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size d_inner "
        "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size image_size num_mel_bins",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_sequence_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}  # fmt: skip


@dataclass
class Result:
    """What came of one head."""

    head: str
    model_type: str
    of: dict[str, str]  # method -> "" if it works, else why not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", help="model types; all by default")
    parser.add_argument("--unbuilt", action="store_true", help="list the heads that no small model could be built of")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results, unbuilt = [], {}
    for head, names in HEADS.items():
        for model_type, class_name in names.items():
            if args.types and model_type not in args.types:
                continue
            try:
                model = tiny(model_type, class_name)
            except Exception as error:
                unbuilt[head, model_type] = reason(error)
                continue
            results.append(Result(head, model_type, {name: tried(model_type, class_name, config, head) for name, config in METHODS.items()}))
            r = results[-1]
            print(head, model_type, r.of, flush=True)
            del model
    for k, v in unbuilt.items():
        print("UNBUILT", k, v)
    for name in METHODS:
        print(name, sum(not r.of[name] for r in results), len(results))


def shrunk(config: PretrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a small config of the same class."""
    own = vars(config)
    values = {name: size for name, size in sizes.items() if name in own}
    for name, value in own.items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            values[name] = VOCABULARY - 1
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types") and isinstance(value, list):
            n = next((n for key, n in values.items() if key in LAYERS), 4)
            values[name] = value[:n]
    for name in config.sub_configs:
        if isinstance(sub := getattr(config, name, None), PretrainedConfig):
            values[name] = shrunk(sub, sizes) | {"model_type": sub.model_type}
    return values


def tiny(model_type: str, class_name: str) -> nn.Module:
    errors = []
    for n_layers, kv_heads in ((4, 2), (4, 4), (8, 2), (2, 2), (2, 4)):
        extra = {name: n_layers for name in LAYERS} | {"num_key_value_heads": kv_heads}
        try:
            return built(model_type, class_name, {name: size for size, names in SIZES.items() for name in names.split()} | extra)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def built(model_type, class_name, sizes):
    cls = CONFIG_MAPPING[model_type]
    config = cls(**shrunk(cls(), sizes) | {"pad_token_id": 0, "eos_token_id": 2} | EXTRAS.get(model_type, {}))
    if isinstance(class_name, (tuple, list)):
        class_name = class_name[0]
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    output(model, inputs(model))
    return model


def inputs(model):
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "SequenceClassification" in type(model).__name__:
        ids[:, -1] = 2
    elif model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids[:, :7]
    return found


def output(model, inputs):
    return model(**inputs).logits


def tried(model_type, class_name, method, head):
    try:
        base = tiny(model_type, class_name)
        base.config.pad_token_id = base.config.pad_token_id or 0
        x = inputs(base)
        with torch.no_grad():
            expected = output(base, x)
        model = get_peft_model(base, method(task_type=head))
        model.eval()
        own = {n: p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
        torch.manual_seed(1)
        with torch.no_grad():
            for p in own.values():
                p.normal_(std=0.2)
        ran_modules = set()
        for module in model.modules():
            module.register_forward_hook(lambda module, *_: ran_modules.add(id(module)))
        y = output(model, x)
        assert y.isfinite().all(), "the output is not finite"
        assert not torch.allclose(y, expected, atol=1e-6), "the adapter has no effect"
        y.float().pow(2).sum().backward()
        idle = [n for n, p in own.items() if ran(n, model, ran_modules) and (p.grad is None or not p.grad.any())]
        assert not idle, f"{len(idle)} of {len(own)} parameters have no gradient: {idle[:3]}"
        with torch.no_grad(), model.disable_adapter():
            again = output(model, x)
        assert torch.equal(again, expected), f"disabled, the model differs by {(again-expected).abs().max()}"
    except Exception as error:
        return reason(error)
    return ""


def ran(name, model, ran_modules):
    host = name.partition(".sublayer_of.")[0].rpartition(".")[0] if ".sublayer_of." in name else name.partition(".lora_")[0]
    return id(model.get_submodule(host)) in ran_modules


def reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:230]}"


if __name__ == "__main__":
    main()
