"""One tuner for every method: it carries out a list of placements."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_peft_ext.attach.attention import InAttention, InCache
from hf_peft_ext.attach.checked_loading import check_complete
from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.hook_layers import AddBeforeNorm, AddOfInput, AddOfSpan, AddToOutput
from hf_peft_ext.attach.layer import TunerLayer, child_name, holder_of
from hf_peft_ext.attach.make_sublayer import Projections, build
from hf_peft_ext.attach.mixed_batch import check_names, check_unmerged, mixed_batch
from hf_peft_ext.attach.resolve import excluded, plan
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.sublayers import Bias, LowRank, ProjectedPrefix
from hf_peft_ext.validation.checks import check

LAYERS: dict[str, type[TunerLayer]] = {
    "output": AddToOutput,
    "input": AddOfInput,
    "norm": AddBeforeNorm,
    "span": AddOfSpan,
    "attention": InAttention,
    "cache": InCache,
}
# Containers whose keys are the names of adapters: ours, and those of modules and tokens that peft trains.
OF_ADAPTERS = ("sublayer_of", "side_of", "modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")
ADAPTER_NAME = re.compile(r"[^./\\\x00-\x1f]{1,200}")


class ComposedModel(BaseTuner):
    """Attaches the sub-layers of a `PlacedConfig` to a model."""

    prefix = "sublayer_"  # begins the name of `TunerLayer.sublayer_of`; transformers looks for it when it loads
    tuner_layer_cls = TunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the sub-layers of an adapter. Whatever fails, the model is left as it was.

        Raises:
            ValueError: a placement has no site in this model, a layer does not exist, or the adapter's name is one
                that a part of a sub-layer has.
        """
        config = cast(PlacedConfig, self.peft_config[adapter_name]).resolved(model)
        self.peft_config[adapter_name] = config
        planned = plan(model, config)
        check_adapter_name(adapter_name)
        self._plan, self._projections, self._excluded = planned, Projections(), excluded(model, config)
        target_modules = config.target_modules
        if target_modules == "all-linear":  # to peft it means more than the leaves of the blocks
            config.target_modules = [host for host, pairs in planned.items() if pairs[0][1].name == "target"]
        keep_4bit_trainable(model)
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        before = tuner_layers(model)
        kwargs.pop("state_dict", None)  # the placements say everything; peft would look for its own key format
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            config.target_modules = target_modules
            for layer in tuner_layers(model):
                if adapter_name in layer.sublayer_of:
                    layer.sublayer_of.pop(adapter_name)
                if layer not in before:
                    layer.remove()
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
            raise
        finally:
            del self._plan, self._projections, self._excluded

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        return _ExcludedModule() if key in self._excluded else key in self._plan

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
        for placement, site in self._plan[current_key]:
            name = child_name(site.name, placement.sublayer)
            holder = self.model.get_submodule(holder_of(site))
            if not hasattr(holder, name):
                holder.add_module(name, LAYERS[site.act](self.model, site, name))
            getattr(holder, name).put(adapter_name, build(placement, site, self._projections))

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        host, mark, part = key.partition(f".sublayer_of.{adapter_name}.")
        return host.replace(".base_layer.", ".") + ".sublayer_of." + part if mark else key

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
        state = own_tensors(model, adapter_name, state)
        for path, prefix in model.named_modules():
            if isinstance(prefix, ProjectedPrefix) and path.endswith(f".sublayer_of.{adapter_name}"):
                network = (f"{path}.projection.", f"{path}.last.")
                state = {key: value for key, value in state.items() if not key.startswith(network)}
                keys, values = prefix.vectors()
                state |= {f"{path}.keys": keys.detach().contiguous(), f"{path}.values": values.detach().contiguous()}
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file by their names in the model.

        Raises:
            ValueError: one of them is no part of the adapter, but would overwrite a weight of the base model, or is
                not finite; or a file that is loaded lacks one, or holds one of another shape.
        """
        if merge_prefix_projections(model, adapter_name):
            warnings.warn(
                "The saved prefixes are plain: the reparameterisation of this model was folded away.", stacklevel=2
            )
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, aligned(state_dict))
        check_loaded(found, adapter_name)
        check_complete(cls, model, adapter_name, found)
        return found

    # Batches that mix adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` can be passed for inference only; call model.eval() first.")
        check_names(names, self.peft_config)
        check_unmerged(tuner_layers(self.model))
        with mixed_batch(self.model, names, args, kwargs):
            yield

    # Merging and unloading

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights, all sub-layers or, if one cannot be folded, none.

        Raises:
            ValueError: a sub-layer has no weight that equals it, or `safe_merge` finds values that are not finite.
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
                "Bottlenecks and prefixes never can; a gated low-rank branch can once its gate is a constant "
                "(see `fix_gates`)."
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


def unload_auxiliary(
    tuner: BaseTuner, merge: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    """Take off what peft has put around modules that are saved whole, and its config if no other tuner is left."""
    for path, module in list(tuner.model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            parent, _, name = _get_submodules(tuner.model, path)
            plain = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            setattr(
                parent, name, plain
            )  # peft's `_replace_module` copies weights, which a module without its own lacks
    if not any(isinstance(module, BaseTunerLayer) for module in tuner.model.modules()):
        del tuner.model.peft_config  # other tuners in the model keep theirs


def check_adapter_name(name: str) -> None:
    """Refuse names that cannot be a key of a module, or lead out of a folder, where peft saves the adapter."""
    rule = "must have 1 to 200 characters, without dots, slashes, backslashes and control characters"
    check("adapter_name", name, bool(ADAPTER_NAME.fullmatch(name)), rule)
    check(
        "adapter_name", name, not hasattr(nn.ModuleDict(), name), "is an attribute of torch's ModuleDict; take another"
    )


def own_tensors(
    model: nn.Module, adapter_name: str, state: dict[str, Tensor], container: str = "sublayer_of"
) -> dict[str, Tensor]:
    """The tensors of an adapter out of `state`, or out of the model where they are missing there.

    peft drops every key in which the name of another adapter occurs, or none if that leaves nothing. But a name may
    also be that of a part of the model, or of a sub-layer ("gate").
    """
    mark = f".{container}.{adapter_name}"
    own = {key: value for key, value in state.items() if f"{mark}." in key}
    sublayers = [(path, module) for path, module in model.named_modules() if path.endswith(mark)]
    keys = [f"{path}.{key}" for path, sublayer in sublayers for key in sublayer.state_dict(keep_vars=True)]
    if len(own) < len(keys):
        own = {key: value for key, value in model.state_dict().items() if key in set(keys)} | own
    return own


def aligned(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors of a file: mapped from it they lie at odd addresses, where matrix products differ in the
    last bit.
    """
    return {key: value.clone() for key, value in state_dict.items()}


def check_loaded(found: dict[str, Tensor], adapter_name: str) -> None:
    """Refuse tensors that would overwrite a weight of the base model, or are not finite."""
    base = sorted(key for key in found if not any(f".{part}.{adapter_name}" in key for part in OF_ADAPTERS))
    check("adapter_model", base[:3], not base, "holds tensors that are no part of the adapter")
    real = {key: value for key, value in found.items() if value.is_floating_point() and not value.is_meta}
    broken = [key for key, value in real.items() if not value.isfinite().all()]
    check("adapter_model", broken[:3], not broken, "holds weights that are not finite")


def warn_of_new_biases(model: nn.Module) -> None:
    """Say that a merged bias is lost on saving where the model's class has none."""
    if any(layer._unbiased for layer in tuner_layers(model)):
        warnings.warn(
            "The merged model has biases that its class does not build: they work in memory, but its save_pretrained "
            "and from_pretrained lose them. Save the adapter instead.",
            stacklevel=4,
        )


def tuner_layers(model: nn.Module) -> list[TunerLayer]:
    """The tuner layers of this package in a model."""
    return [module for module in model.modules() if isinstance(module, TunerLayer)]


def can_merge(sublayer: nn.Module) -> bool:
    if isinstance(sublayer, LowRank):
        return sublayer.gate is None or sublayer.gate.is_constant
    return isinstance(sublayer, Bias)


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
    known = {name for layer in layers for name in layer.sublayer_of}
    check("adapter_name", adapter_name, adapter_name in {None, *known}, f"must be one of {sorted(known)}")
    folded = 0
    for layer in layers:
        for name, prefix in layer.sublayer_of.items():
            if isinstance(prefix, ProjectedPrefix) and adapter_name in (None, name):
                layer.sublayer_of[name] = prefix.fold()
                folded += 1
    return folded
