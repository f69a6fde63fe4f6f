"""Measures the traits of methods: `python -m hf_peft_ext.catalogue.measure [NAME]...` writes measured.json."""

import copy
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.budget.memory.build import without_warnings
from hf_peft_ext.catalogue.entries import Entry, available
from hf_peft_ext.catalogue.traits import MEASURED, Traits, measurements
from hf_peft_ext.registry import extend_peft
from hf_peft_ext.tuners.target_modules import REFUSALS, with_target_modules

TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
SELECTED = {"SPARSE": {"selection": "random"}}  # a trainer selects its entries from data; their kind does not matter
NOISE = 0.02  # standard deviation of the noise on the adapter's weights, which makes the adapter act
EXTRA = {"bottleneck": "FFN", "prefix": "input", "low_rank": "layers", "bias": ""}


@cache
def tiny_model() -> nn.Module:
    """The model of the measurements: a small Llama with weights large enough that every part matters."""
    config = AutoConfig.for_model("llama", vocab_size=64, attention_bias=True, mlp_bias=True, **TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, float(parameter.ndim == 1 and bool(parameter[0] == 1)), 0.05)
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                nn.init.zeros_(parameter)  # peft's adaption prompt would add it twice
    return model.eval()


def measure(entry: Entry) -> Traits:
    """Measure the traits of a method.

    Raises:
        ValueError: the method cannot be attached to the tiny model.
    """
    extend_peft()
    base = tiny_model()
    config = with_target_modules(entry.peft_config(task_type="CAUSAL_LM", **SELECTED.get(entry.type, {})), base)
    with without_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            copied = copy.deepcopy(base)
            networks = [module for module in copied.modules() if isinstance(module, LlamaMLP)]
            model: Any = get_peft_model(copied, copy.deepcopy(config)).eval()  # pyright: ignore
        except REFUSALS as error:
            raise ValueError(f"`name` (={entry.name!r}) must fit a small Llama: {error}.") from error
        expected = outputs(base)
        starts_at_base = close(outputs(model), expected)
        stored = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        half = sum(p.numel() for p in base.parameters()) / 2
        perturb(model)
        backprop = attempt(lambda: passes_gradients(model, networks))
        merges = attempt(lambda: merges_exactly(copy.deepcopy(model), expected))
        return Traits(
            starts_at_base=starts_at_base,
            merges=merges,
            to_lora=converts(model),
            mixes=attempt(lambda: mixes_rows(copy.deepcopy(model), config)),
            backprop=backprop,
            saves_storage=stored < half,
            saves_memory=trained < half,
            inference="none" if merges else overhead(model, config),
        )


def attempt(measurement: Callable[[], bool]) -> bool:
    """The result of a measurement; False if peft refuses what it needs."""
    try:
        return measurement()
    except REFUSALS:
        return False


def input_ids() -> Tensor:
    """Two rows of token ids, each with 0 and 1, shape (2, 7)."""
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[:, 2], ids[:, 4] = 0, 1
    return ids


@torch.no_grad()
def outputs(model: Any, **kwargs: Any) -> Tensor:
    """The logits of the text without those of prompts, shape (2, 7, vocab)."""
    return model(input_ids=input_ids(), **task_ids(model), **kwargs).logits[:, -7:]


def task_ids(model: nn.Module) -> dict[str, Tensor]:
    """The first task for each row, for the types that train several."""
    takes = isinstance(model, PeftModel) and model.peft_type in (PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING)
    return {"task_ids": torch.zeros(2, dtype=torch.long)} if takes else {}


def close(one: Tensor, other: Tensor) -> bool:
    """Whether outputs are equal up to rounding."""
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@torch.no_grad()
def perturb(model: nn.Module, scale: float = NOISE) -> None:
    """Add noise to the trained parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def merges_exactly(model: Any, base: Tensor) -> bool:
    """Whether the merged model has the outputs of the adapter.

    Args:
        model: a model with an adapter; changes.
        base: outputs of the base model.
    """
    before = outputs(model)
    merged = model.merge_and_unload()
    return close(outputs(merged), before) and not close(before, base)


def converts(model: PeftModel) -> bool:
    """Whether peft converts the adapter to LoRA."""
    tuner = model.base_model
    has_layers = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    return isinstance(tuner, BaseTuner) and has_layers and attempt(tuner.supports_lora_conversion)


def mixes_rows(model: Any, config: PeftConfig) -> bool:
    """Whether a batch of rows with two adapters has the outputs of each adapter alone.

    Args:
        model: a model with an adapter; it gets another one.
        config: the config of both.
    """
    model.add_adapter("other", copy.deepcopy(config))
    model.set_adapter("other")
    perturb(model)
    second = outputs(model.eval())[1]
    model.set_adapter("default")
    first = outputs(model)[0]
    mixed = outputs(model, adapter_names=["default", "other"])
    return close(mixed[0], first) and close(mixed[1], second) and not close(first, second)


def passes_gradients(model: Any, networks: list[LlamaMLP]) -> bool:
    """Whether the gradient of the outputs reaches the FFNs of the base model.

    Args:
        model: a model with an adapter.
        networks: the FFNs of the base model in it.
    """
    seen: list[Tensor] = []
    embedding = model.get_base_model().get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    for module in networks:
        handles.append(module.register_forward_hook(lambda module, args, output: seen.append(cast(Tensor, output))))
    logits = model(input_ids=input_ids(), **task_ids(model)).logits
    for handle in handles:
        handle.remove()
    reached = [output for output in seen if output.requires_grad]
    grads = torch.autograd.grad(logits.sum(), reached, allow_unused=True) if reached else ()
    return any(grad is not None for grad in grads)


def overhead(model: PeftModel, config: PeftConfig) -> str:
    """What an adapter that does not merge costs at inference."""
    if isinstance(config, PlacedConfig):
        resolved: Any = model.peft_config["default"]
        kinds = dict.fromkeys(EXTRA.get(placement.sublayer, "FFN") for placement in resolved.to_placements())
        return ", ".join(filter(None, kinds)) or "layers"
    return "input" if config.is_prompt_learning else "layers"


def write_measurements(names: Sequence[str] = ()) -> None:
    """Measure methods, and write the file that the catalogue reads.

    Args:
        names: the methods; the others keep what the file has. All by default.
    """
    kept = measurements()["traits"] if names else {}
    traits: dict[str, Any] = {}
    for entry in available():
        try:
            traits[entry.name] = kept[entry.name] if names and entry.name not in names else asdict(measure(entry))
        except ValueError as error:
            traits[entry.name] = {"error": " ".join(str(error).split())}
    content = {"peft": importlib.metadata.version("peft"), "traits": traits}
    MEASURED.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    write_measurements(sys.argv[1:])
