"""Adapters on disk for the tests of load_adapter: saved, then changed field by field or tensor by tensor."""

import hashlib
import json

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from hf_peft_ext import load_adapter

from .backbones import BACKBONES, output

EXPECTED_WARNINGS = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's advice on settings that are intended here
    # 2026-11: peft 0.21's prefix tuning calls models by the name that transformers 5.24 gave up
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QV = {"target_modules": ["q_proj", "v_proj"]}
CAUSAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
STOCK_METHODS = {
    "lora": lambda: LoraConfig(**QV),
    "lora_causal": lambda: LoraConfig(task_type="CAUSAL_LM", use_rslora=True, lora_alpha=3, **QV),
    "lora_dora": lambda: LoraConfig(use_dora=True, **QV),
    "lora_modules_to_save": lambda: LoraConfig(modules_to_save=["lm_head"], **QV),
    "lora_tokens": lambda: LoraConfig(trainable_token_indices=[1, 2, 5], **QV),
    "lora_ranks": lambda: LoraConfig(rank_pattern={"layers.0.self_attn.q_proj": 3}, **QV),
    "lora_rank_patterns": lambda: LoraConfig(
        rank_pattern={r".*\.0\..*q_proj": 3, "v_proj": 2}, alpha_pattern={r"^model\.layers\.1.*": 3}, **QV
    ),
    "lora_bias": lambda: LoraConfig(lora_bias=True, **QV),
    "lora_all_linear": lambda: LoraConfig(target_modules="all-linear", layers_to_transform=None, r=4),
    "lora_some_layers": lambda: LoraConfig(layers_to_transform=[1], layers_pattern="layers", **QV),
    "lora_pattern": lambda: LoraConfig(target_modules=r".*\.[qv]_proj", exclude_modules=r".*\.0\..*q_proj"),
    "lora_eva": lambda: LoraConfig(init_lora_weights="eva", **QV),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3_pattern": lambda: IA3Config(target_modules=r".*(k|down)_proj", feedforward_modules=r".*down_proj"),
    "loha": lambda: LoHaConfig(**QV),
    "lokr": lambda: LoKrConfig(**QV),
    "oft": lambda: OFTConfig(oft_block_size=8, r=0, **QV),
    "hra": lambda: HRAConfig(**QV),
    "ln_tuning": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable_tokens": lambda: TrainableTokensConfig(token_indices=[1, 2, 3]),
    "prefix_tuning": lambda: PrefixTuningConfig(**CAUSAL),
    "prefix_tuning_projected": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **CAUSAL),
    "prompt_tuning": lambda: PromptTuningConfig(**CAUSAL),
    "p_tuning": lambda: PromptEncoderConfig(encoder_hidden_size=8, **CAUSAL),
}


def fingerprint(model):
    """A hash of all that loading could change: weights, buffers, modules, hooks, configs."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)).encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")]
        digest.update(repr((name, type(module), module.training, hooks, sorted(vars(module)))).encode())
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def saved(folder, config, backbone="llama"):
    """A folder with an adapter whose weights matter."""
    model = get_peft_model(BACKBONES[backbone].build(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def rewrite(folder, **fields):
    """Change fields of the config, as JSON."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def reweigh(folder, change):
    """Change the tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refused(folder, message, backbone="llama", **kwargs):
    """Loading is refused with a ValueError, and the base model is as before."""
    refused_on(BACKBONES[backbone].build(), folder, message, **kwargs)


def refused_on(base, folder, message, **kwargs):
    """The same on a model."""
    before = fingerprint(base)
    with pytest.raises(ValueError, match=message):
        load_adapter(base, folder, **kwargs)
    assert fingerprint(base) == before


def assert_equal_to_stock(folder, family):
    stock = PeftModel.from_pretrained(family.build(), folder)
    base = family.build()
    weights = [(tensor, tensor.clone()) for tensor in (*base.parameters(), *base.buffers())]
    loaded = load_adapter(base, folder)
    inputs = family.inputs()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(stock, inputs))
        assert not torch.equal(output(loaded, inputs), output(family.build(), inputs))
    assert type(loaded) is type(stock)
    assert loaded.training == stock.training
    kinds = {name: (p.dtype, p.requires_grad) for name, p in stock.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()} == kinds
    assert all(torch.equal(tensor, before) for tensor, before in weights)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is allocated."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.numel = max(self.numel, result.numel())
        return result
