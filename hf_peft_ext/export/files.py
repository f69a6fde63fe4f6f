"""Writes a LoRA as stock peft saves one, with the modules that the adapter saves whole, and its card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.export.low_rank_factors import Factors
from hf_peft_ext.hub_cards.card import write_card
from hf_peft_ext.hub_cards.record import TrainingRecord
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.structure import innermost

PREFIX = "base_model.model."  # begins the names of a PeftModel's tensors
CONFIG_FIELDS = ("task_type", "modules_to_save", "trainable_token_indices", "base_model_name_or_path", "revision")


def write_lora(
    folder: str | Path, model: PeftModel, adapter_name: str, factors: Mapping[str, Factors], record: TrainingRecord
) -> None:
    """Write a LoRA's config, weights, record and card.

    The LoRA has one rank and `lora_alpha` = r, for servers that know no `rank_pattern`: the factors of leaves with a
    lower rank are filled up with zeros.

    Args:
        folder: the folder, which is created.
        model: the model with the adapter that is exported.
        adapter_name: the adapter.
        factors: path of a leaf -> A and B.
        record: what the card shows.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lora_config(model, adapter_name, factors).save_pretrained(str(folder))
    tensors = file_tensors(factors) | saved_whole_tensors(model, adapter_name)
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    record.save(folder)
    write_card(folder, model)


def lora_config(model: PeftModel, adapter_name: str, factors: Mapping[str, Factors]) -> LoraConfig:
    """The config of a LoRA at these leaves."""
    base, r = model.get_base_model(), max(len(f.A) for f in factors.values())
    config = model.peft_config[adapter_name]
    others = {path for path, _ in own_modules(base)} - {*factors, ""}
    lora = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(_find_minimal_target_modules(sorted(factors), sorted(others))),
        fan_in_fan_out=any(isinstance(innermost(base.get_submodule(path)), Conv1D) for path in factors),
        inference_mode=True,
        auto_mapping=getattr(config, "auto_mapping", None),
    )
    for name, value in saved_whole_config(config).items():
        setattr(lora, name, value)
    return lora


def file_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of a LoRA by their names in a file, all of one rank."""
    r, tensors = max(len(f.A) for f in factors.values()), {}
    for path, (a, b) in factors.items():
        lacking = r - len(a)
        a = torch.cat([a, a.new_zeros(lacking, a.shape[1])])  # (r, d_in)
        b = torch.cat([b, b.new_zeros(len(b), lacking)], dim=1)  # (d_out, r)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous()
    return tensors


def saved_whole_config(config: Any) -> dict[str, Any]:
    """The fields of an adapter's config that its LoRA has too."""
    return {name: value for name in CONFIG_FIELDS if (value := getattr(config, name, None)) is not None}


def saved_whole_tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of modules and embedding rows that an adapter saves whole, by their names in a file."""
    tensors: dict[str, Tensor] = {}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            state = cast(Any, wrapper).adapter_state_dict(adapter_name, wrapper.state_dict())
            tensors |= {f"{path}.{name}": value.detach().cpu().clone() for name, value in state.items()}
    return tensors
