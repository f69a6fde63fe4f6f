"""Reads an adapter saved by AdapterHub's library, `adapters`: its config, and its tensors by module names."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_peft_ext.loading.adapterhub.settings import methods
from hf_peft_ext.validation.checks import check


class Checkpoint:
    """The settings and the tensors of a saved adapter.

    Args:
        path: the folder.
        model: the base model.

    Raises:
        ValueError: the folder holds no such checkpoint, it is for another model, or a setting is not supported.
    """

    def __init__(self, path: Path, model: Any):
        saved = saved_config(path)
        check_model(saved, model)
        self.methods = methods(saved)
        self.root = f"{model.base_model_prefix}."
        renamings = get_model_conversion_mapping(model, add_legacy=False)  # the library has the names of version 4
        named = re.compile(
            rf"(\.|^)(adapters|loras|prefix_tunings|prompt_tunings|refts|prefix_gates|shared_parameters|invertible_adapters)\.{re.escape(saved['name'])}\."
        )
        self.tensors: dict[str, Tensor] = {}
        for key, tensor in read_tensors(path).items():
            key = named.sub(r"\1\2.", key)
            for renaming in renamings:
                key, _ = renaming.rename_source_key(key)
            if ".prefix_tuning.pool." not in key:  # in which the library repeats a prefix in every layer
                self.tensors[self.unrooted(key)] = tensor
        self.names, self.shared = tuple(self.tensors), dict[str, Tensor]()

    def unrooted(self, name: str) -> str:
        """The name inside the backbone: models with a head prefix it with the backbone's name."""
        return name.removeprefix(self.root)

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """The matches of a regular expression with the names of the tensors, also those that were taken."""
        return [match for name in self.names if (match := re.match(pattern, name))]

    def read(self, name: str) -> Tensor:
        """A tensor that several sub-layers share. It counts as taken.

        Raises:
            ValueError: the checkpoint has no such tensor.
        """
        if name not in self.shared:
            self.shared[name] = self.take(name)
        return self.shared[name]

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


def saved_config(path: Path) -> dict[str, Any]:
    """The config of a saved adapter.

    Raises:
        ValueError: the folder holds no adapter of AdapterHub's library.
    """
    file = path / "adapter_config.json"
    check("path", str(path), file.is_file(), "must be a folder with an adapter_config.json")
    saved = json.loads(file.read_text())
    peft = "peft_type" in saved
    check("path", str(path), not peft, "holds an adapter of peft; load it with PeftModel.from_pretrained")
    complete = isinstance(saved.get("config"), dict) and "name" in saved
    check("path", str(path), complete, "holds no adapter saved by AdapterHub's library")
    return saved


def check_model(saved: dict[str, Any], model: Any) -> None:
    """Refuse a model of another type or width than the adapter's.

    Raises:
        ValueError: the model does not fit.
    """
    config = getattr(model, "config", None)
    check("model", type(model).__name__, hasattr(config, "model_type"), "must be a model of transformers")
    for key in ("model_type", "hidden_size"):
        value, own = saved.get(key), getattr(config, key, None)
        check(key, value, value is None or value == own, f"must equal the model's, {own!r}")
    kind = getattr(config, "model_type", None)
    check("model_type", kind, kind != "xmod", "must be another one: the library removes X-MOD's language adapters")


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
