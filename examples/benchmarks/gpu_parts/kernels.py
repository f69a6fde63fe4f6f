"""Attention kernels: which of them work with each method, and how far they are from eager attention in float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tables import Row
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from .models import FULL, LORA, METHODS, PAPER, TINY, adapted, trained
from .models import SHAPES as MODELS
from .part import NO_CUDA, Part, Setting

BACKENDS = {
    "sdpa, math": SDPBackend.MATH,
    "sdpa, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa, flash": SDPBackend.FLASH_ATTENTION,
    "sdpa, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
EVERYWHERE = ("eager", "sdpa", "sdpa, math")
KERNELS = (*EVERYWHERE, *list(BACKENDS)[1:], "flash_attention_2", "flash_attention_3", "flex_attention")
TRIED = (FULL, LORA, "UniPELT", PAPER, "MAM", "bottleneck", "prefix", "BitFit", "ladder")
SHAPE = MODELS["Llama, 4 layers of 1024"]


def model_for(kernel: str, method: str, dtype: torch.dtype, setting: Setting) -> Any:
    sizes = {**SHAPE.sizes, "num_hidden_layers": 2, "vocab_size": 300, "pad_token_id": 0}
    sizes |= TINY if setting.smoke else {}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=2)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel.split(",")[0])
        return adapted(model, method, SHAPE).eval()


def reference_for(method: str, setting: Setting) -> Any:
    """Eager, in float32, with weights that bf16 has, and an adapter that matters."""
    model = model_for("eager", method, torch.float32, setting)
    with torch.no_grad():
        for parameter in trained(model) if method != FULL else []:
            parameter.normal_(0, 0.05)
    return model.bfloat16().float()


def inputs_for(setting: Setting, padded: bool) -> dict[str, Any]:
    length = 16 if setting.smoke else 256
    ids = torch.randint(1, 300, (4, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, : length // 4] = 0
    tensors = {"input_ids": ids, "labels": ids, **({"attention_mask": mask} if padded else {})}
    return {name: tensor.to(setting.device) for name, tensor in tensors.items()}


def differs(kernel: str, method: str, padded: bool, setting: Setting) -> Any:
    """Relative norm of the logits' difference, padding left out; of an error the last line."""
    inputs = inputs_for(setting, padded)
    backend: AbstractContextManager[None] = sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else nullcontext()
    try:
        reference = reference_for(method, setting)
        with torch.no_grad():
            expected = reference(**inputs, use_cache=False).logits
        model = model_for(kernel, method, torch.bfloat16, setting)
        model.load_state_dict(reference.state_dict())
        with backend:
            out = model(**inputs, use_cache=False)
            out.loss.backward()
        setting.synchronize()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a user would meet is the result
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:160]}"
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return ((out.logits.float() - expected)[seen].norm() / expected[seen].norm()).item()


def measure(_: str, name: str, setting: Setting) -> Row:
    kernel, _, method = name.partition(" / ")
    if not setting.on_gpu and kernel not in EVERYWHERE:
        return {"error": NO_CUDA}
    return {column: differs(kernel, method, column == "left padding", setting) for column in COLUMNS}


COLUMNS = ("no padding", "left padding")
assert set(TRIED) <= {FULL, *METHODS}
PART = Part(
    "Attention kernels in bf16",
    "Forward and backward; the logits' distance from eager attention in float32, relative, or the error's last line.",
    ("model", "kernel / method"),
    {"Llama": [f"{kernel} / {method}" for kernel in KERNELS for method in TRIED]},
    measure,
)
