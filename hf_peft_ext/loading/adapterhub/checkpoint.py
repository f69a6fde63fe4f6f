"""Reads an adapter saved by AdapterHub's library, `adapters`: its config, and its tensors by module names."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor

from hf_peft_ext.validation.checks import check

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5", "bart")
# architecture -> settings that are supported only with their default value
DEFAULT_ONLY: dict[str | None, dict[str, Any]] = {
    None: {
        **{"original_ln_after": True, "ln_before": False, "ln_after": False},
        **{"phm_layer": False, "inv_adapter": None, "stochastic_depth": 0.0},
    },
    "lora": {"use_dora": False, "vera_d": None, "vera_b": None},
    "prefix_tuning": {"shared_gating": True},
}

Settings = Mapping[str, Any]  # of one method, as saved by the library


class Checkpoint:
    """The settings and the tensors of a saved adapter.

    Args:
        path: the folder.
        model: the base model.

    Raises:
        ValueError: the folder holds no such checkpoint, it is for another model, or a setting is not supported.
    """

    def __init__(self, path: Path, model: Any):
        file = path / "adapter_config.json"
        check("path", str(path), file.is_file(), "must be a folder with an adapter_config.json")
        saved = json.loads(file.read_text())
        peft = "peft_type" in saved
        check("path", str(path), not peft, "holds an adapter of peft; load it with PeftModel.from_pretrained")
        complete = isinstance(saved.get("config"), dict) and "name" in saved
        check("path", str(path), complete, "holds no adapter saved by AdapterHub's library")
        family = getattr(getattr(model, "config", None), "model_type", None)
        check("model", family, family in FAMILIES, f"must be one of {', '.join(FAMILIES)}")
        for key in ("model_type", "hidden_size"):
            value, own = saved.get(key), getattr(model.config, key)
            check(key, value, value in (None, own), f"must equal the model's, {own!r}")
        self.methods = methods(saved)
        self.root = f"{model.base_model_prefix}."
        named = re.compile(rf"\.(adapters|loras|prefix_tunings|prefix_gates)\.{re.escape(saved['name'])}\.")
        self.tensors = {  # without `pool`, in which the library repeats a prefix in every layer
            self.unrooted(named.sub(r".\1.", key)): tensor
            for key, tensor in read_tensors(path).items()
            if ".prefix_tuning.pool." not in key
        }

    def unrooted(self, name: str) -> str:
        """The name inside the backbone: models with a head prefix it with the backbone's name."""
        return name.removeprefix(self.root)

    def take(self, name: str) -> Tensor:
        """Remove a tensor from the checkpoint and return it.

        Raises:
            ValueError: the checkpoint has no such tensor, or it was taken before.
        """
        name = self.unrooted(name)
        if name not in self.tensors:
            raise ValueError(f"The checkpoint has no tensor {name}, which its config and the model require.")
        return self.tensors.pop(name)

    def check_all_taken(self) -> None:
        """Refuse a checkpoint with unused tensors.

        Raises:
            ValueError: a tensor was not taken.
        """
        if self.tensors:
            names = ", ".join(sorted(self.tensors)[:4])
            raise ValueError(f"The checkpoint has {len(self.tensors)} tensors with no place in this model: {names}.")


def methods(saved: dict[str, Any]) -> list[Settings]:
    """The methods of a checkpoint: the members of a union, or its only one.

    Raises:
        ValueError: a setting is not supported.
    """
    config = dict(saved["config"])
    library, _, version = (saved.get("version") or "").partition(".")
    if library == "adapters" and Version(version) < Version("1.1.0") and config.get("architecture") == "lora":
        config["alpha"] = config["r"]  # these versions ignored alpha and used r
    members: list[Settings] = config["configs"] if config.get("architecture") == "union" else [config]
    for method in members:
        kind = method.get("architecture")
        rule = "must be None (a bottleneck), 'lora', 'prefix_tuning' or 'union'"
        check("architecture", kind, kind in DEFAULT_ONLY, rule)
        for key, value in DEFAULT_ONLY[kind].items():
            check(key, method.get(key, value), method.get(key, value) == value, f"must be {value!r}")
        if is_ia3(method):
            check("composition_mode", "scale", len(members) == 1, "must be 'add' in a union")
            check("use_gating", True, not method.get("use_gating"), "must be False for (IA)^3")
    return members


def is_ia3(method: Settings) -> bool:
    """Whether a LoRA of the library is (IA)^3: it multiplies outputs instead of adding to them."""
    return method.get("composition_mode") == "scale"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint. A pickle is read with `weights_only`, so that it runs no code.

    Raises:
        ValueError: the folder has no file with weights.
    """
    if (file := path / "adapter.safetensors").is_file():
        return load_file(file)
    file = path / "pytorch_adapter.bin"
    check("path", str(path), file.is_file(), "must hold adapter.safetensors or pytorch_adapter.bin")
    return torch.load(file, map_location="cpu", weights_only=True)
