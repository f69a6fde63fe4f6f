"""Loads a base model for training with adapters: in 4 bits, in 8 bits, or unquantized."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.import_utils import is_bitsandbytes_available, is_torch_bf16_gpu_available

from hf_peft_ext.validation.checks import check

AUTO_CLASSES = {  # peft's task type -> transformers' class
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
OF_CONFIG = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code", "local_files_only")
NON_REENTRANT = {"use_reentrant": False}


def load_backbone(
    id_or_path: str | Path,
    bits: Literal[4, 8] | None = 4,
    *,
    task_type: str = "CAUSAL_LM",
    auto_class: Any = None,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quantization: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip_modules: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base model, prepared for training with an adapter of any method.

    4 bits are QLoRA's NF4 with double quantization, Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314); 8 bits
    are LLM.int8(), Dettmers et al. 2022 (https://arxiv.org/abs/2208.07339). The heads stay unquantized, because
    `modules_to_save` can only train floating point weights. Norms, embeddings and heads of a quantized model are in
    float32, as peft prepares it.

    Args:
        id_or_path: a Hub id or a folder, of an unquantized model.
        bits: 4, 8, or None for the weights in `compute_dtype`.
        task_type: peft's task type, which decides the auto class.
        auto_class: a class with `from_config` and `from_pretrained`, in place of that of `task_type`.
        quant_type: data type of 4-bit weights.
        double_quantization: whether the constants of 4-bit weights are quantized too; saves 0.37 bits a parameter.
        compute_dtype: type of matrix products; None for bfloat16 on an accelerator that has it, else float32.
            8-bit products ignore it.
        skip_modules: names of further modules to keep unquantized.
        gradient_checkpointing: recompute activations in the backward pass, in torch's non-reentrant way.
        kwargs: for `from_pretrained`, such as `revision`, `num_labels` or `attn_implementation`. `device_map` is one
            device, that of this process, unless it is passed.

    Raises:
        ImportError: bitsandbytes is needed and not installed.
        ValueError: `bits`, `task_type` or `quant_type` is unknown, or `quantization_config` is passed too.
    """
    check("bits", bits, bits in (None, 4, 8), "must be 4, 8 or None")
    check("task_type", task_type, task_type in AUTO_CLASSES, f"must be one of {', '.join(AUTO_CLASSES)}")
    check("quant_type", quant_type, quant_type in ("nf4", "fp4"), "must be nf4 or fp4")
    rule = "must be left to `bits`; for a config of your own call `from_pretrained`"
    check("quantization_config", kwargs.get("quantization_config"), "quantization_config" not in kwargs, rule)
    if bits and not is_bitsandbytes_available():
        raise ImportError(f"`bits` (={bits}) needs bitsandbytes: pip install 'hf_peft_ext[quantized]'")
    loader = auto_class or AUTO_CLASSES[task_type]
    device: Any = PartialState().device
    dtype = compute_dtype or default_dtype(device)
    kwargs = {"dtype": dtype, "device_map": {"": device}, **kwargs}
    if bits:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[*unquantized_modules(id_or_path, loader, kwargs), *skip_modules],
        )
    model = loader.from_pretrained(id_or_path, **kwargs)
    if bits:
        return prepare_model_for_kbit_training(model, gradient_checkpointing, NON_REENTRANT)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    return model.requires_grad_(False)


def default_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 on an accelerator that has it, else float32: CPUs compute in bfloat16 too, but most of them slowly."""
    return torch.bfloat16 if device.type != "cpu" and is_torch_bf16_gpu_available() else torch.float32


def unquantized_modules(id_or_path: str | Path, loader: Any, kwargs: dict[str, Any]) -> list[str]:
    """Names of the modules to keep out of quantization: transformers' own choice, and every head.

    transformers keeps the output embeddings only, so that a classifier becomes a 4-bit layer that cannot be trained.

    Args:
        id_or_path: a Hub id or a folder.
        loader: an auto class.
        kwargs: of its `from_pretrained`.
    """
    shared = {name: kwargs[name] for name in OF_CONFIG if name in kwargs}
    config = AutoConfig.from_pretrained(id_or_path, **shared)
    trusted = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    with torch.device("meta"):  # its structure is needed, not its weights
        model = loader.from_config(config, **trusted)
    heads = [] if model.base_model is model else [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(isinstance(module, nn.Linear) for module in child.modules())
    ]  # fmt: skip
    return [*get_keys_to_not_convert(model), *heads]
