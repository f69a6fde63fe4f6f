"""Packs the weights of a model on the meta device by bitsandbytes, as transformers does when it loads them."""

import importlib
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer


def packed(model: Any, config: BitsAndBytesConfig) -> Any:
    """The model with its linear leaves in 4 or 8 bits; the head stays as it is.

    Args:
        model: a model on the meta device.
        config: the quantization.
    """
    bnb: Any = importlib.import_module("bitsandbytes")  # an extra; it looks for the GPU when it is imported

    tables = bnb.functional.name2qmap  # bitsandbytes keeps its tables, of whatever device they were first used on
    kept = dict(tables)
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None)
    try:
        with torch.device("cpu"):  # the table of codes is computed
            for module in model.modules():
                pack(module)
    finally:
        tables.clear()
        tables.update(kept)
    quantizer.postprocess_model(model)
    return model


def pack(module: Any) -> None:
    """Quantize the weight of a linear leaf that transformers has prepared for it."""
    bnb: Any = importlib.import_module("bitsandbytes")
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, bnb.nn.Params4bit):
        weight._quantize("meta")
    elif isinstance(weight, bnb.nn.Int8Params):
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.data)
        module.weight = bnb.nn.Int8Params(rows, False, has_fp16_weights=False, CB=rows, SCB=scales)
        module.state.threshold = 0.0  # the columns of outliers depend on values; they are few
