"""Models of real shapes with random weights, made on the device; the methods; 4-bit copies made leaf by leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_peft_ext import (
    BitFitConfig,
    BottleneckConfig,
    LadderConfig,
    LayerPrefixConfig,
    MAMConfig,
    S4Config,
    TFewConfig,
    UniPELTConfig,
)

from .part import Setting

FULL, LORA, PAPER = "full fine-tuning", "LoRA (peft)", "UniPELT, joint prefix"
METHODS: dict[str, Callable[..., PeftConfig]] = {
    LORA: LoraConfig,
    "UniPELT": UniPELTConfig,
    PAPER: lambda **kwargs: UniPELTConfig(init="paper", **kwargs),
    "MAM": MAMConfig,
    "bottleneck": BottleneckConfig,
    "prefix": LayerPrefixConfig,
    "BitFit": BitFitConfig,
    "S4": lambda **kwargs: S4Config(grouping="uniform", budget=0.05, **kwargs),  # few layers
    "T-Few": TFewConfig,
    "ladder": LadderConfig,
}
TIMED = (FULL, LORA, "UniPELT", PAPER, "MAM", "bottleneck", "prefix", "BitFit")


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and those of a batch.

    Args:
        model_type: transformers' name of it.
        sizes: fields of its config; transformers' defaults are BERT-base and Llama-7B.
        batch: rows.
        length: tokens of a row.
    """

    model_type: str
    sizes: dict[str, int]
    batch: int
    length: int


QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SHAPES = {
    "BERT-base": Shape("bert", {}, 32, 128),
    "Qwen2-0.5B": Shape("qwen2", {**QWEN, "num_key_value_heads": 2, "tie_word_embeddings": True}, 4, 512),
    "Llama-7B": Shape("llama", {}, 1, 1024),
    "Llama, 4 layers of 1024": Shape(
        "llama",
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16},
        4,
        128,
    ),
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY_VOCABULARY = 300


def sizes_of(shape: Shape, smoke: bool, layers: int | None = None) -> dict[str, Any]:
    sizes: dict[str, Any] = {**shape.sizes, "pad_token_id": 0}
    if smoke:
        sizes |= {**TINY, "vocab_size": TINY_VOCABULARY}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return sizes


def build(
    shape: Shape, setting: Setting, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, **kwargs: Any
) -> Any:
    """A model with random weights, made where it is used: the CPU never holds it."""
    config = AutoConfig.for_model(shape.model_type, **sizes_of(shape, setting.smoke, layers))
    auto: Any = AutoModelForSequenceClassification if shape.model_type == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(setting.device):
        return auto.from_config(config, dtype=dtype, **kwargs)


def task_of(shape: Shape) -> str:
    return "SEQ_CLS" if shape.model_type == "bert" else "CAUSAL_LM"


def adapted(model: Any, method: str, shape: Shape) -> Any:
    """The model with an adapter as its config has it by default; all weights trained for full fine-tuning."""
    return model if method == FULL else get_peft_model(model, METHODS[method](task_type=task_of(shape)))


def batch(shape: Shape, setting: Setting) -> dict[str, Any]:
    """Random tokens and labels; encoders' rows are padded by a quarter, every other one."""
    rows, length = (2, 16) if setting.smoke else (shape.batch, shape.length)
    ids = torch.randint(1, TINY_VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    if shape.model_type != "bert":
        return {"input_ids": ids.to(setting.device), "labels": ids.to(setting.device), "use_cache": False}
    mask = torch.ones_like(ids)
    mask[::2, 3 * length // 4 :] = 0
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}
    return {name: tensor.to(setting.device) for name, tensor in tensors.items()}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def in_4_bits(model: Any, double: bool = True) -> Any:
    """The model with its linear leaves in NF4, with double quantisation or without; the head stays as it is.

    What transformers does as it loads a checkpoint, for weights that are on the device already.
    """
    import bitsandbytes as bnb  # at its import it asks for the GPU

    def quantized(leaf: nn.Linear) -> Any:
        packed: Any = bnb.nn.Linear4bit(
            leaf.in_features, leaf.out_features, leaf.bias is not None, torch.bfloat16, double, "nf4", device="meta"
        )
        weight: Tensor = leaf.weight.detach()
        packed.weight = bnb.nn.Params4bit(weight, False, quant_type="nf4", compress_statistics=double).to(
            weight.device
        )
        return packed

    model.is_loaded_in_4bit = True  # peft's LoRA asks for it
    return with_leaves(model, quantized)


def in_8_bits(model: Any) -> Any:
    """The same by LLM.int8()."""
    import bitsandbytes as bnb

    def quantized(leaf: nn.Linear) -> Any:
        packed: Any = bnb.nn.Linear8bitLt(
            leaf.in_features, leaf.out_features, leaf.bias is not None, False, 6.0, device="meta"
        )
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(leaf.weight.detach().half())
        packed.weight = bnb.nn.Int8Params(rows, False, has_fp16_weights=False, CB=rows, SCB=scales)
        return packed

    model.is_loaded_in_8bit = True
    return with_leaves(model, quantized)


def with_leaves(model: Any, quantized: Callable[[nn.Linear], Any]) -> Any:
    """Replace each linear leaf but the head, one after the other; biases stay."""
    head = model.get_output_embeddings()
    for path, leaf in list(model.named_modules()):
        if isinstance(leaf, nn.Linear) and leaf is not head:
            packed = quantized(leaf)
            packed.bias = leaf.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed)
            del leaf
    return model
