"""On which architectures of transformers do UniPELT, T-Few and LoRA work with their default settings?

LoRA is tried with peft's own defaults and with `find_target_modules`.

The script builds a tiny random model of every causal-LM, sequence-to-sequence and sequence-classification head in
transformers, and adapts it. It checks that the adapter has an effect, that every part that ran is trained, and that
disabling the adapter restores the base model's outputs.

    python examples/benchmarks/architectures.py                       # all of them, about two minutes on one core
    python examples/benchmarks/architectures.py --model_types t5 llama  # some of them
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, HfArgumentParser, PretrainedConfig
from transformers.models.auto import modeling_auto

from hf_peft_ext import TFewConfig, UniPELTConfig, find_target_modules

HEADS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
LORA, FOUND = "LoRA", "LoRA, found targets"
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "UniPELT": UniPELTConfig,
    "T-Few": TFewConfig,
    FOUND: LoraConfig,
    LORA: LoraConfig,
}
VOCABULARY, BATCH, LENGTH = 160, 2, 12
EOS = 2
LARGEST = 20_000_000  # parameters; larger models are skipped

# What makes a model tiny, under the names that configs have for it.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
          "num_decoder_layers", "num_encoder_layers")  # fmt: skip
SIZES: dict[int, str] = {
    2: "num_kv_heads multi_query_group_num num_experts_per_tok moe_topk num_experts_per_token "
       "moe_num_shared_experts n_shared_experts num_shared_experts linear_num_key_heads swa_num_key_value_heads "
       "topk_group n_group index_n_heads n_groups mamba_n_groups num_hash_functions",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads swa_num_attention_heads "
       "num_attention_groups time_step_rank mamba_dt_rank index_topk linear_num_heads",
    8: "head_dim d_kv d_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
       "swa_head_dim mamba_d_head mamba_d_state state_size index_head_dim rotary_dim mamba_n_heads kv_channels "
       "linear_head_dim hidden_size_per_layer_input attention_head_size ssm_state_size",
    16: "kv_lora_rank q_lora_rank qk_head_dim embedding_size mamba_chunk_size block_size chunk_size n_hash",
    32: "hidden_size d_model n_embd emb_dim dim embed_dim model_dim pooler_hidden_size lru_width width hidden_dim "
        "attention_hidden_size",
    64: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size d_inner "
        "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size image_size num_mel_bins mamba_d_ssm",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_sequence_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}  # fmt: skip
# The first numbers of layers and of key and value heads that the model type accepts are taken.
TRIES = ((4, 2), (4, 4), (8, 2), (2, 2), (2, 4))
# What single model types need besides.
EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "encoder-decoder": {
        "decoder": {
            **{"model_type": "bert", "is_decoder": True, "add_cross_attention": True, "hidden_size": 32},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCABULARY},
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass
class Arguments:
    """Options of the command."""

    model_types: list[str] | None = field(default=None, metadata={"help": "Model types; all by default."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    heads = chosen_heads(HEADS, None, args.model_types)
    failures: dict[str, dict[str, str]] = {method: {} for method in METHODS}
    built, unbuilt = Counter(), {}
    for task, model_type, class_name in track(heads, "adapting", transient=True):
        name = f"{model_type} {task}"
        try:
            tiny(model_type, class_name)
        except Exception as error:
            unbuilt[name] = first_line(error)
            continue
        built[task] += 1
        for method, config in METHODS.items():
            try:
                model = tiny(model_type, class_name)
                targets = {"target_modules": find_target_modules(model)} if method == FOUND else {}
                check(model, config(task_type=task, **targets))
            except Exception as error:
                failures[method][name] = first_line(error)
    report(built, failures, unbuilt)


def report(built: Counter[str], failures: dict[str, dict[str, str]], unbuilt: dict[str, str]) -> None:
    console = Console()
    table = Table(title=f"heads on which the defaults work (transformers {transformers.__version__})")
    table.add_column("task")
    for method in METHODS:
        table.add_column(method, justify="right")
    table.add_column("heads", justify="right")
    for task in HEADS:
        failed = [sum(name.endswith(f" {task}") for name in names) for names in failures.values()]
        table.add_row(task, *(str(built[task] - n) for n in failed), str(built[task]))
    total = built.total()
    table.add_row("all", *(str(total - len(names)) for names in failures.values()), str(total), style="bold")
    for method in [method for method in METHODS if method != LORA]:
        for name, why in failures[method].items():
            console.print(f"{method}, {name}: {why}", markup=False, highlight=False)
    console.print(f"No small model could be built of {len(unbuilt)} heads: {', '.join(unbuilt)}.", highlight=False)
    console.print(table)


def tiny(model_type: str, class_name: str | tuple[str, ...]) -> nn.Module:
    """A small random model, the same at every call.

    Raises:
        Exception: whatever transformers says where it cannot be made small, or not be run on token ids.
    """
    errors = []
    for n_layers, kv_heads in TRIES:
        sizes = {name: size for size, names in SIZES.items() for name in names.split()}
        sizes |= dict.fromkeys(LAYERS, n_layers) | {"num_key_value_heads": kv_heads}
        try:
            return build(model_type, class_name if isinstance(class_name, str) else class_name[0], sizes)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def build(model_type: str, class_name: str, sizes: dict[str, int]) -> nn.Module:
    config_class, model_class = CONFIG_MAPPING[model_type], getattr(transformers, class_name)
    values = {**shrunk(config_class(), sizes), "pad_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": 0}
    values |= EXTRAS.get(model_type, {})
    model = with_random_weights(model_class, config_class(**values))
    logits(model)
    return model


def with_random_weights(model_class: Any, config: PretrainedConfig) -> nn.Module:
    """A model, always with the same weights.

    Raises:
        ValueError: it has more than `LARGEST` parameters.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()


def chosen_heads(
    heads_of: dict[str, dict[str, str]], tasks: list[str] | None, model_types: list[str] | None
) -> list[tuple[str, str, str]]:
    """Task, model type and class name of each head; None chooses all."""
    return [
        (task, model_type, class_name)
        for task, names in heads_of.items()
        for model_type, class_name in names.items()
        if (tasks is None or task in tasks) and (model_types is None or model_type in model_types)
    ]


def shrunk(config: PretrainedConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """The arguments that make a small config of the same class."""
    own, specials = vars(config), 0
    values: dict[str, Any] = {name: size for name, size in sizes.items() if name in own}
    for name, value in own.items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            specials += 1
            values[name] = VOCABULARY - specials
        elif name.endswith(("_types", "block_type")) and isinstance(value, list):
            values[name] = value[: next((values[layers] for layers in LAYERS if layers in values), 4)]
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            values[name] = {**shrunk(inner, sizes), "model_type": inner.model_type}
    return values


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY // 2, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "SequenceClassification" in f"{type(model).__name__} {type(getattr(model, 'base_model', None)).__name__}":
        ids[:, -1] = EOS  # where BART and T5 read the class
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : LENGTH // 2]
    return model(**inputs).logits


def check(base: nn.Module, config: PeftConfig) -> None:
    """Adapt the model, and see that the adapter acts, learns and can be disabled.

    Raises:
        AssertionError: it does not; or whatever the method says.
    """
    with torch.no_grad():
        expected = logits(base)
    model: Any = get_peft_model(base, config).eval()  # pyright: ignore[reportArgumentType]
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in own.items():
            std = 1e-4 if ".gate." in name else 0.2  # a saturated gate has no gradient; CPM-Ant has states of 1e4
            parameter.normal_(mean=float(".ia3_" in name), std=std)  # scales stay near one
    ran: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or hasattr(module, "base_layer"):  # what runs, wrapped or not
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    changed = logits(model)
    assert changed.isfinite().all(), "the output is not finite"
    assert not torch.allclose(changed, expected, atol=1e-6), "the adapter has no effect"
    changed.float().square().sum().backward()
    idle = [n for n, p in own.items() if host(n) in ran and (p.grad is None or not p.grad.any())]
    assert not idle, f"{len(idle)} of {len(own)} parameters have no gradient, {idle[0]} for one"
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(logits(model), expected, rtol=0, atol=1e-6), "the disabled adapter still has an effect"


def host(parameter: str) -> str:
    """Path of the module that a parameter of an adapter changes."""
    layer = parameter.partition(".sublayer_of.")[0]
    return re.split(r"\.(?:lora_|ia3_)", parameter)[0] if layer == parameter else layer.rpartition(".")[0]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


if __name__ == "__main__":
    main()
