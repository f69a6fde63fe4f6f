"""A model with its adapter from a config alone, with fake tensors: shapes and types, but no memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers import PretrainedConfig

from hf_peft_ext.budget.experts import GroupedProducts, expert_options
from hf_peft_ext.budget.model_class import head_task, model_class

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@contextmanager
def errors_of_fake_runs(name: str, value: str) -> Iterator[None]:
    """Turn an error of a run on fake tensors into a ValueError that names a field and its value, as text."""
    try:
        yield
    except RuntimeError as error:
        rule = "run on fake tensors"
        if isinstance(error, NEEDS_VALUES):
            rule = "have a forward pass that does not depend on the values of tensors"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"`{name}` (={value}) must {rule}: {reason}.") from error


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
        task: see `head_task`; an encoder has no head by default.
        dtype: type of the model's parameters.

    Raises:
        ValueError: the model or the adapter cannot be built.
    """
    config = copy.deepcopy(config)  # building changes it
    built = model_class(config, task or head_task(config, peft_config, "FEATURE_EXTRACTION"), "config")
    try:
        with torch.device("meta"):
            model = built._from_config(config, attn_implementation="eager", dtype=dtype, **expert_options(config))
            return model if peft_config is None else get_peft_model(model, peft_config)
    except (NotImplementedError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        what = f"{config.model_type}{'' if peft_config is None else f' with {peft_config.peft_type}'}"
        raise ValueError(f"`config` (={what!r}) must build on the meta device: {error}.") from error


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Replace the meta tensors of a model by fake ones of the CPU. Tensors created in the context are fake as well.

    Code that branches on the device, such as autocast, then runs as on a CPU; it fails on the meta device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, GroupedProducts():
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
