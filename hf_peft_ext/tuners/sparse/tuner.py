"""The tuner of sparse fine-tuning."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor, nn

from hf_peft_ext.attach.adapter_tuner import AdapterTuner, check_adapter_name, unload_auxiliary
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.tuners.sparse.config import SparseConfig
from hf_peft_ext.tuners.sparse.deltas import SparseDelta
from hf_peft_ext.tuners.sparse.layer import LAYER_NAME, SparseLayer
from hf_peft_ext.tuners.sparse.targets import find_targets, host_path
from hf_peft_ext.validation.checks import check


class SparseModel(AdapterTuner):
    """Attaches the sparse differences of a `SparseConfig` to a model."""

    prefix = "deltas_"  # begins the name of `SparseLayer.deltas_of`; transformers looks for it when it loads
    container = "deltas_of"
    tuner_layer_cls = SparseLayer
    reads_whole_batches = "sparse differences act on whole batches"

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # peft warns of them, but here tied weights get one update, and stay tied

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the differences of an adapter. The model is unchanged after an error.

        Raises:
            ValueError: no parameter may be selected, there are fewer than `num_values`, the config was saved from
                another model, or `adapter_name` cannot be the name of an adapter.
        """
        config = cast(SparseConfig, self.peft_config[adapter_name])
        check_adapter_name(adapter_name)
        keep_4bit_trainable(model)
        self._targets, self._host = find_targets(model, config), host_path(model, config)
        size = self._targets[-1].stop
        self._count = config.count(size)
        kwargs.pop("state_dict", None)  # the config is complete; peft would look for keys in its own format
        named, excluded = config.target_modules, config.exclude_modules
        config.target_modules = config.exclude_modules = None  # they are in `_targets`; peft would look for others
        try:
            with self.taken_off_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.target_modules, config.exclude_modules = named, excluded
            del self._targets, self._host, self._count
        config.target_size = size

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        return key == self._host

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not hasattr(target, LAYER_NAME):
            target.add_module(LAYER_NAME, SparseLayer(target))
        config, delta = cast(SparseConfig, peft_config), SparseDelta(self._count, self._targets)
        if config.selection == "random" and not delta.indices.is_meta:
            delta.select(random_indices(self._count, delta.size, config.seed))
        cast(SparseLayer, getattr(target, LAYER_NAME)).put(adapter_name, delta, self._targets, self.model)

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], *a: Any, **kw: Any
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *a, **kw)
        return {key: value for key, value in state.items() if f".{cls.container}.{adapter_name}.search." not in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As `AdapterTuner` does.

        Raises:
            ValueError: as there, or the indices are not increasing indices of the model's parameters.
        """
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for layer in sparse_layers(model):
            delta = layer.deltas_of[adapter_name] if adapter_name in layer.deltas_of else None
            for key, value in state.items():
                if delta is not None and key.endswith(f".{cls.container}.{adapter_name}.indices"):
                    check_indices(value, delta.size)
        return state

    # Unsupported operations, and removal

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        for layer in sparse_layers(self.model):
            if not merge:
                layer.unmerge()
            layer.remove()
        unload_auxiliary(self, merge, safe_merge, adapter_names)
        return self.model


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    """The layers with sparse differences in a model."""
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


def random_indices(k: int, size: int, seed: int) -> Tensor:  # shape: (k,)
    """k different indices below `size`."""
    generator = torch.Generator().manual_seed(seed)
    if 2 * k > size:
        return torch.randperm(size, generator=generator)[:k]
    drawn = torch.empty(0, dtype=torch.long)
    while len(drawn) < k:  # a permutation of all indices would need their number in memory
        drawn = torch.cat([drawn, torch.randint(size, (2 * (k - len(drawn)),), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:k]]


def check_indices(indices: Tensor, size: int) -> None:
    """Refuse indices that are not whole numbers in increasing order, each once, of `size` entries.

    Raises:
        ValueError: they are not.
    """
    if indices.is_meta:
        return
    rule = f"must be increasing whole numbers from 0 to {size - 1}, each once; -1 is of an adapter without a selection"
    kinds = (torch.int32, torch.int64)
    check("indices", str(indices.dtype), indices.dtype in kinds and indices.ndim == 1, rule)
    increasing = bool((indices[1:] > indices[:-1]).all()) and int(indices[0]) >= 0 and int(indices[-1]) < size
    check("indices", indices[:3].tolist(), increasing, rule)


def check_saved_indices(path: Path, size: int) -> None:
    """Check the indices in a weights file, see `check_indices`.

    Args:
        path: the file, with the tensors of a sparse adapter.
        size: number of entries that may be selected.

    Raises:
        ValueError: they are not increasing indices below `size`.
    """
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            if key.endswith(f".{SparseModel.container}.indices"):
                check_indices(file.get_tensor(key), size)
