"""The tuner of all methods made of placements."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule
from torch import Tensor, nn

from hf_peft_ext.attach.adapter_tuner import AdapterTuner, check_adapter_name, unload_auxiliary
from hf_peft_ext.attach.attention import AttentionPrefix
from hf_peft_ext.attach.cache_prefix import CachePrefix
from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.fusion import FusedLayers, FusionConfig, fused_layers
from hf_peft_ext.attach.layer import (
    SHARED,
    AddBeforeNorm,
    AddOfInput,
    AddOfSpan,
    AddToOutput,
    SharedLayer,
    TunerLayer,
    child_name,
    holder_of,
)
from hf_peft_ext.attach.make_sublayer import SharedParts, build
from hf_peft_ext.attach.merge import can_merge
from hf_peft_ext.attach.mixed_batch import check_adapter_names, check_unmerged, mixed_batch
from hf_peft_ext.attach.positions_layer import EditPositions
from hf_peft_ext.attach.prompt_layer import LengthenSequence
from hf_peft_ext.attach.resolve import Plan, excluded, plan
from hf_peft_ext.attach.separate_prefix import SeparatePrefix
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.model.site import Site
from hf_peft_ext.sublayers import ProjectedPrefix
from hf_peft_ext.validation.checks import check

# how a site acts, or a sub-layer -> its tuner layer
LAYERS: dict[str, type[TunerLayer]] = {
    "output": AddToOutput,
    "input": AddOfInput,
    "norm": AddBeforeNorm,
    "span": AddOfSpan,
    "attention": AttentionPrefix,
    "cache": CachePrefix,
    "leaves": SeparatePrefix,
    "shared": SharedLayer,
    # of sub-layers that need more than their site's
    "prompt": LengthenSequence,
    "intervention": EditPositions,
}


class ComposedModel(AdapterTuner):
    """Attaches the sub-layers of a `PlacedConfig` to a model."""

    prefix = "sublayer_"  # begins the name of `TunerLayer.sublayer_of`; transformers looks for it when it loads
    container = "sublayer_of"
    tuner_layer_cls = TunerLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the sub-layers of an adapter. Whatever fails, the model is left as it was.

        Raises:
            ValueError: a placement has no site in this model, a layer does not exist, or `adapter_name` cannot be the
                name of an adapter.
        """
        config = cast(PlacedConfig, self.peft_config[adapter_name]).resolved(model)
        self.peft_config[adapter_name] = config
        fused = fused_layers(model, config) if isinstance(config, FusionConfig) else FusedLayers()
        planned = Plan() if isinstance(config, FusionConfig) else plan(model, config)
        check_adapter_name(adapter_name)
        self._plan, self._fused, self._shared = planned, fused, SharedParts()
        self._excluded = excluded(model, config)
        target_modules = config.target_modules
        if target_modules == "all-linear":  # peft includes leaves outside the blocks
            config.target_modules = [host for host, pairs in planned.items() if pairs[0][1].name == "target"]
        keep_4bit_trainable(model)
        kwargs.pop("state_dict", None)  # peft would look for keys in its own format
        try:
            with self.taken_off_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                for layer in tuner_layers(model):
                    if isinstance(layer, SeparatePrefix):
                        layer.run_last()
        except BaseException:
            config.target_modules = target_modules
            raise
        finally:
            del self._plan, self._fused, self._shared, self._excluded

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        return _ExcludedModule() if key in self._excluded else key in self._plan or key in self._fused

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
        for layer, names in self._fused.get(current_key, []):
            layer.put(adapter_name, cast(FusionConfig, peft_config).sublayer(layer, names))
        for placement, site in self._plan.get(current_key, []):
            sublayer = build(placement, site, self._shared)
            self._layer_at(site, placement.sublayer).put(adapter_name, sublayer)
        if self._shared.rule is not None:
            rules = self._layer_at(SHARED, "bottleneck")
            if adapter_name not in rules.sublayer_of:
                rules.put(adapter_name, self._shared.rule)

    def _layer_at(self, site: Site, sublayer: str) -> TunerLayer:
        """The tuner layer of a site, which is made if it is not there."""
        name, holder = child_name(site.name, sublayer), self.model.get_submodule(holder_of(site))
        if not hasattr(holder, name):
            layer = LAYERS.get(sublayer, LAYERS[site.act])
            holder.add_module(name, layer(self.model, site, name))
        return cast(TunerLayer, getattr(holder, name))

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kw: Any,
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kw)
        for path, prefix in model.named_modules():
            if isinstance(prefix, ProjectedPrefix) and path.endswith(f".sublayer_of.{adapter_name}"):
                network = (f"{path}.projection.", f"{path}.last.")
                state = {key: value for key, value in state.items() if not key.startswith(network)}
                p_k, p_v = prefix.vectors()
                state |= {f"{path}.P_K": p_k.detach().contiguous(), f"{path}.P_V": p_v.detach().contiguous()}
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As `AdapterTuner` does. Prefixes are saved plain, so those of the model are made plain first."""
        if merge_prefix_projections(model, adapter_name):
            warnings.warn(
                "The saved prefixes are plain: the reparameterisation of this model was merged into them.",
                stacklevel=2,
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # Batches that mix adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` can be passed for inference only; call model.eval() first.")
        check_adapter_names(names, self.peft_config)
        check_unmerged(tuner_layers(self.model))
        with mixed_batch(self.model, names, args, kwargs):
            yield

    # Merging and unloading

    def dequantize(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: transformers would replace each quantized leaf, and with it the tuner layers on it.

        Raises:
            ValueError: always; the message says how to get a dequantized model with this adapter.
        """
        raise ValueError(
            "A model with an adapter cannot be dequantized. Save the adapter, call `dequantize` on the base model, "
            "and load the adapter on it."
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights: all sub-layers or, if one cannot be merged, none.

        Raises:
            ValueError: a sub-layer cannot be merged, or `safe_merge` finds values that are not finite.
        """
        self._check_merge_allowed()
        names, layers = adapter_names or self.active_adapters, tuner_layers(self.model)
        refused = [
            f"{layer.site.host} ({type(layer.sublayer_of[name]).__name__})"
            for layer in layers
            for name in names
            if name in layer.sublayer_of and not can_merge(layer.sublayer_of[name])
        ]
        if refused:
            more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
            raise ValueError(
                f"{len(refused)} sub-layers cannot be merged into weights: {', '.join(refused[:4])}{more}. "
                "Bottlenecks, prefixes and interventions never can; a gated low-rank branch can once its gate is a "
                "constant (see `fix_gates`). `hf_peft_ext.to_lora` exports the adapter as a LoRA, which can be merged."
            )
        merged = {layer: layer.merged_adapters for layer in layers}
        try:
            for layer in layers:
                layer.merge(safe_merge=safe_merge, adapter_names=names)
        except BaseException:
            for layer in layers:
                layer.unmerge(keep=merged[layer])
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
            warn_of_new_biases(self.model)
        for layer in tuner_layers(self.model):
            if not merge:
                layer.unmerge()
            layer.remove()
        unload_auxiliary(self, merge, safe_merge, adapter_names)
        return self.model


def warn_of_new_biases(model: nn.Module) -> None:
    """Warn that saving loses merged biases where the model's class has no bias."""
    if any(layer.adds_bias for layer in tuner_layers(model)):
        warnings.warn(
            "The merged model has biases that its class does not build: they work in memory, but its save_pretrained "
            "and from_pretrained lose them. Save the adapter instead.",
            stacklevel=4,
        )


def tuner_layers(model: nn.Module) -> list[TunerLayer]:
    """The tuner layers of this package in a model."""
    return [module for module in model.modules() if isinstance(module, TunerLayer)]


def merge_prefix_projections(model: nn.Module, adapter_name: str | None = None) -> int:
    """Replace reparameterised prefixes by plain ones with the same vectors, in place.

    Args:
        model: a model with adapters, a `PeftModel` or not.
        adapter_name: whose prefixes; None for those of all adapters.

    Returns:
        The number of prefixes that were replaced.

    Raises:
        ValueError: the model has no such adapter.
    """
    layers = tuner_layers(model)
    adapters = {name for layer in layers for name in layer.sublayer_of}
    check("adapter_name", adapter_name, adapter_name in {None, *adapters}, f"must be one of {sorted(adapters)}")
    replaced = 0
    for layer in layers:
        for name, prefix in layer.sublayer_of.items():
            if isinstance(prefix, ProjectedPrefix) and adapter_name in (None, name):
                layer.sublayer_of[name] = prefix.to_plain()
                replaced += 1
    return replaced
