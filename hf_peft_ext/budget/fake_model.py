"""A model with its adapter from a config alone, with fake tensors: shapes and types, but no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HEAD_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "FEATURE_EXTRACTION": AutoModel,
}
ENCODER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")


def head_task(config: PretrainedConfig, peft_config: PeftConfig | None = None) -> str:
    """The task that decides on the model's head: the adapter's, else one that fits the config's architecture."""
    task = None if peft_config is None else peft_config.task_type
    if task is not None and str(getattr(task, "value", task)) in HEAD_CLASSES:
        return str(getattr(task, "value", task))
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    architectures = getattr(config, "architectures", None) or [""]
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not architectures[0].endswith(ENCODER_HEADS):
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION"


def model_on_meta(
    config: PretrainedConfig,
    peft_config: PeftConfig | None = None,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build a model and attach an adapter on the meta device. Attention is eager, so that every product is visible.

    Args:
        config: the model's config.
        peft_config: the adapter's config; None for the model alone.
        task: see `head_task`.
        dtype: type of the model's parameters.

    Raises:
        ValueError: the model or the adapter cannot be built.
    """
    task = task or head_task(config, peft_config)
    try:
        with torch.device("meta"):
            model = HEAD_CLASSES[task].from_config(config, attn_implementation="eager", dtype=dtype)
            return model if peft_config is None else get_peft_model(model, peft_config)
    except (NotImplementedError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        what = f"{config.model_type}{'' if peft_config is None else f' with {peft_config.peft_type}'}"
        raise ValueError(f"`config` (={what!r}) must build on the meta device: {error}.") from error


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Replace the meta tensors of a model by fake ones of the CPU. Tensors created in the context are fake as well.

    Code that branches on the device, such as autocast, then runs as on a CPU; it fails on the meta device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        replaced: dict[int, Tensor] = {}  # tied weights stay tied
        for module in model.modules():
            stores: Any = (module._parameters, module._buffers)
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = replaced.setdefault(id(tensor), _fake(mode, tensor))
        yield


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of parameters of the base model, and of trained ones."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter = 0
    if isinstance(model, PeftModel):
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in base.parameters())
    trained = adapter or sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total, trained


def call_on_zeros(model: nn.Module, tokens: int, target_tokens: int, batch: int = 1, **kwargs: Any) -> Any:
    """Call a model on zeros.

    Args:
        model: the model, within `fake_tensors`.
        tokens: length of the input.
        target_tokens: length of the decoder's input, for an encoder-decoder.
        batch: number of rows.
        **kwargs: further arguments of the call.
    """
    inputs: dict[str, Any] = {"input_ids": torch.zeros(batch, tokens, dtype=torch.long)}
    if model.config.is_encoder_decoder:  # pyright: ignore[reportAttributeAccessIssue]
        inputs["decoder_input_ids"] = torch.zeros(batch, target_tokens, dtype=torch.long)
    return model(**inputs, **kwargs)
